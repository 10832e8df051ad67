"""The steps of preference training: groups, the reference's cache, and a training with a monitor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.align import reference
from koine.align.behaviour_table import read_table
from koine.data import tokenize
from koine.errors import UserError
from koine.files import read_json
from koine.model import load_model
from koine.plan.report.blocks import read_step_report
from koine.plan.step import PlannedInput
from koine.steps import checks
from koine.steps.alignment import MonitorSettings, align_model, cache_reference, tokenize_groups
from koine.steps.text_mixture import TextMixture, TextSource
from koine.steps.training import training_settings
from tests.align import policies
from tests.align.test_watch import records, write

MIXTURE = TextMixture(
    sources=(TextSource(name="pairs"),), steps=4, sequence_length=128, batch_size=4, packing="one_per_row"
)
SETTINGS = training_settings(steps=4, learning_rate=3e-3, dtype="float32", evaluate_every=2)
MONITOR = MonitorSettings(limit=2, max_new_tokens=6)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its pairs, their tokens and the reference's log-probabilities."""
    root = tmp_path_factory.mktemp("alignment")
    for name in ("pairs", "start"):
        (root / name).mkdir()
    tokenizer = policies.save_tokenizer(root / "tokenizer")
    policies.policy().save(root / "model", tokenizer=tokenizer)
    write(root / "pairs.jsonl", records(24))
    tokenize_groups(root / "pairs.jsonl", root / "model", out=root / "pairs")
    cache_reference(root / "model", {"pairs": root / "pairs"}, mixture=MIXTURE, out=root / "start")
    return root


def align(place: Path, out: Path, **fields: Any) -> Path:
    out.mkdir()
    given: dict[str, Any] = {"loss": "dpo:beta=0.1", "mixture": MIXTURE, "settings": SETTINGS, **fields}
    cache = given.pop("cache", place / "start")
    pairs = given.pop("pairs", place / "pairs.jsonl")
    align_model(place / "model", {"pairs": place / "pairs"}, cache=cache, pairs=pairs, out=out, **given)
    return out


def test_tokens_are_those_of_the_command(place: Path, tmp_path: Path) -> None:
    tokenize(place / "pairs.jsonl", place / "model", out=tmp_path / "tokens", kind="preferences", split="all")
    for path in (tmp_path / "tokens").rglob("*"):
        assert (place / "pairs" / "tokens" / path.name).read_bytes() == path.read_bytes()


def test_a_training_with_a_monitor(place: Path, tmp_path: Path) -> None:
    out = align(place, tmp_path / "out", monitor=MONITOR)
    table = read_table(out / "metrics-behaviour.jsonl")
    assert [row["step"] for row in table] == [2, 4]
    assert table[0]["overall"]["margin"] != table[1]["overall"]["margin"]
    assert read_json(out / "verdict.json")["state"] == "none"
    titles = [block.get("title") for block in read_step_report(out / "report.json").blocks]
    assert "Is it over-optimised?" in titles
    assert read_json(out / "metrics.json")["loss"] < 1.0
    moved = load_model(out).state_dict()
    assert any(
        not torch.equal(moved[name], one) for name, one in load_model(place / "model").state_dict().items()
    )


def test_a_complete_cache_is_only_read(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(*_: Any, **__: Any) -> None:
        raise AssertionError("the cache is written to")

    for name in ("exclusive", "write_atomically", "write_json", "make_folder"):
        monkeypatch.setattr(reference, name, written)
    align(place, tmp_path / "out")


def test_a_stop_rule_ends_the_training(place: Path, tmp_path: Path) -> None:
    out = align(place, tmp_path / "out", monitor=MONITOR, stop_on="kl=0")
    assert len(read_table(out / "metrics-behaviour.jsonl")) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "dpo:beta=-1"}, "beta"),
        ({"loss": "dopo"}, "dopo"),
        ({"mixture": replace(MIXTURE, packing="concat")}, "packed by concat"),
        ({"mixture": replace(MIXTURE, sequence_length=2**20)}, "rows have 1048576 tokens"),
        ({"pairs": None, "monitor": MONITOR}, "neither pairs nor prompts"),
        ({"settings": replace(SETTINGS, evaluate_every=0), "monitor": MONITOR}, "nothing is measured"),
        ({"stop_on": "kl=1"}, "no monitor"),
    ],
)
def test_what_the_check_refuses(place: Path, fields: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"loss": "dpo", "mixture": MIXTURE, "settings": SETTINGS, **fields}
    model, tokens = (PlannedInput(place / name, exists=True) for name in ("model", "pairs"))
    with pytest.raises(UserError, match=message):
        checks.alignment(model, {"pairs": tokens}, **given)
