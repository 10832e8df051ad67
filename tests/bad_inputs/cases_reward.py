"""Bad inputs of rewards: specifications, records, judges, the sandbox."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import worlds
from .case import Case

SCORE = "align score completions.jsonl --out scored.jsonl --reward"
TESTS = [f"assert f({x}) == {x}" for x in range(4)]
PROGRAM = "```python\ndef f(x): return x\n```"


def rows(**fields: Any) -> Any:
    """Write one completion to completions.jsonl, with more fields or others."""
    row = {"prompt": "Say 4.", "completion": "4", **fields}
    return lambda folder: worlds.write_lines(folder / "completions.jsonl", [row])


def with_module(folder: Path) -> None:
    rows()(folder)
    (folder / "mine_that_gives_nan.py").write_text(
        "def reward(conversation, completion, record):\n    return float('nan')\n"
    )


def without_bytecode(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def without_bwrap(monkeypatch: Any) -> None:
    from koine.align.sandbox import bubblewrap, sandbox

    sandbox._probe.cache_clear()
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)


CASES = (
    Case(
        mistake="a reward with a typo",
        command=f"{SCORE} langage",
        prepare=rows(),
        says="reward 'langage': unknown reward 'langage'; did you mean 'language'? A function of your own is `module:function`",
    ),
    Case(
        mistake="a setting that the reward does not have",
        command=f"{SCORE} length:longest=3",
        prepare=rows(),
        says="reward 'length:longest=3': the reward 'length' has no setting 'longest'; did you mean 'least' or 'most'?",
    ),
    Case(
        mistake="a reward without a setting that it needs",
        command=f"{SCORE} 0.5*length",
        prepare=rows(),
        says="reward '0.5*length': the reward 'length' needs the setting 'most'; for example length:most=20",
    ),
    Case(
        mistake="a weight that is no number",
        command=f"{SCORE} much*answer",
        prepare=rows(),
        says="reward 'much*answer': 'much*answer' is no reward; write [WEIGHT*]NAME[:KEY=VALUE,...]",
    ),
    Case(
        mistake="a module of one's own that is not there",
        command=f"{SCORE} mine:polite",
        prepare=rows(),
        says="the module 'mine' of the reward 'mine:polite' cannot be imported (ModuleNotFoundError: No module named 'mine'); start in the folder of the module, or set PYTHONPATH",
    ),
    Case(
        mistake="scores that are all NaN",
        command=f"{SCORE} mine_that_gives_nan:reward",
        prepare=with_module,
        during=without_bytecode,
        says="the reward scored none of 1 completions; the most frequent reason (1 times): the reward is not finite",
    ),
    Case(
        mistake="a record without the answer that the reward compares with",
        command=f"{SCORE} answer",
        prepare=rows(),
        says="completions.jsonl, line 1: the record's answer is None; add a field `answer` with text",
    ),
    Case(
        mistake="a record without a language",
        command=f"{SCORE} language",
        prepare=rows(),
        says="completions.jsonl, line 1: the record's language is None; add a field `language` with a code, such as de",
    ),
    Case(
        mistake="a row without a prompt",
        command=f"{SCORE} length:most=3",
        prepare=rows(prompt=""),
        says="completions.jsonl, line 1: the prompt is ''; give text, or messages with role and content",
    ),
    Case(
        mistake="a row with neither completion nor completions",
        command=f"{SCORE} length:most=3",
        prepare=lambda folder: worlds.write_lines(folder / "completions.jsonl", [{"prompt": "Hi"}]),
        says="completions.jsonl, line 1: must have either 'completion' or 'completions'",
    ),
    Case(
        mistake="fewer than four unit tests",
        command=f"{SCORE} unit-tests",
        prepare=rows(completion=PROGRAM, tests=TESTS[:3]),
        says="completions.jsonl, line 1: the record has 3 tests; give at least 4, or leave the record out: fewer are passed by chance",
    ),
    Case(
        mistake="a unit test that is no comparison with a literal",
        command=f"{SCORE} unit-tests",
        prepare=rows(completion=PROGRAM, tests=[*TESTS, "assert f(1) == g(1)"]),
        says="completions.jsonl, line 1: 'assert f(1) == g(1)' is not `assert EXPRESSION == LITERAL`; the right side stays outside of the sandbox, so it must be a literal: numbers, strings, booleans, None, lists, tuples, sets, dictionaries",
    ),
    Case(
        mistake="unit tests without bubblewrap",
        command=f"{SCORE} unit-tests",
        prepare=rows(completion=PROGRAM, tests=TESTS),
        during=without_bwrap,
        simulated="the program is hidden",
        says="completions.jsonl, line 1: the sandbox for unit tests needs 'bwrap' (bubblewrap); install it, for example: apt-get install bubblewrap",
    ),
    Case(
        mistake="the reward `judge` without a judge",
        command=f"{SCORE} judge",
        prepare=rows(),
        says="--reward: the reward 'judge' needs a model; give --judge MODEL",
    ),
    Case(
        mistake="a judge that never sees the answer",
        command=f"{SCORE} judge --judge model --judge-template template.txt",
        prepare=worlds.both(
            worlds.having("model"),
            worlds.both(rows(), worlds.written("template.txt", "{conversation} Mark: 5")),
        ),
        says="the judge's template has no {answer}; a judge must see it",
    ),
)
