"""Pre-tokenization: words with one leading mark, runs of punctuation, line ends; every digit alone.

The classes are those of GPT-4o's public `o200k_base` vocabulary. A word is cut where lower case turns to
upper case. Combining marks stay with their letters, so Indic and Arabic words are not broken. One non-letter
before a word, mostly the space, belongs to it. Unlike there, digits are never grouped: a number is spelled by
its digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

# Letters that may begin a word or stand in a caseless script, and letters that may continue one.
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD: Final = r"[^\r\n\p{L}\p{N}]?"
_ENGLISH_ENDING: Final = (
    "(?i:" + "|".join("'" + ending for ending in ("s", "t", "re", "ve", "m", "ll", "d")) + ")?"
)

PIECES: Final[tuple[str, ...]] = (
    f"{_LEAD}{_UPPER}*{_LOWER}+{_ENGLISH_ENDING}",  # a word ending in lower case: " Paris", "मुंबई", "東京"
    f"{_LEAD}{_UPPER}+{_LOWER}*{_ENGLISH_ENDING}",  # a word in capitals: " NASA"
    r"\p{N}",  # one digit of any script
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",  # punctuation and symbols, with the line end that follows
    r"\s*[\r\n]+",  # line ends, with the spaces before them
    r"\s+(?!\S)",  # spaces up to the last one, which belongs to the word that follows
    r"\s+",
)
PATTERN: Final = "|".join(PIECES)


def pre_tokenizer() -> Any:
    """Return the `tokenizers` pre-tokenizer: cut by `PATTERN`, then spell each piece in bytes."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LONGEST_RUN: Final = 1000
"""Longest run of letters, spaces or signs, in characters, that training sees; longer runs are cut.

The library's trainer needs time in the square of a piece's length. Runs this long are Thai or Chinese without
a space, rules of `=`, blank space, or no language at all.
"""
# Every text with such a run matches this pattern, which is cheap and therefore tried first.
_MAYBE: Final = re.compile(rf"(?<!\S)\S{{{LONGEST_RUN},}}|(?<!\s)\s{{{LONGEST_RUN},}}")
_CLASSES: Final = (r"\p{L}\p{M}", r"\s", r"^\s\p{L}\p{N}")


@cache
def _long_runs() -> Any:
    """Return a pre-tokenizer that isolates the runs that are too long."""
    from tokenizers import Regex, pre_tokenizers

    runs = (f"(?<![{one}])[{one}]{{{LONGEST_RUN + 1},}}" for one in _CLASSES)
    return pre_tokenizers.Split(Regex("|".join(runs)), behavior="isolated")


def short_runs(text: str) -> Iterator[str]:
    """Yield the text; if a run is longer than `LONGEST_RUN`, the parts of the text, cut inside that run."""
    if _MAYBE.search(text) is None:
        yield text
        return
    part_start = 0
    for _, (start, end) in _long_runs().pre_tokenize_str(text):
        # Only a run is isolated; a long part without runs is left whole.
        if end - start > LONGEST_RUN and _is_run(text[start : start + LONGEST_RUN + 1]):
            for place in range(start + LONGEST_RUN, end, LONGEST_RUN):
                yield text[part_start:place]
                part_start = place
    yield text[part_start:]


@cache
def _run() -> Any:
    """Return a pre-tokenizer that removes a text that is one run."""
    from tokenizers import Regex, pre_tokenizers

    whole = "|".join(rf"\A[{one}]+\z" for one in _CLASSES)
    return pre_tokenizers.Split(Regex(whole), behavior="removed")


def _is_run(text: str) -> bool:
    return not _run().pre_tokenize_str(text)
