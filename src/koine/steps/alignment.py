"""The steps of preference training."""

from __future__ import annotations

from pathlib import Path

from koine.allocator import keep_freed_memory
from koine.files import write_json
from koine.plan import step
from koine.steps import checks
from koine.steps.corpus_files import write_step_report


@step(version="1", check=checks.watched, threads=0)
def watch_models(
    models: dict[str, Path],
    pairs: Path | None = None,
    prompts: Path | None = None,
    reference: Path | None = None,
    *,
    limit: int | None = 64,
    language: str | None = None,
    temperature: float = 0.5,
    top_p: float = 0.75,
    max_new_tokens: int = 256,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    out: Path,
) -> None:
    """Measure a training's checkpoints: likelihoods, entropy, diversity, KL, by language, and judge them.

    Writes `metrics-behaviour.jsonl`, `metrics-samples.jsonl`, `verdict.json`, `metrics.json`, `report.json`.

    Args:
        models: folders by any name, in the order of the training (`koine.align.watch.steps_of`).
        pairs: held-out preference records; None: no likelihoods.
        prompts: records with prompts to answer; None: those of the pairs.
        reference: model for the KL; None: no KL.
        limit: pairs, and prompts, of each language at most; None: all.
        language: of records that name none.
        temperature, top_p, max_new_tokens, seed: of the answers; the defaults are the paper's.
        device, dtype: of the computation.
        out: folder to write to.
    """
    from koine.align.behaviour_report import behaviour_blocks
    from koine.align.behaviour_table import SAMPLES, TABLE, read_table
    from koine.align.held_out import read_pairs, read_prompts
    from koine.align.monitor import installed_identifier
    from koine.align.watch import watch_models as watch
    from koine.generate.sampling import Sampling
    from koine.hardware import chosen_device

    keep_freed_memory()
    held_out = [] if pairs is None else read_pairs(pairs, limit=limit, language=language)
    asked = held_out if prompts is None else read_prompts(prompts, limit=limit, language=language)
    found = watch(
        list(models.values()),
        pairs=held_out,
        prompts=asked,
        reference=reference,
        identify=installed_identifier(),
        sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens),
        device=chosen_device(device),
        dtype=dtype,
        out=out,
    )
    table, samples = read_table(out / TABLE), read_table(out / SAMPLES)
    judged = found.verdict
    write_json(out / "metrics.json", table[-1]["overall"])
    write_json(
        out / "verdict.json",
        None
        if judged is None
        else {
            "state": judged.state,
            "step": judged.step,
            "keep": judged.keep,
            "languages": list(judged.languages),
            "text": judged.text,
        },
    )
    write_step_report(out, "Behaviour during training", behaviour_blocks(table, judged, samples))
