"""The command line in a run's record has no passwords."""

from __future__ import annotations

import pytest

from koine.plan.command_line import recorded_command


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("quickstart", "quickstart"),
        ("url=https://me:pass@word@host/v1", "url=https://***@host/v1"),
        ("https://host/v1?api_key=abc&n=1", "https://host/v1?api_key=***&n=1"),
        ("https://host/v1?n=1&access-token=abc#x", "https://host/v1?n=1&access-token=***#x"),
        ("https://host/a@b", "https://host/a@b"),
        ("tokenizer=mine", "tokenizer=mine"),
        ("", ""),
    ],
)
def test_passwords_in_addresses_are_masked(word: str, kept: str) -> None:
    assert recorded_command([word]) == [kept]


def test_the_command_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["koine", "run", "x", "--set", "url=http://u:p@h"])
    assert recorded_command() == ["koine", "run", "x", "--set", "url=http://***@h"]
