"""Answers are valid JSON, whatever their values hold."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest

from koine.cli.answers import json_answer, json_text, print_answer


@dataclass(frozen=True)
class Pair:
    name: str
    where: Path


class Size(NamedTuple):
    rows: int


@pytest.mark.parametrize(
    ("value", "means"),
    [
        (1 / 3, 1 / 3),
        (2**70, 2**70),
        (math.nan, None),
        (-math.inf, None),
        (True, True),
        ((1, (2,)), [1, [2]]),
        (frozenset({"b", "a"}), ["a", "b"]),
        ({1: Path("a/b")}, {"1": "a/b"}),
        (Pair("x", Path("y")), {"name": "x", "where": "y"}),
        (Size(3), {"rows": 3}),
        (np.float64(0.1), 0.1),
        (np.int64(7), 7),
        ('日本 \x1b[31m \u202e \ud800 "q"\n', '日本 \x1b[31m \u202e \ud800 "q"\n'),
    ],
)
@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_value_is_the_same_after_parsing(value: Any, means: Any, ascii_only: bool) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = json_text(value, ascii_only=ascii_only)
    assert json.loads(text, parse_constant=refuse) == means
    assert text.isascii() or not ascii_only


def test_text_of_other_languages_is_readable_and_escape_sequences_are_not_sent() -> None:
    assert json_text("日本\x1b\x9b\u202e") == '"日本\\u001b\\u009b\\u202e"'


def test_a_value_without_a_form_in_json_is_a_bug() -> None:
    with pytest.raises(TypeError, match="object has no form in JSON"):
        json_text(object())


def test_an_output_that_is_not_utf_8_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    with click.Context(click.Command("x")) as context, json_answer(context):
        print_answer({"a": "日ä"}, lambda: None)
    assert json.loads(raw.getvalue().decode("ascii")) == {"a": "日ä"}


def test_without_json_the_text_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_answer({"a": 1}, lambda: print("one"))
    assert capsys.readouterr().out == "one\n"
