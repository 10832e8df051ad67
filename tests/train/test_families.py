"""Training of families: one process and two with FSDP2 have the same losses, and each resumes exactly.

The families differ in what is sharded: two norms a block, norms of q and k, four norms with a unit offset, biases
and a plain feed-forward.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.model.families.cases import first_case

from .test_distributed import run

pytest.importorskip("transformers", reason="the checkpoints need the extra [hf]")

FAMILIES = ("llama", "qwen3", "gemma3_text", "starcoder2")
IN_BFLOAT16 = ("llama", "gemma3_text")
STEPS, STOPPED_AT = 5, 4

WORKER = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from tests.train.test_families import trainings
# One group for all trainings: a training leaves one that it did not start.
dist.init_process_group("gloo")
trainings(Path(sys.argv[1]), Path(sys.argv[2]))
dist.barrier()
dist.destroy_process_group()
"""


class StoppedError(Exception):
    """Ends a training between two checkpoints."""


def trainings(checkpoints: Path, out: Path) -> None:
    """Train each checkpoint without a stop, and with one and a resumption; some in bfloat16 too."""
    from koine.model import load_model
    from koine.train import LanguageModelling, TrainSettings, train

    from .fakes import fake_order

    settings = TrainSettings(
        dtype="float32",
        threads=1,
        learning_rate=1e-2,
        checkpoint_every=3,
        evaluate_every=1,
        micro_batch_size=1,
    )

    def one(model_type: str, name: str, stop: int, dtype: str = "float32") -> None:
        def evaluate(model: Any, done: int) -> dict[str, float]:
            if done == stop:
                raise StoppedError
            return {}

        order: Any = fake_order(out / "shards", steps=(STEPS,))
        train(
            load_model(checkpoints / model_type),
            LanguageModelling(),
            order,
            replace(settings, dtype=dtype),
            out=out / name / model_type,
            evaluate=evaluate,
            progress=False,
            device="cpu",
        )

    for model_type in FAMILIES:
        one(model_type, "whole", 0)
        try:
            one(model_type, "resumed", STOPPED_AT)
        except StoppedError:
            one(model_type, "resumed", 0)
        else:
            raise AssertionError("it was not stopped")
    for model_type in IN_BFLOAT16:
        one(model_type, "bfloat16", 0, "bfloat16")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return the folders of the trainings by the number of processes."""
    from tests.model.families.reference import write_checkpoint

    root = tmp_path_factory.mktemp("trainings")
    for model_type in FAMILIES:
        write_checkpoint(first_case(model_type), root / "given" / model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainings(root / "given", root / "1")
    run(2, root / "given", root / "2", worker=WORKER, timeout=600)
    return {1: root / "1", 2: root / "2"}


def losses(folder: Path) -> dict[int, float]:
    """Return the loss of each step; after a resumption that of the last time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_two_processes_have_the_losses_of_one(model_type: str, trained: dict[int, Path]) -> None:
    one, two = (losses(trained[ranks] / "whole" / model_type) for ranks in (1, 2))
    assert sorted(one) == list(range(STEPS))
    # The sums of two ranks are added in another order.
    assert two == pytest.approx(one, abs=1e-4)
    assert one[STEPS - 1] != one[0]


@pytest.mark.parametrize("model_type", IN_BFLOAT16)
def test_two_processes_have_the_losses_of_one_in_bfloat16(model_type: str, trained: dict[int, Path]) -> None:
    """Each rank rounds its own gradients. Losses fall from 5 nats to 4, and bfloat16 rounds to 0.4 %."""
    one, two = (losses(trained[ranks] / "bfloat16" / model_type) for ranks in (1, 2))
    assert sorted(one) == list(range(STEPS))
    # 0.016 was seen.
    assert two == pytest.approx(one, abs=0.04)
    in_float32 = losses(trained[1] / "whole" / model_type)
    assert one != in_float32
    assert one == pytest.approx(in_float32, abs=0.2)
    assert one[STEPS - 2] < one[0] - 0.5


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_resuming_is_exact(model_type: str, ranks: int, trained: dict[int, Path]) -> None:
    whole, resumed = (trained[ranks] / name / model_type for name in ("whole", "resumed"))
    assert losses(resumed) == losses(whole)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    kinds = [json.loads((folder / "config.json").read_text())["model_type"] for folder in (whole, resumed)]
    assert kinds == [model_type, model_type]
