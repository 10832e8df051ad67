"""Training for as much compute as another mixture takes, and the latency of several mixtures."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path

import torch

from koine.files import write_json
from koine.model import Decoder, Sampling, generate, load_model
from koine.model.flops import training_flops_per_token
from koine.plan import step
from koine.recipes import estimates
from koine.recipes.domains import train_on
from koine.train.loss import chunked_cross_entropy

ROUNDS = 9


@step(version="1", estimate=estimates.branch)
def train_matched(
    model: Path,
    reference: Path,
    tokens: dict[str, Path],
    *,
    match: str,
    shares: tuple[float, ...],
    steps: int,
    sequence_length: int,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: float,
    min_rate_share: float,
    dtype: str,
    seed: int,
    threads: int,
    out: Path,
) -> None:
    """As `train_on`, for so many steps as take the compute of `steps` of the mixture `reference`: counted operations (`flops`) or measured `seconds`."""
    torch.set_num_threads(threads)
    ours, theirs = load_model(model), load_model(reference)
    if match == "flops":
        ratio = training_flops_per_token(theirs.config, sequence_length) / training_flops_per_token(
            ours.config, sequence_length
        )
    else:
        shape = (micro_batch_size, sequence_length)
        for mixture in (theirs, ours):
            mixture.to(getattr(torch, dtype)).train()
            _step_seconds(mixture, shape)
        rounds = [(_step_seconds(theirs, shape), _step_seconds(ours, shape)) for _ in range(ROUNDS)]
        ratio = statistics.median(their_seconds / our_seconds for their_seconds, our_seconds in rounds)
    del ours, theirs
    count = max(1, round(steps * ratio))
    train_on(
        model, tokens, shares=shares, steps=count, sequence_length=sequence_length, batch_size=batch_size,
        micro_batch_size=micro_batch_size, learning_rate=learning_rate, min_rate_share=min_rate_share, dtype=dtype,
        seed=seed, threads=threads, out=out,
    )  # fmt: skip
    write_json(out / "matched.json", {"match": match, "ratio": ratio, "steps": count})


def _step_seconds(model: Decoder, shape: tuple[int, int]) -> float:
    """Forward and backward of one micro batch."""
    tokens = torch.randint(0, model.config.vocab_size, shape)
    start = time.perf_counter()
    hidden = model(tokens)
    chunked_cross_entropy(hidden, model.output_weight, tokens).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return time.perf_counter() - start


@step(version="1", estimate=estimates.comparison)
def latency(models: dict[str, Path], *, prompt: int, new: int, rounds: int, threads: int, out: Path) -> None:
    """Seconds to read a prompt and to write some tokens, the mixtures in turn."""
    torch.set_num_threads(threads)
    opened = {name: load_model(path, dtype=torch.float32) for name, path in models.items()}
    sampling = Sampling(max_new_tokens=new, temperature=0.0)
    found: dict[str, list[float]] = {name: [] for name in opened}
    for number in range(rounds + 1):
        for name, model in opened.items():
            tokens = torch.randint(
                8, model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(number)
            )
            start = time.perf_counter()
            generate(model, [tokens.tolist()], sampling)
            if number:
                found[name].append(time.perf_counter() - start)
    assert all(math.isfinite(value) for values in found.values() for value in values)
    write_json(out / "latency.json", {name: statistics.median(values) for name, values in found.items()})
