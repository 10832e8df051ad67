"""Stop strings are found across tokens, and no part of one is shown."""

from __future__ import annotations

import pytest

from koine.generate.stop_strings import StopStrings


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "found"),
    [
        (["ab", "c", "d"], ["cd"], "ab", True),
        (["ab", "c", "e"], ["cd"], "abce", False),
        (["aab", "aab", "c"], ["aabc"], "aab", True),
        (["x", "EN", "D now"], ["END", "D n"], "x", True),
        (["abc"], [], "abc", False),
        (["a", "b"], ["ab", "b"], "", True),
    ],
)
def test_stop_strings_across_tokens(pieces: list[str], stops: list[str], text: str, found: bool) -> None:
    class Pieces:
        def push(self, token: int) -> str:
            return pieces[token]

        def flush(self) -> str:
            return ""

    on_token = StopStrings(Pieces(), stops)
    for number in range(len(pieces)):
        before = on_token.text
        if on_token.push(number):
            break
        # What was shown once stays, and never runs into a stop string.
        assert on_token.text.startswith(before)
        assert text.startswith(on_token.text)
    assert on_token.found == found
    assert on_token.finish() == text
