"""Training of a mixture for as much compute as another takes, and latency of several mixtures."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from koine.files import write_json
from koine.generate import generate
from koine.generate.sampling import Sampling
from koine.model import load_model
from koine.model.counting import training_flops_per_token
from koine.plan import step
from koine.steps import estimates
from koine.steps.mixtures import train_on

ROUNDS = 5
TIMED_STEPS = 8
FIRST_STEPS = 2


@step(version="2", estimate=estimates.branch)
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
    """Train as `train_on` does, for as many steps as cost the compute of `steps` of the mixture `reference`.

    match: compute is counted operations (`flops`) or measured time (`seconds`).
    """
    torch.set_num_threads(threads)

    def train(from_model: Path, steps: int, out: Path) -> None:
        train_on(
            from_model,
            tokens,
            shares=shares,
            steps=steps,
            sequence_length=sequence_length,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            learning_rate=learning_rate,
            min_rate_share=min_rate_share,
            dtype=dtype,
            seed=seed,
            threads=threads,
            out=out,
        )

    if match == "flops":
        theirs, ours = (
            training_flops_per_token(load_model(path).config, sequence_length) for path in (reference, model)
        )
        ratio = theirs / ours
    else:
        ratio = statistics.median(
            _step_seconds(reference, train) / _step_seconds(model, train) for _ in range(ROUNDS)
        )
    count = max(1, round(steps * ratio))
    train(model, count, out)
    write_json(out / "matched.json", {"match": match, "ratio": ratio, "steps": count})


def _step_seconds(model: Path, train: Callable[[Path, int, Path], None]) -> float:
    """Measure a training step, with its optimiser: the median of a short run, without its first steps."""
    with TemporaryDirectory() as folder:
        train(model, TIMED_STEPS, Path(folder) / "model")
        lines = (Path(folder) / "model" / "metrics.jsonl").read_text().splitlines()
    rates: list[float] = [json.loads(line)["tokens_per_second"] for line in lines[FIRST_STEPS:]]
    return 1.0 / statistics.median(rates)


@step(version="1", estimate=estimates.comparison)
def latency(models: dict[str, Path], *, prompt: int, new: int, rounds: int, threads: int, out: Path) -> None:
    """Measure the seconds for prefill of a prompt and decoding of some tokens; the mixtures take turns."""
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
