"""The long-context suite and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from koine.cli.main import cli
from koine.errors import KoineWarning, UserError
from koine.evaluate.long_context import LongContextOptions, evaluate_long_context
from koine.evaluate.long_context.haystack import (
    sample_texts,
)
from koine.evaluate.long_context.report import facts, sections, task_rows
from koine.evaluate.long_context.tasks import TASKS


def test_the_suite_is_deterministic_and_its_prompts_are_independent(model_folder: Path) -> None:
    settings: dict[str, Any] = {"lengths": [256, 400], "depths": [0, 100], "samples": 2, "language": "de"}
    options = LongContextOptions(**settings, documents=3)
    result = evaluate_long_context(model_folder, options)
    again = evaluate_long_context(
        model_folder, replace(options, tasks=["multi-key", "positions", "attention"])
    )
    json.dumps(result)
    assert again["tasks"]["multi-key"] == result["tasks"]["multi-key"]
    assert again["positions"] == result["positions"]
    assert again["attention"] == result["attention"]
    assert {one["task"] for one in result["left_out"]} <= set(TASKS)
    left_out = {(one["task"], one["length"]) for one in result["left_out"]}
    entries = {
        (task, int(length)): entry
        for task, lengths in result["tasks"].items()
        for length, entry in lengths.items()
    }
    assert set(entries) == {(task, length) for task in TASKS for length in (256, 400)}
    assert {cell for cell, entry in entries.items() if entry["value"] is None} == left_out
    for cell, entry in entries.items():
        if cell in left_out:
            assert (entry["samples"], entry["logprob"]) == (0, None)
            assert "no room" in entry["why"]
        else:
            assert entry["samples"] == 4
            assert entry["logprob"] < -1.0
    grid = result["grid"]["single"]
    assert (len(grid["score"]), len(grid["score"][0])) == (2, 2)
    mean = sum(row[0] for row in grid["logprob"]) / 2
    assert mean == pytest.approx(result["tasks"]["single"]["256"]["logprob"])
    assert [one["kind"] for one in result["attention"]["400"]["layers"]] == ["sliding RoPE"] * 3 + [
        "full NoPE"
    ]
    other = evaluate_long_context(model_folder, replace(options, tasks=["single"], seed=1))
    assert other["tasks"]["single"] != result["tasks"]["single"]


def test_a_named_task_is_left_out_where_a_length_has_no_room(model_folder: Path, tmp_path: Path) -> None:
    """A warning comes before any prompt runs, the result has the reason, and other lengths are measured."""
    tasks = ["single", "multi-needle", "attention"]
    options = LongContextOptions(lengths=[40, 256, 600], depths=[50], samples=1, language="de", tasks=tasks)
    with pytest.warns(KoineWarning, match="left out at") as warned:
        result = evaluate_long_context(model_folder, options)
    found = result["tasks"]["multi-needle"]
    assert list(found) == ["40", "256", "600"]
    for length in ("40", "256"):
        assert found[length]["value"] is None
        assert f"a prompt of {length} tokens has no room for the task 'multi-needle'" in found[length]["why"]
    assert found["600"]["samples"] == 1
    assert set(result["attention"]) == {"256", "600"}
    assert len(warned) == len(result["left_out"]) == 4
    assert {row[1] for row in task_rows(result) if row[0] == "multi-needle"} == {"600"}
    json.dumps([sections(result), facts(result)])


def test_the_command_writes_json_and_a_page(model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(" ".join(sample_texts("de"))[:60_000], encoding="utf-8")
    out, page = tmp_path / "long.json", tmp_path / "long.html"
    run = CliRunner().invoke(
        cli,
        [
            *("evaluate", str(model_folder), "--suite", "long", "--lengths", "160,320"),
            *("--depths", "0,50,100%"),
            *("--samples", "1", "--language", "de", "--haystack", str(text), "--out", str(out)),
            *("--page", str(page)),
        ],
    )
    assert run.exit_code == 0, run.output
    result = json.loads(out.read_text())
    assert result["settings"]["depths"] == [0.0, 50.0, 100.0]
    assert result["settings"]["haystack"]["source"] == str(text)
    assert not result["positions"]["joined"]
    html = page.read_text(encoding="utf-8")
    for title in ("Needle in a haystack", "Score by length", "Loss by position", "Attention mass by layer"):
        assert title in html
    assert "Long-context tasks" in run.output
    assert "NoPE (1)" in run.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tasks sinlge", "unknown task 'sinlge'; did you mean 'single'?"),
        ("--lengths 40 --tasks single", "has no room for the task 'single'"),
        ("--lengths 2048", "beyond the 1024 positions of the model"),
        ("--lengths 512,x", "'x' is no number"),
        ("--lengths 3", "16 or more"),
        ("--depths 120", "from 0"),
        ("--samples 0", "at least 1"),
        ("--haystack nowhere.txt", "nowhere.txt: no such file or folder"),
        ("--qa nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
        ("--language xx", "unknown language 'xx'"),
        ("--language sw --tasks question-answering", "no questions in the language 'sw'"),
        ("--data here", "--data is not an option of the suite long"),
        ("--max-bad 0.01", "--max-bad is not an option of the suite long"),
        ("--page nowhere/page.html", "no such folder"),
    ],
)
def test_mistakes_are_one_line(model_folder: Path, tmp_path: Path, options: str, message: str) -> None:
    run = CliRunner().invoke(cli, ["evaluate", str(model_folder), "--suite", "long", *options.split()])
    error = run.exception
    assert isinstance(error, UserError), run.output
    assert message in str(error)
    assert "\n" not in str(error)


def test_options_of_the_suite_need_the_suite(model_folder: Path) -> None:
    run = CliRunner().invoke(cli, ["evaluate", str(model_folder), "--lengths", "512"])
    assert isinstance(run.exception, UserError)
    assert "add --suite long" in str(run.exception)
