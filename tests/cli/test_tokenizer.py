"""What `koine tokenizer` shows: at 80 columns and through a pipe, with every language that was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from koine.cli.tokenizer.commands import tokenizer
from koine.cli.tokenizer.tables import show_measures
from koine.errors import KoineWarning, UserError
from koine.tokenizer import load_tokenizer
from koine.tokenizer.holdout import split_texts
from tests.bad_inputs.worlds import build_tokenizer

GERMAN = [f"Der Fluss {i} fließt zum weiten Meer." for i in range(60)]
KOREAN = [f"서울은 대한민국의 수도이다. {i}" for i in range(60)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    build_tokenizer(tmp_path / "one")
    rows = [
        {"id": str(i), "text": {"en": f"The sea {i}.", "de": f"Das Meer {i}.", "th": f"ทะเล {i}"}}
        for i in range(5)
    ]
    write(tmp_path / "parallel.jsonl", rows)
    texts = [("de", text) for text in GERMAN] + [("ko", text) for text in KOREAN]
    write(tmp_path / "text.jsonl", [{"language": code, "text": text} for code, text in texts])
    return tmp_path


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")


def run(*words: str) -> Result:
    return CliRunner().invoke(tokenizer, list(words))


def test_english_is_the_reference_of_parity_though_it_is_not_asked_for(folder: Path) -> None:
    done = run("measure", "one", "--data", "parallel.jsonl", "--languages", "de,th", "--out", "m.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((folder / "m.json").read_text(encoding="utf-8"))["one"]
    assert {"de", "th"} == {code for code in rows if len(code) == 2}
    assert rows["de"]["parity"] > 1.0
    assert rows["overall"]["languages"] == 2
    assert "bytes per token (parity with English)" in done.output


@pytest.mark.parametrize("languages", ["de,sw", "sw"])
def test_a_language_without_text_is_named(folder: Path, languages: str) -> None:
    done = run("measure", "one", "--data", "parallel.jsonl", "--languages", languages)
    assert isinstance(done.exception, UserError)
    assert "no text of language 'sw'; known: de, en, th" in str(done.exception)


def test_a_primary_language_without_text_is_named(folder: Path) -> None:
    done = run("predict", "one", "--data", "parallel.jsonl", "--primary", "en,pl")
    assert "no text of the primary language 'pl'" in str(done.exception)


def test_three_tokenizers_fit_in_80_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "bytes_per_token": 3.5,
        "parity": 1.25,
        "renyi_efficiency": 0.5,
        "unknown_share": 0.0,
        "tokens_per_word": 2.0,
    }
    names = ("runs/a/tokenizer", "runs/b/tokenizer", "from scratch")
    show_measures(
        {name: {"de": row, "overall": {**row, "gini": 0.1, "vocabulary_size": 4096}} for name in names}
    )
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    for word in (
        "tokens relative to English",
        "a/tokenizer",
        "b/tokenizer",
        "from scratch",
        "3.50 (1.25)",
        "4,096",
    ):
        assert word in shown
    without = {name: {"de": {"bytes_per_token": 3.5}, "overall": {"bytes_per_token": 3.5}} for name in names}
    show_measures(without)
    assert "English" not in capsys.readouterr().out


def test_extend_measures_on_text_that_nothing_was_learnt_from(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KoineWarning)
        done = run(
            *("extend", "one", "--data", "text.jsonl", "--languages", "ko", "--tokens", "20"),
            *("--compare", "--out", "longer"),
        )
    assert done.exit_code == 0, done.output
    assert "added languages: ko; the base's: de" in done.output
    assert (
        f"from scratch: {load_tokenizer(folder / 'longer').vocab_size:,} tokens learnt from ko, de"
        in done.output
    )
    assert "measured on every 20th text, left out of training" in done.output
    record = json.loads((folder / "longer" / "tokenizer_training.json").read_text(encoding="utf-8"))
    assert record["data"] == ["text.jsonl"]
    assert record["extends"]["path"] == "one"
    assert record["base_languages"] == ["de", "en"]
    learnt = [text for place, text in enumerate(KOREAN, 1) if place % 20 != 2]
    assert record["languages"] == {"ko": {"bytes": sum(len(text.encode()) for text in learnt)}}


def test_extend_says_where_the_comparison_has_no_text_of_the_base(folder: Path) -> None:
    write(folder / "ko.jsonl", [{"language": "ko", "text": text} for text in KOREAN])
    with pytest.warns(KoineWarning, match="no text of the base's languages"):
        run("extend", "one", "--data", "ko.jsonl", "--tokens", "20", "--compare", "--out", "longer")


def test_a_language_s_only_text_is_learnt_from() -> None:
    texts = [("de", "a"), ("de", "b"), ("de", "c"), ("nl", "d")]
    assert list(split_texts(lambda: texts, heldout=True)()) == [("de", "b")]
    assert list(split_texts(lambda: texts, heldout=False)()) == [("de", "a"), ("de", "c"), ("nl", "d")]
    assert list(split_texts(lambda: texts, heldout=False, every=None)()) == texts


def test_the_weights_show_what_training_will_repeat(folder: Path) -> None:
    with pytest.warns(KoineWarning, match=r"the limit.*bytes are drawn in all, not 20,000"):
        done = run("weights", "--data", "text.jsonl", "--sample-bytes", "20000", "--max-repeats", "2")
    assert done.exit_code == 0, done.output
    assert "2.00×" in done.output


def test_training_through_a_pipe_prints_one_line_and_its_record_names_the_data(folder: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "koine", "tokenizer", "train", "--data", "text.jsonl"),
            *("--vocab-size", "300", "--scheme", "natural", "--out", "new"),
        ],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert done.stdout == "300 tokens written to new\n"
    assert done.stderr == ""
    record = json.loads((folder / "new" / "tokenizer_training.json").read_text(encoding="utf-8"))
    assert record["data"] == ["text.jsonl"]
    assert record["koine"] == "0.1.0"
