"""The steps of a context extension: one stage of training, and what the model makes of each length after it."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.files import read_json, write_json
from koine.plan import step
from koine.steps import estimates
from koine.steps.corpus_files import existing, load_roles, read_lines, write_step_report
from koine.steps.training import train_step

if TYPE_CHECKING:
    from koine.data.mixture import Mixture


@step(version="1", estimate=estimates.extension)
def extend_stage(
    model: Path,
    tokenizer: Path,
    tokens: Path,
    long_tokens: Path,
    *,
    base_length: int,
    length: int,
    long_every: int,
    long_min_tokens: int,
    rope_theta: float,
    steps: int,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: float,
    final_learning_rate: float,
    warmup_steps: int,
    dtype: str,
    seed: int,
    threads: int,
    out: Path,
) -> None:
    """Go on from a model with every `long_every`-th step of rows of `length`, the others of `base_length`; rope_theta 0: the model's own.

    The blocks are recomputed in the backward pass, so that rows of `length` need little memory.
    """
    from koine.model import load_model, set_rope_theta
    from koine.model.layer_patterns import reconfigure
    from koine.train import TrainSettings

    start = load_model(model)
    if rope_theta:
        set_rope_theta(start, rope_theta)
    longest = max(start.config.max_position_embeddings, length)
    reconfigure(start, replace(start.config, max_position_embeddings=longest))
    settings = TrainSettings(
        learning_rate=learning_rate,
        schedule="linear",
        min_lr_ratio=final_learning_rate / learning_rate,
        warmup_steps=warmup_steps,
        micro_batch_size=micro_batch_size,
        gradient_checkpointing=length > base_length,
        dtype=dtype,  # type: ignore[arg-type]
        checkpoint_every=max(10, steps // 10),
        keep_last=1,
        # A stage changes the data at once: a rise is no accident here.
        spike_deviations=0.0,
        seed=seed,
        threads=threads,
    )
    mixture = stage_mixture(
        tokens / "tokens",
        long_tokens / "tokens",
        base_length=base_length,
        length=length,
        long_every=long_every,
        long_min_tokens=long_min_tokens,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
    )
    train_step(start, mixture, settings, out=out, tokenizer=tokenizer, evaluate=None, init_from=model)


def stage_mixture(
    tokens: Path,
    long_tokens: Path,
    *,
    base_length: int,
    length: int,
    long_every: int,
    long_min_tokens: int,
    steps: int,
    batch_size: int,
    seed: int,
) -> Mixture:
    """One phase: rows of `base_length`, and in every `long_every`-th step rows of `length` with as many tokens in all."""
    from koine.data import LongRows, Mixture, Phase, Source

    sources = (Source(name="text", path=tokens, proportion=1.0),)
    long_sources = (
        Source(name="long", path=long_tokens, proportion=1.0, min_tokens=long_min_tokens or None),
    )
    long_rows = max(1, batch_size * base_length // length)
    name = f"length-{length}"
    if length == base_length:
        phase = Phase(name=name, steps=steps, sources=sources)
    elif long_every == 1:
        phase = Phase(
            name=name, steps=steps, sources=long_sources, sequence_length=length, batch_size=long_rows
        )
    else:
        long = LongRows(every=long_every, sequence_length=length, batch_size=long_rows, sources=long_sources)
        phase = Phase(name=name, steps=steps, sources=sources, long=long)
    return Mixture(phases=(phase,), sequence_length=base_length, batch_size=batch_size, seed=seed)


@step(version="2", estimate=estimates.long_evaluation)
def evaluate_lengths(
    corpus: Path,
    model: Path,
    *,
    lengths: tuple[int, ...],
    documents: int,
    seed: int,
    threads: int,
    out: Path,
) -> None:
    """Bits per byte of the same held-out documents, the longest ones, seen through each of `lengths` tokens at once.

    A model that can use what is far away needs fewer bits the more it sees; one that cannot bear it needs more.
    """
    import torch

    from koine.evaluate import bits_per_byte
    from koine.model import load_model
    from koine.tokenizer import load_tokenizer

    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(model)
    decoder = load_model(model, dtype=torch.float32)
    paths = existing(corpus, "documents-heldout", load_roles(corpus).all).values()
    every = chain.from_iterable(read_lines(path) for path in paths)
    chosen = sorted(every, key=lambda record: (-len(record["text"].encode()), str(record["id"])))[:documents]
    if not chosen:
        raise UserError("holds no held-out document", where=corpus, hint="give more text")
    tokens = [len(tokenizer.encode(record["text"])) for record in chosen]
    found = {
        str(length): bits_per_byte(decoder, tokenizer, chosen, batch_size=4, max_length=length, seed=seed)[
            "overall"
        ]
        for length in lengths
    }
    write_json(
        out / "evaluation.json",
        {"lengths": found, "documents": len(chosen), "shortest": min(tokens), "longest": max(tokens)},
    )
    write_json(
        out / "metrics.json",
        {f"bits_per_byte_{length}": row["bits_per_byte"] for length, row in found.items()},
    )


@step(version="2", estimate=estimates.comparison)
def compare_lengths(evaluations: dict[str, Path], *, lengths: tuple[int, ...], out: Path) -> None:
    """The table of bits per byte, stage by length, and what the longest context is worth over the shortest after each stage."""
    read = {stage: read_json(folder / "evaluation.json") for stage, folder in evaluations.items()}
    values = {
        stage: {length: found["lengths"][str(length)]["bits_per_byte"] for length in lengths}
        for stage, found in read.items()
    }
    gain = {stage: row[lengths[0]] - row[lengths[-1]] for stage, row in values.items()}
    any_of = next(iter(read.values()))
    write_json(
        out / "results.json",
        {"bits_per_byte": values, "gain": gain, "documents": any_of["documents"], "evaluations": read},
    )
    last = list(values)[-1]
    write_json(out / "metrics.json", {"gain_of_the_longest": gain[last]})
    names = {stage: stage if stage == "given" else f"after {int(stage):,}" for stage in values}
    blocks: list[dict[str, Any]] = [
        {
            "kind": "text",
            "text": f"{any_of['documents']} held-out documents of {any_of['shortest']:,} to {any_of['longest']:,} tokens, each scored whole with as many "
            "tokens in view as the column says. What lies beyond a document's own length changes nothing.",
        },
        {
            "kind": "table",
            "title": "Bits per byte by length in view",
            "columns": ["model", *(f"{length:,}" for length in lengths), "gain of the longest"],
            "rows": [
                [names[stage], *(round(row[length], 4) for length in lengths), round(gain[stage], 4)]
                for stage, row in values.items()
            ],
        },
        {
            "kind": "bars",
            "title": "Bits per byte by length in view",
            "categories": [f"{length:,}" for length in lengths],
            "series": [
                {"name": names[stage], "values": [row[length] for length in lengths]}
                for stage, row in values.items()
            ],
            "x_label": "tokens in view",
            "y_label": "bits per byte",
        },
    ]
    write_step_report(out, "Context extension", blocks)
