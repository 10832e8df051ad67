"""Comparing and measuring texts."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+(?:['’\-]\w+)*")
_PUNCTUATION = frozenset(".。．!！?？,，;；:：।॥۔…\"'“”„«»「」()（）*` ")


def normalise(text: str) -> str:
    """Apply NFC, make each run of white space one space, and strip the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def bare(text: str) -> str:
    """Return a text for comparison: normalised, case folded, without punctuation and quotes at its ends."""
    return normalise(unicodedata.normalize("NFKC", text)).casefold().strip("".join(_PUNCTUATION))


def contains(text: str, part: str) -> bool:
    """Return whether `part` stands in `text`, not inside of a word or number where its ends are letters or digits.

    Scripts that write no spaces have no words to be inside of, so there any place counts.
    """
    text, part = bare(text), bare(part)
    begin = text.find(part) if part else -1
    while begin >= 0:
        end = begin + len(part)
        if not _joined(text[begin - 1 : begin], part[0]) and not _joined(part[-1], text[end : end + 1]):
            return True
        begin = text.find(part, begin + 1)
    return False


def _joined(left: str, right: str) -> bool:
    """Return whether two neighbouring characters belong to one word or number."""
    if not left or not right:
        return False
    if left.isdecimal() and right.isdecimal():
        return True
    return all(one.isalpha() and not _is_unspaced(one) for one in (left, right))


def _is_unspaced(character: str) -> bool:
    """Return whether a character is of a script without spaces between words: East Asian, Thai, Khmer, Lao, Burmese."""
    code = ord(character)
    return (
        0x2E80 <= code <= 0xD7FF
        or 0xF900 <= code <= 0xFAFF
        or code >= 0x20000
        or 0x0E00 <= code <= 0x0EFF
        or (0x1000 <= code <= 0x109F or 0x1780 <= code <= 0x17FF)
    )


def count_words(text: str) -> int:
    """Count runs of letters and digits. A language without spaces has few: count characters there."""
    return len(_WORD.findall(text))


def measure(text: str, unit: str) -> int:
    """Return the length of a text in `characters`, `words` or `lines`, without white space at its ends."""
    stripped = text.strip()
    if unit == "words":
        return count_words(stripped)
    return len(stripped.splitlines()) if unit == "lines" else len(stripped)


UNITS = ("characters", "words", "lines")
