"""The shell completes commands, options, recipes, merge methods, languages, presets and file names."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from koine.cli.main import cli


def completions(*words: str) -> list[str]:
    """What the shell offers for the last word; `<file>` and `<folder>` stand for the shell's own names."""
    found = ShellComplete(cli, {}, "koine", "_KOINE_COMPLETE").get_completions(list(words[:-1]), words[-1])
    names = {"file": "<file>", "dir": "<folder>"}
    return [names.get(item.type, item.value) for item in found]


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        (["tok"], ["tokenizer"]),
        (["merge", "task"], ["task-arithmetic"]),
        (["run", "quick"], ["quickstart"]),
        (["run", "my/plan.py"], ["<file>"]),
        (["data", "tokenize", "x"], ["<file>"]),
        (["merge", "linear", "m"], ["<file>"]),
        (["merge", "ties", "m", "--base", "b"], ["<file>"]),
        (["chat", "owner/na"], ["<file>"]),
        (["data", "tokenize", "x", "--tokenizer", "t"], ["<file>"]),
        (["data", "tokenize", "x", "--out", "t"], ["<folder>"]),
        (["data", "inspect", "x", "--format", "alp"], ["alpaca"]),
        (["train", "sft", "--mixture", "m"], ["<file>"]),
        (["train", "sft", "--track", "ml"], ["mlflow"]),
        (["evaluate", "m", "--training-questions", "x"], ["<file>"]),
        (["merge", "search", "--method", "sl"], ["slerp"]),
        (["train", "pretrain", "--packing", "no"], ["no_split"]),
        (["train", "pretrain", "--packi"], ["--packing"]),
        (["train", "pretrain", "--preset", "koine-8"], ["koine-8m", "koine-8b"]),
        (["train", "pretrain", "--data", "tok"], ["<file>"]),
        (["evaluate", "m", "--data", "x"], ["<file>"]),
        (["evaluate", "m", "--language", "zh-H"], ["zh-Hant"]),
        (["tokenizer", "weights", "--languages", "de,zh-H"], ["de,zh-Hant"]),
        (["data", "sample", "--languages", "deu"], []),
        (["doctor", "--config", "k"], ["<file>"]),
        (["chat", "m", "--device", "cu"], ["cuda"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
)
def test_a_word_is_completed(words: list[str], offers: list[str]) -> None:
    assert completions(*words) == offers


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("bash", "complete -o nosort -F"),
        ("zsh", "#compdef koine"),
        ("fish", "complete --no-files --command koine"),
    ],
)
def test_the_script_of_a_shell_is_printed(shell: str, line: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell], prog_name="koine", catch_exceptions=False)
    assert line in result.output
    assert f"_KOINE_COMPLETE={shell}_complete" in result.output


def test_the_command_answers_the_script() -> None:
    """As the script for bash asks."""
    process = subprocess.run(
        [sys.executable, "-m", "koine"],
        env=os.environ
        | {"_KOINE_COMPLETE": "bash_complete", "COMP_WORDS": "koine merge dare", "COMP_CWORD": "2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert process.stdout.splitlines() == ["plain,dare-linear", "plain,dare-ties"]


def test_fish_keeps_the_commas_of_a_value() -> None:
    result = CliRunner().invoke(cli, ["completion", "fish"], prog_name="koine", catch_exceptions=False)
    assert 'string split --max 1 "," $completion' in result.output
    assert 'string split "," ' not in result.output
