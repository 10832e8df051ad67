"""The first lines of a chat: as before for a model that says nothing of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from koine.data import Mixture, Phase, Source
from koine.evaluate.example_questions import FILE, Example, Examples
from koine.serve.chat.opening import Opening, read_opening, trained_context

DESCRIBED = "runs/x/model: 1.8M parameters, float32 on cpu, 2,048 tokens of context"


def test_a_model_without_a_record_opens_with_one_line(tmp_path: Path) -> None:
    assert read_opening(tmp_path).lines(DESCRIBED, 2048) == [f"{DESCRIBED}; /help lists the commands"]


def test_examples_and_the_trained_context_stand_below_the_model(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"mixture": {"sequence_length": 256, "phases": []}}))
    Examples(960, 512, (Example("Welche Währung hat Japan?", "Yen", "de", "currency", 0.9),)).save(tmp_path)
    opening = read_opening(tmp_path)
    assert opening.lines(DESCRIBED, 2048) == [
        DESCRIBED,
        "It was trained on 256 tokens at a time; longer chats get worse answers.",
        "It answered 512 of 960 questions right in its evaluation, such as:",
        "  Welche Währung hat Japan?",
        "/help lists the commands.",
    ]
    assert "It was trained on 256 tokens at a time." in opening.lines(DESCRIBED, 256)


def test_no_line_is_cut_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = Opening(trained_context=32_768).lines(f"a/long/way/to/the/{DESCRIBED}", 131_072)
    assert all(len(line) <= 80 for line in lines)


def test_a_damaged_file_of_examples_is_named_and_the_chat_opens(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    lines = read_opening(tmp_path).lines(DESCRIBED, 2048)
    assert lines[0].startswith(DESCRIBED)
    assert "no example questions" in lines[1]
    assert FILE in lines[1]


@pytest.mark.parametrize(
    ("training", "length"),
    [
        (None, None),
        ([], None),
        ({"epochs": 3}, None),
        ({"mixture": "another program's"}, None),
        ({"mixture": {"sequence_length": "long"}}, None),
        ({"mixture": {"sequence_length": 256, "phases": "none"}}, 256),
        ({"mixture": {"sequence_length": 256, "phases": [{"sequence_length": 512}, {}]}}, 512),
        (
            {
                "mixture": {
                    "sequence_length": 256,
                    "phases": [{"long": {"sequence_length": 4096}}, {"long": None}],
                }
            },
            4096,
        ),
    ],
)
def test_the_longest_rows_of_a_training_count(training: Any, length: int | None) -> None:
    assert trained_context(training) == length


def test_the_record_of_a_training_has_this_form() -> None:
    """What `training.json` holds is the mixture's own JSON."""
    sources = (Source(name="text", path=Path("tokens"), proportion=1.0),)
    phases = (
        Phase(name="first", steps=1, sources=sources),
        Phase(name="second", steps=1, sources=sources, sequence_length=96),
    )
    mixture = Mixture(phases=phases, sequence_length=64, batch_size=1)
    assert trained_context({"mixture": mixture.to_json()}) == 96
