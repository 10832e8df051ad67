"""FSDP2 on two gloo processes beside one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from koine.train import LanguageModelling, TrainSettings, train

from .fakes import fake_order
from .models import small_model

WORKER = """
import os, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from tests.train.fakes import fake_order
from tests.train.models import small_model
from koine.train import TrainSettings, LanguageModelling, train

folder, out, dtype, stop = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
class Stop(Exception):
    pass
def evaluate(model, done):
    if done == stop:
        os._exit(9)
    return {}
settings = TrainSettings(
    dtype=dtype, threads=1, learning_rate=1e-2, checkpoint_every=3, evaluate_every=1, micro_batch_size=1
)
order = fake_order(folder, steps=(8,))
more = {"out": out, "evaluate": evaluate, "progress": False, "device": "cpu"}
train(small_model(), LanguageModelling(), order, settings, **more)
"""

# Saves the gradients of the first step of a mixture; `stop` is the micro-batch size.
MIXTURE_WORKER = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import koine.train.loop
from koine.train import TrainSettings, LanguageModelling, train
from koine.train.optimiser import Optimiser
from tests.model.moe.test_losses import mixture_model, padded

folder, out, dtype, micro = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
class Kept(Optimiser):
    def step(self, learning_rate):
        found = {}
        for name, one in self.masters.items():
            gradient = one.grad.full_tensor() if hasattr(one.grad, "full_tensor") else one.grad
            found[name] = gradient.clone()
        if not (out / "gradients.pt").exists() and int(__import__("os").environ["RANK"]) == 0:
            torch.save(found, out / "gradients.pt")
        super().step(learning_rate)
koine.train.loop.Optimiser = Kept
model = mixture_model()
with torch.no_grad():
    for block in model.blocks:
        block.experts.router.weight.mul_(100.0)
settings = TrainSettings(dtype=dtype, threads=1, micro_batch_size=micro, clip_norm=0.0)
train(model, LanguageModelling(), padded(folder), settings, out=out, progress=False, device="cpu")
"""


def run(
    ranks: int, folder: Path, out: Path, dtype: str = "float32", stop: int = 0, worker: str = WORKER
) -> None:
    """Run all of a training, or until step `stop`, in `ranks` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", worker, str(folder), str(out), dtype, str(stop)],
                env={**os.environ, **variables},
                cwd=Path(__file__).parents[2],
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        _, errors = process.communicate(timeout=120)
        # A rank whose peer has gone may die of that first.
        assert (process.returncode != 0) == (bool(stop) and worker is WORKER), errors[-2000:]


def losses(out: Path) -> list[float]:
    return [
        json.loads(line)["loss"]
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if "loss" in line
    ]


def one_process(out: Path, dtype: Any) -> list[float]:
    """Return the losses of the same training in this process alone."""
    settings = TrainSettings(dtype=dtype, threads=1, learning_rate=1e-2, micro_batch_size=1)
    order: Any = fake_order(out / "s", steps=(8,))
    objective = LanguageModelling()
    train(small_model(), objective, order, settings, out=out / "o1", progress=False, device="cpu")
    return losses(out / "o1")


# float32: the sums of two ranks are added in another order. bfloat16: each rank rounds its own gradients;
# logits near 4 nats.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_same_losses_as_one_process(tmp_path: Path, dtype: str, tolerance: float) -> None:
    run(2, tmp_path / "s", tmp_path / "two", dtype)
    assert losses(tmp_path / "two") == pytest.approx(one_process(tmp_path, dtype), abs=tolerance)
    assert len(losses(tmp_path / "two")) == 8


def test_router_losses_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    """The router losses are those of the whole step, with one micro-batch a rank and with several.

    In float32 the sums differ only in their order.
    """
    import torch

    run(1, tmp_path / "s", tmp_path / "whole", worker=MIXTURE_WORKER)
    expected = torch.load(tmp_path / "whole" / "gradients.pt", weights_only=True)
    [first, *_] = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    for micro in (0, 1):
        out = tmp_path / f"two-{micro}"
        run(2, tmp_path / "s", out, stop=micro, worker=MIXTURE_WORKER)
        [found, *_] = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        for name in ("loss", "load_balancing_loss", "router_z_loss", "gradient_norm", "units"):
            assert found[name] == pytest.approx(first[name], rel=1e-5), name
        gradients = torch.load(out / "gradients.pt", weights_only=True)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            bound = 1e-5 * float(expected[name].abs().max())
            # FSDP gives the mean over the ranks, scaled back by their number.
            assert torch.allclose(gradient, expected[name], rtol=0, atol=bound), name


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_resumes_on_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    run(before, tmp_path / "s", tmp_path / "o", stop=5)
    assert (tmp_path / "o" / "checkpoints" / "step-000003").is_dir()
    run(after, tmp_path / "s", tmp_path / "o")
    assert losses(tmp_path / "o") == pytest.approx(one_process(tmp_path, "float32"), abs=1e-4)


FAKE_TRACKER = """
import os

class Run:
    def log(self, figures, step):
        self.say(f"{os.environ['RANK']} {step}")
    def finish(self):
        self.say(f"{os.environ['RANK']} end")
    def say(self, text):
        with open(os.environ["FAKE_TRACKER"], "a") as file:
            print(text, file=file)

def init(**given):
    return Run()
"""


def test_torchrun_with_an_evaluation(tmp_path: Path) -> None:
    """`torchrun ... -m koine train pretrain ...`, as the manual shows it, with an evaluation and a tracker."""
    from tests.train.tokens import write_tokens

    tokenizer, shards = write_tokens(tmp_path)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the river runs down to the sea", "language": "en"}\n')
    out = tmp_path / "model"
    words = [
        *("torchrun", "--nproc-per-node", 2, "-m", "koine", "train", "pretrain", "--data", shards["short"]),
        *("--tokenizer", tokenizer, "--preset", "koine-0.5m", "--steps", 3, "--batch-size", 2),
        *("--sequence-length", 16, "--device", "cpu", "--evaluate-every", 2, "--evaluate-data", text),
        *("--threads", 1, "--track", "trackio", "--out", out),
    ]
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/trackio.py").write_text(FAKE_TRACKER)
    python_path = os.pathsep.join([str(tmp_path / "fake"), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = Path(sys.executable).parent / "torchrun"
    done = subprocess.run(
        [str(program), *map(str, words[1:])],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": python_path,
            "FAKE_TRACKER": str(tmp_path / "said"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(out)) == 3
    # Only the first process talks to the tracker, and one record is written.
    assert (tmp_path / "said").read_text().split("\n") == ["0 0", "0 1", "0 1", "0 2", "0 2", "0 end", ""]
    assert "model.safetensors" in json.loads((out / "artifact.json").read_text())["files"]
    about = json.loads((out / "training.json").read_text())
    assert about["rounding"]["ranks"] == 2
    # Measured on the sharded model during training, and on the saved model afterwards.
    from koine.evaluate import evaluate_model

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "evaluation/bits_per_byte" in line][-1]
    again = evaluate_model(out, data=[text], dtype="bfloat16")["overall"]["bits_per_byte"]
    assert last["evaluation/bits_per_byte"] == pytest.approx(again, rel=0.02)
