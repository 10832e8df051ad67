"""Estimates beside a run: peak memory, disk space, and time at a known speed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from koine.hardware import bfloat16_is_fast
from koine.model.config import MixtureConfig
from koine.model.decoder import Decoder
from koine.model.presets import preset
from koine.train import LanguageModelling, TrainSettings, estimate_training, train
from koine.train.speed import Speed

from .fakes import fake_order

WORKER = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from koine.model.decoder import Decoder
from koine.model.presets import preset
from koine.plan.run.peak_memory import own_peak
from tests.train.fakes import fake_order
from koine.train import TrainSettings, estimate_training, LanguageModelling, train

folder, dtype, vocab = Path(sys.argv[1]), sys.argv[2], 4096
length, rows, again = map(int, sys.argv[3:])
order = fake_order(folder / "s", steps=(2,), sequence_length=length, batch_size=2 * rows if rows > 1 else 1)
order.vocab_size = vocab
config = preset("koine-8m", vocab)
settings = TrainSettings(dtype=dtype, threads=1, micro_batch_size=rows, gradient_checkpointing=bool(again))
guess = estimate_training(config, settings, order.mixture)
train(Decoder(config), LanguageModelling(), order, settings, out=folder / "o", progress=False, device="cpu")
print(guess.peak_bytes, own_peak())
"""


NEEDS_BFLOAT16 = pytest.mark.skipif(
    not bfloat16_is_fast(), reason="this processor emulates bfloat16: two steps take minutes"
)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", ("512", "4", "0")),
        pytest.param("bfloat16", ("512", "4", "0"), marks=NEEDS_BFLOAT16),
        # One row of 4,096 tokens with gradient checkpointing.
        pytest.param("bfloat16", ("4096", "1", "1"), marks=NEEDS_BFLOAT16),
    ],
)
def test_memory_is_within_a_factor_of_one_and_a_half(
    tmp_path: Path, dtype: str, shape: tuple[str, ...]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path), dtype, *shape],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    guess, peak = map(int, done.stdout.split())
    assert peak / 1.5 < guess < peak * 1.5


def test_time_is_that_of_micro_batches_and_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def speed(config: object, settings: object, rows: int, length: int, threads: int) -> Speed:
        asked.append((rows, length, threads))
        return Speed(micro_batch=0.5, update=0.25, basis="as measured", measured=False)

    monkeypatch.setattr("koine.train.speed.training_speed", speed)
    config = preset("koine-0.5m", 1024)
    order = fake_order(tmp_path / "s", steps=(7,), sequence_length=64, batch_size=4)
    settings = TrainSettings(dtype="float32", threads=1, micro_batch_size=2)
    found = estimate_training(config, settings, order.mixture)
    assert found.seconds == pytest.approx(7 * (2 * 0.5 + 0.25))
    assert (found.basis, found.measured, asked) == ("as measured", False, [(2, 64, 1)])
    # A mixture's assignments of a step are counted first, in a forward pass over all micro-batches.
    experts = replace(config, mixture=MixtureConfig(experts=("a", "b")))
    assert estimate_training(experts, settings, order.mixture).seconds == pytest.approx(
        7 * (2 * 0.5 * 4 / 3 + 0.25)
    )


@pytest.mark.parametrize("evaluate_every", [0, 1])
def test_disk_space_is_that_of_the_files(tmp_path: Path, evaluate_every: int) -> None:
    order = fake_order(tmp_path / "s", steps=(4,), sequence_length=64, batch_size=4)
    config = preset("koine-0.5m", order.vocab_size)
    settings = TrainSettings(
        dtype="float32", threads=1, checkpoint_every=1, keep_last=1, evaluate_every=evaluate_every
    )
    found = estimate_training(config, settings, order.mixture)

    def size() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "o").rglob("*") if path.is_file())

    most = []

    def evaluate(model: object, step: int) -> dict[str, float]:
        most.append(size())
        return {"loss": 10.0 - step}

    train(
        Decoder(config),
        LanguageModelling(),
        order,
        settings,
        out=tmp_path / "o",
        evaluate=evaluate if evaluate_every else None,
        progress=False,
        device="cpu",
    )
    small = 300_000  # descriptions, metrics
    assert found.kept_bytes <= size() < found.kept_bytes + small
    assert max(most, default=0) <= found.kept_bytes + found.temporary_bytes + small
