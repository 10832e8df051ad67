"""`koine align train`: losses fall, a start without a difference, kills, and two processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from koine.cli.main import cli
from koine.errors import UserError
from tests.train.test_distributed import run

from .worlds import AlignWorld, write_model, write_world

STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AlignWorld:
    return write_world(tmp_path_factory.mktemp("world"), ("preferences", "revised", "scored", "labelled"))


def koine(*words: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, words)), prog_name="koine")


def align(world: AlignWorld, out: Path, loss: str, kind: str = "preferences", *more: object) -> Result:
    return koine(
        *("align", "train", "--model", world.model, "--data", world.tokens[kind], "--loss", loss),
        *("--steps", STEPS, "--batch-size", 4, "--sequence-length", 128, "--learning-rate", "1e-2"),
        *("--dtype", "float32", "--device", "cpu", "--threads", 1, "--warmup-steps", 0, "--quiet"),
        *("--reference-cache", world.root / "cache", "--out", out, *more),
    )


def figures(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


LN2 = math.log(2)
# loss -> kind of groups, and the loss of the first step, where the policy is the reference.
LOSSES: dict[str, tuple[str, float | None]] = {
    "dpo:beta=0.1": ("preferences", LN2),
    "ipo:tau=0.1": ("preferences", 0.25),
    "slic+nll:weight=0.2": ("preferences", None),
    "srpo": ("revised", 0.25),
    "dpo:beta=0.1+nll:weight=0.2": ("preferences", None),
}


@pytest.mark.filterwarnings("ignore::koine.errors.KoineWarning")
@pytest.mark.parametrize("loss", LOSSES)
def test_training_prefers_the_chosen_answer_more(world: AlignWorld, tmp_path: Path, loss: str) -> None:
    kind, first = LOSSES[loss]
    done = align(world, tmp_path / "out", loss, kind)
    assert done.exit_code == 0, done.output
    steps = figures(tmp_path / "out")
    assert len(steps) == STEPS
    if first is not None:
        # The reference's log-probabilities come from other rows, so the last digits differ.
        assert steps[0]["loss"] == pytest.approx(first, abs=1e-5)
        assert steps[0]["margin"] == pytest.approx(0, abs=1e-4)
    margins = [one["log_probability_chosen"] - one["log_probability_rejected"] for one in steps]
    assert margins[-1] > margins[0]
    assert steps[-1]["loss"] < steps[0]["loss"]
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert loss.split(":")[0].split("+")[0] in json.dumps(record["identity"]["objective"])


@pytest.mark.filterwarnings("ignore::koine.errors.KoineWarning")
def test_units_are_groups(world: AlignWorld, tmp_path: Path) -> None:
    from koine.data import PreferenceOrder

    done = align(world, tmp_path / "out", "dpo:beta=0.1")
    assert done.exit_code == 0, done.output
    order = PreferenceOrder(world.mixture(steps=STEPS))
    expected = [len(order.batch(step).groups) for step in range(STEPS)]
    assert [one["units"] for one in figures(tmp_path / "out")] == expected


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("scored", (), "holds scored groups, and the loss"),
        ("preferences", ("--packing", "concat"), "groups cannot be packed by concat"),
        ("preferences", ("--reference", "nowhere"), "no such model directory"),
    ],
)
def test_refusals_write_nothing(
    world: AlignWorld, tmp_path: Path, kind: str, more: tuple[str, ...], message: str
) -> None:
    """Others are bad inputs of the page (`tests.bad_inputs.cases_groups`)."""
    done = align(world, tmp_path / "out", "dpo:beta=0.1", kind, *more)
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::koine.errors.KoineWarning")
def test_a_reference_of_its_own(world: AlignWorld, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", world.root / "tokenizer", seed=3)
    done = align(world, tmp_path / "out", "dpo:beta=0.1", "preferences", "--reference", other)
    assert done.exit_code == 0, done.output
    first = figures(tmp_path / "out")[0]
    assert abs(first["margin"]) > 1e-2
    assert first["loss"] != pytest.approx(LN2, abs=1e-4)


# One life of a training: the reference is computed into a cache of the round, then the training runs.
COMMON = """
import os, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from koine.align import PreferenceObjective, LossSpec, reference_log_probabilities
from koine.data import PreferenceOrder
from koine.model import load_model
from koine.terminal import quiet_output
from koine.train import TrainSettings, train
from tests.data.groups import mixture_of

def training(folder, out, cache, **more):
    order = PreferenceOrder(mixture_of(folder / "preferences" / "preferences-tokens", steps=8, time=128))
    settings = TrainSettings(
        dtype="float32", threads=1, learning_rate=1e-2, checkpoint_every=3, micro_batch_size=1, **more
    )
    with quiet_output():
        reference = reference_log_probabilities(load_model(folder / "model"), order, cache=cache)
        objective = PreferenceObjective(LossSpec.parse("dpo:beta=0.1+nll:weight=0.2"), reference)
        train(load_model(folder / "model"), objective, order, settings, out=out, progress=False, device="cpu")
"""

KILLED = (
    COMMON
    + """
import torch.distributed.checkpoint, torch.optim.adamw, torch._dynamo, koine.train.loop, tensorboardX
import koine.model.formats.directory, koine.align.reference, pyarrow.parquet
import koine.align.reference as reference_module
from tests.kills import kill_and_repeat
reference_module.GROUPS_OF_FILE = 6
folder, work = Path(sys.argv[1]), Path(sys.argv[2])

def run(out):
    training(folder, out, out.with_name(f"{out.name}-cache"))

kill_and_repeat(run, work, kills=8, seed=3, files=["model.safetensors"])
"""
)

WORKER = (
    COMMON
    + """
training(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[2]).with_suffix(".cache"))
"""
)


def test_bit_identical_after_kills(world: AlignWorld, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(world.root), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_have_the_curve_of_one(world: AlignWorld, tmp_path: Path) -> None:
    """Both compute the reference into one cache: the second waits for the first."""
    for ranks in (1, 2):
        run(ranks, world.root, tmp_path / str(ranks), worker=WORKER, timeout=300)
    one, two = (figures(tmp_path / str(ranks)) for ranks in (1, 2))
    assert len(one) == 8
    names = ("loss", "units", "gradient_norm", "margin", "accuracy", "log_probability_chosen", "dpo_loss")
    for before, after in zip(one, two, strict=True):
        for name in names:
            # The sums of two ranks are added in another order.
            assert after[name] == pytest.approx(before[name], abs=1e-4, rel=1e-4), name


def values(done: Result) -> Any:
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.filterwarnings("ignore::koine.errors.KoineWarning")
@pytest.mark.parametrize(
    ("kind", "loss"), [("preferences", "dpo:beta=0.1"), ("revised", "srpo"), ("scored", "rloo")]
)
def test_at_step_shows_the_groups(world: AlignWorld, tmp_path: Path, kind: str, loss: str) -> None:
    from koine.data import PreferenceOrder
    from tests.data.conftest import document
    from tests.data.groups import REVISION

    # Long enough for whole groups with revisions.
    done = align(world, tmp_path / "out", loss, kind, "--sequence-length", 256)
    assert done.exit_code == 0, done.output
    told = values(koine("data", "at-step", tmp_path / "out", 2, "--json"))["slices"]
    batch = PreferenceOrder(world.mixture(kind, steps=STEPS, time=256)).batch(2)
    assert [one["record_id"] for one in told] == [group.record_id for group in batch.groups]
    for one, group in zip(told, batch.groups, strict=True):
        number = int(group.record_id.removeprefix("pair").removeprefix("scored"))
        assert one["kind"] == group.kind
        texts = [completion["text"].strip() for completion in one["completions"]]
        if kind == "scored":
            assert one["scores"] == list(group.scores)
            assert texts == [document(number + 100 * place, 2 + place) for place in range(1, len(texts) + 1)]
            continue
        assert document(number, 3 + number % 5) in one["prompt"]
        chosen, rejected = document(number + 100, 2 + number % 7), document(number + 200, 2 + number % 3)
        assert texts == [chosen, rejected] * (len(texts) // 2)
        assert one["probability"] == 1.0
        if kind == "revised":
            assert len(texts) == 6
            assert [REVISION in completion.get("after", "") for completion in one["completions"]] == [
                False, False, True, True, True, True
            ]  # fmt: skip
            assert chosen in one["completions"][2]["after"]
            assert rejected in one["completions"][4]["after"]
    shown = koine("data", "at-step", tmp_path / "out", 2)
    assert shown.exit_code == 0
    assert ("score 0.5:" if kind == "scored" else "rejected:") in shown.output
