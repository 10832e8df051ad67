"""The step that trains a reward model, called as a function and in a plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from koine.errors import UserError
from koine.model.decoder import Decoder
from koine.model.formats.directory import save_model
from koine.model.reward_model import load_reward_model
from koine.plan.report.blocks import read_step_report
from koine.plan.step import PlannedInput
from koine.steps import checks
from koine.steps.rewards import train_reward_model
from koine.steps.training import training_settings
from tests.align.pairs import pair_records, write_pairs, write_tokenizer
from tests.train.models import small_config

pytestmark = pytest.mark.filterwarnings("ignore:these documents are repeated")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tokenizer = write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    save_model(Decoder(small_config(350)), folder / "model", tokenizer=tokenizer)
    write_pairs(folder / "pairs", tokenizer)
    write_pairs(folder / "held-out", tokenizer, pair_records(8, seed=3))
    return folder


def test_two_stages(world: Path, tmp_path: Path) -> None:
    start = world / "model"
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        train_reward_model(
            start,
            world / "pairs",
            world / "held-out",
            settings=training_settings(steps=3, learning_rate=1e-3, dtype="float32", evaluate_every=3),
            steps=3,
            batch_size=2,
            sequence_length=96,
            out=out,
        )
        metrics = json.loads((out / "metrics.json").read_text())
        found = json.loads((out / "reward_evaluation.json").read_text())
        assert found["overall"]["pairs"] == 8
        assert metrics["pair_loss"] == pytest.approx(found["overall"]["loss"])
        assert metrics["pair_accuracy/de"] == found["languages"]["de"]["accuracy"]
        assert len(read_step_report(out / "report.json").blocks) == 2
        start = out
    first, second = (load_reward_model(tmp_path / name) for name in ("first", "second"))
    assert not torch.equal(first.score.weight, second.score.weight)
    # The second stage goes on from the first one's head: three small steps away.
    assert float((first.score.weight - second.score.weight).detach().norm()) < 0.1


def test_checks_before_a_run(world: Path) -> None:
    model, pairs = PlannedInput(world / "model", True), PlannedInput(world / "pairs", True)
    settings = training_settings(steps=3, learning_rate=1e-3)
    checks.reward_training(model, pairs, settings=settings, steps=3)
    with pytest.raises(UserError, match="holds no token shards"):
        checks.reward_training(model, PlannedInput(world / "tokenizer", True), settings=settings, steps=3)
    with pytest.raises(UserError, match="holds no model"):
        checks.reward_training(pairs, pairs, settings=settings, steps=3)
    evaluated = training_settings(steps=3, learning_rate=1e-3, evaluate_every=1)
    with pytest.raises(UserError, match="without held-out pairs"):
        checks.reward_training(model, pairs, settings=evaluated, steps=3)
