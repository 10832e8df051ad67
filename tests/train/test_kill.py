"""kill -9 at random moments, the same call again: bit-identical weights.

The children are forked from one process that has imported torch and used no threads, so that a life costs
milliseconds; which moment a kill meets is drawn at random over the whole of a life, checkpoints and the final
writing included.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PARENT = """
import sys, warnings
from pathlib import Path

warnings.simplefilter("ignore")
import torch
import torch.distributed.checkpoint
import tensorboardX
from tests.kills import kill_and_repeat
from tests.train.fakes import fake_order
from tests.train.models import small_model
import koine.model.formats.directory, torch.optim.adamw, torch._dynamo, koine.train.loop
from koine.train import TrainSettings, LanguageModelling, train
from tests.train.stop_rules import StopAfter

torch.set_num_threads(1)
folder, dtype = Path(sys.argv[1]), sys.argv[2]
stop = StopAfter(int(sys.argv[5])) if sys.argv[5] != "0" else None
order = fake_order(folder / "source", steps=(16, 8))
settings = TrainSettings(
    dtype=dtype, threads=1, checkpoint_every=3, warmup_steps=2, micro_batch_size=2, evaluate_every=4
)

def evaluate(model, step):
    torch.rand(1)
    return {"figure": float(sum(p.float().abs().sum() for p in model.parameters()))}

def run(out):
    more = {"out": out, "evaluate": evaluate, "progress": False, "device": "cpu", "stop": stop}
    train(small_model(), LanguageModelling(), order, settings, **more)

files = ("model.safetensors", "training.json")
kill_and_repeat(run, folder, kills=int(sys.argv[4]), seed=int(sys.argv[3]), files=files)
lines = {len(path.read_text().splitlines()) for path in folder.glob("*/metrics.jsonl")}
assert len(lines) == 1, lines
"""


@pytest.mark.parametrize(
    ("dtype", "kills", "stop"),
    [("float32", 16, 0), ("bfloat16", 10, 0), pytest.param("float32", 10, 3, id="a stop rule")],
)
def test_bit_identical_after_kills(tmp_path: Path, dtype: str, kills: int, stop: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT, str(tmp_path), dtype, "7", str(kills), str(stop)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
