"""The steps of preference training."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from koine.allocator import keep_freed_memory
from koine.files import write_json
from koine.plan import step
from koine.steps import checks, estimates
from koine.steps.corpus_files import write_step_report
from koine.train.settings import TrainSettings


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


@step(version="1", estimate=estimates.inspected_groups, check=checks.inspected_groups, threads=0)
def inspect_preferences(
    pairs: Path,
    model: Path,
    held_out: Path | None = None,
    *,
    sequence_length: int = 1024,
    limit: int | None = None,
    identify_languages: bool = True,
    out: Path,
) -> None:
    """Inspect groups before a model is trained on them; write `inspection.json` and a report.

    See `koine.align.inspect_pairs.inspect_groups`. The model reads in float32.

    pairs: token shards of groups. held_out: those of another split. limit: most pairs that the model reads.
    """
    import torch

    from koine.align.inspect_pairs import check_tokenizer, inspect_groups, opened_groups
    from koine.align.inspect_report import report_blocks
    from koine.model.causal_lm import load_as_stored
    from koine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    loaded: Any = load_as_stored(model)
    with ExitStack() as stack:
        source = stack.enter_context(opened_groups(pairs, model))
        other = None if held_out is None else stack.enter_context(opened_groups(held_out, model))
        for one in (source, other):
            if one is not None:
                check_tokenizer(one, tokenizer, model)
        inspection = inspect_groups(
            source,
            tokenizer,
            model=loaded.to(torch.float32).eval(),
            held_out=other,
            sequence_length=sequence_length,
            limit=limit,
            identify_languages=identify_languages,
        )
    write_json(out / "inspection.json", inspection.to_json())
    write_step_report(out, "Preference data before training", list(report_blocks(inspection)))


@step(version="1", check=checks.trained_online, threads=0)
def train_online_model(
    model: Path,
    prompts: Path,
    reference: Path | None = None,
    *,
    loss: str,
    reward: str,
    settings: TrainSettings,
    steps: int = 100,
    k: int = 4,
    prompts_per_step: int = 16,
    draw_every: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    out: Path,
) -> None:
    """Train a model on its own completions, which a reward scores; rounds are several such steps.

    Args:
        model: folder of the model.
        prompts: file of prompts, with what the reward reads.
        reference: model of the loss; None: the model itself, before this step.
        loss: of scored completions (`rloo`, `copg`), or of pairs of the best and the worst one (`dpo`, `nll`).
        reward: specification of `koine.align.rewards`, without a judge.
        settings: how to train; the seed is also that of the completions.
        steps: of the training.
        k: completions of each prompt.
        prompts_per_step: prompts of a step.
        draw_every: steps between two draws.
        temperature, max_new_tokens: of the completions.
        out: folder to write to.
    """
    from koine.align.loss_spec import LossSpec
    from koine.align.online import ROLLOUTS, OnlineSettings, summary_of, train_online
    from koine.align.prompts import read_prompts
    from koine.align.rewards import RewardSpec
    from koine.generate.sampling import Sampling
    from koine.tokenizer import load_tokenizer
    from koine.train.progress import final_metrics

    keep_freed_memory()
    spec, tokenizer = LossSpec.parse(loss), load_tokenizer(model)
    train_online(
        model,
        read_prompts(prompts, tokenizer),
        RewardSpec.parse(reward).build(),
        reward_name=reward,
        online=OnlineSettings(
            loss=spec,
            k=k,
            prompts=prompts_per_step,
            steps=steps,
            draw_every=draw_every,
            sampling=Sampling(temperature=temperature, max_new_tokens=max_new_tokens),
        ),
        settings=settings,
        tokenizer=tokenizer,
        out=out,
        reference=(reference or "start") if spec.needs_reference else "none",
    )
    write_json(out / "metrics.json", {**final_metrics(out / "metrics.jsonl"), **summary_of(out / ROLLOUTS)})
