"""Training of a mixture for as much compute as another takes, and latency of several mixtures."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from koine.files import write_json
from koine.generate import generate
from koine.generate.sampling import Sampling
from koine.model import ModelConfig, load_model
from koine.model.counting import training_flops_per_token
from koine.plan import step
from koine.steps import estimates
from koine.steps.text_mixture import TextMixture
from koine.steps.training import train_model, training_settings
from koine.train.settings import TrainSettings

ROUNDS = 5
TIMED_STEPS = 8
FIRST_STEPS = 2


@step(version="3", estimate=estimates.training, threads=0)
def train_matched(
    model: Path,
    reference: Path,
    tokens: dict[str, Path],
    *,
    match: str,
    mixture: TextMixture,
    settings: TrainSettings,
    config: ModelConfig | None = None,
    out: Path,
) -> None:
    """Train as `train_model` does, for the steps that cost the compute of `mixture.steps` of `reference`.

    match: compute is counted operations (`flops`) or measured time (`seconds`).
    """

    def train(from_model: Path, steps: int, out: Path) -> None:
        own = training_settings(steps=steps)
        train_model(
            from_model,
            tokens,
            mixture=replace(mixture, steps=steps),
            settings=replace(settings, warmup_steps=own.warmup_steps, checkpoint_every=own.checkpoint_every),
            config=config,
            out=out,
        )

    if match == "flops":
        theirs, ours = (
            training_flops_per_token(load_model(path).config, mixture.sequence_length)
            for path in (reference, model)
        )
        ratio = theirs / ours
    else:
        ratio = statistics.median(
            _step_seconds(reference, train) / _step_seconds(model, train) for _ in range(ROUNDS)
        )
    count = max(1, round(mixture.steps * ratio))
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
