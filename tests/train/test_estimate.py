"""Estimates beside a run: peak memory, and time at a known matmul rate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from koine.hardware import bfloat16_is_fast
from koine.model.counting import count_parameters
from koine.model.presets import preset
from koine.train import TrainSettings, estimate_training

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


def test_time_is_operations_over_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1 GFLOP/s: FLOPs of forward and backward over `MATMUL_RATE_SHARE` of that rate."""
    rates: list[tuple[int, ...]] = []

    def matmul_rate(rows: int, columns: int, out: int, *_: object) -> float:
        rates.append((rows, columns, out))
        return 1e9

    monkeypatch.setattr("koine.train.matmul_rate.measure_matmul_rate", matmul_rate)
    config = preset("koine-0.5m", 1024)
    order = fake_order(tmp_path / "s", steps=(7,), sequence_length=64, batch_size=4)
    settings = TrainSettings(dtype="float32", threads=1, micro_batch_size=2)
    found = estimate_training(config, settings, order.mixture)
    # Twice the parameters that multiply for a forward pass and twice that for the backward pass; the
    # embedding is also the head. A score and its weighted sum are 4 operations a position seen and a channel
    # of the queries, 12 with the backward pass.
    matrices = count_parameters(config).total - sum(config.hidden_size for _ in range(len(config.layers) + 1))
    seen = sum(sum(min(at + 1, layer.window or 64) for at in range(64)) / 64 for layer in config.layers)
    operations = 6 * matrices + 12 * seen * config.num_heads * config.head_dim
    assert found.seconds == pytest.approx(7 * 4 * 64 * operations / (1e9 * 0.35), rel=1e-6)
    assert rates == [(128, config.hidden_size, sum(config.projection_sizes))]
