"""The estimate of memory beside a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from koine.model.decoder import Decoder
from koine.model.presets import preset
from koine.plan.memory import own_peak
from tests.train.fakes import fake_order
from koine.train import TrainSettings, estimate_training, language_modelling, train

folder, dtype, vocab = Path(sys.argv[1]), sys.argv[2], 4096
length, rows, again = map(int, sys.argv[3:])
order = fake_order(folder / "s", steps=(2,), sequence_length=length, batch_size=2 * rows if rows > 1 else 1)
order.vocab_size = vocab
config = preset("koine-8m", vocab)
settings = TrainSettings(dtype=dtype, threads=1, micro_batch_size=rows, gradient_checkpointing=bool(again))
guess = estimate_training(config, settings, order.mixture)
train(Decoder(config), language_modelling, order, settings, out=folder / "o", progress=False, device="cpu")
print(guess.peak_bytes, own_peak())
"""


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", ("512", "4", "0")),
        ("bfloat16", ("512", "4", "0")),
        # One row of 4,096 tokens, its blocks recomputed.
        ("bfloat16", ("4096", "1", "1")),
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
