"""Translate regular expressions of JSON schemas (ECMA-262) to those of the grammar library (Rust's `regex`).

The two share most syntax, and some of it has different meanings. The result matches only what ECMA-262,
Python and Rust all match, so that a completion is valid for every validator.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

from koine.errors import UserError

_ALL_SPACES = r"\t-\r\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{180e}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
_COMMON_SPACES = r"\t-\r\x{20}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_ALL_WORDS = r"\p{L}\p{N}_"
_ALL_DIGITS = r"\p{N}"

# Character classes by letter, and their translation: alone, in [...], and in [^...].
_CLASSES = {
    "d": ("[0-9]", "0-9", _ALL_DIGITS),
    "D": (f"[^{_ALL_DIGITS}]", f"[^{_ALL_DIGITS}]", "[^0-9]"),
    "w": ("[0-9A-Za-z_]", "0-9A-Za-z_", _ALL_WORDS),
    "W": (f"[^{_ALL_WORDS}]", f"[^{_ALL_WORDS}]", "[^0-9A-Za-z_]"),
    "s": (f"[{_COMMON_SPACES}]", _COMMON_SPACES, _ALL_SPACES),
    "S": (f"[^{_ALL_SPACES}]", f"[^{_ALL_SPACES}]", f"[^{_COMMON_SPACES}]"),
}
_ANY = r"[^\n\r\x{2028}\x{2029}]"

# Escapes that one of the three engines reads differently, or not at all.
_DIFFERENT = set("AzZQEaUGKNRXhHyY<>pP")


def portable_pattern(pattern: str, place: str) -> str:
    """Return the pattern for the grammar library.

    place: of the pattern in its schema, for the message.
    Raises `UserError` for syntax that engines read differently.
    """
    parts: list[str] = []
    at, in_class, negated = 0, False, False
    while at < len(pattern):
        char, rest = pattern[at], pattern[at + 1 :]
        if char == "\\":
            letter = rest[:1]
            if letter in _CLASSES:
                alone, inside, outside = _CLASSES[letter]
                parts.append(alone if not in_class else outside if negated else inside)
            elif (letter and letter in _DIFFERENT) or rest.startswith("x{"):
                _refuse(pattern, place, f"\\{letter}")
            elif letter == "-" and not in_class:
                parts.append("-")
            else:
                parts.append(char + letter)
            at += 2
            continue
        if in_class:
            if char == "[" or pattern[at : at + 2] in ("&&", "--", "~~"):
                _refuse(pattern, place, pattern[at : at + 2])
            in_class = char != "]"
        elif char == "[":
            in_class, negated = True, rest.startswith("^")
            begins = at + 1 + negated
            if pattern.startswith("]", begins):
                _refuse(pattern, place, pattern[at : begins + 1])  # empty in ECMA-262, a character elsewhere
            if negated:
                parts.append(char)
                char, at = "^", at + 1
        elif char == "." and not re.match(r"\(\?[a-z]*s", pattern):
            char = _ANY
        elif char == "+" and at and pattern[at - 1] in "+*?}" and not _escaped(pattern, at - 1):
            _refuse(pattern, place, pattern[at - 1 : at + 1])
        elif (flags := re.match(r"\(\?([A-Za-z-]*)[:)]", pattern[at:])) and set(flags[1]) - set("ims"):
            _refuse(pattern, place, flags[0])
        parts.append(char)
        at += 1
    return "".join(parts)


def pattern_excluding(names: list[str]) -> str:
    """Return a pattern of all texts except `names`."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for letter in name:
            node = node.setdefault(letter, {})
        node[""] = {}

    def others(node: dict[str, Any]) -> str:
        letters = sorted(letter for letter in node if letter)
        ways = [] if "" in node else [""]
        if letters:
            ways.append(f"[^{''.join(map(_one, letters))}]" + ANYTHING)
            ways += [_one(letter) + others(node[letter]) for letter in letters]
        else:
            ways.append(r"[\x{0}-\x{10ffff}]" + ANYTHING)
        return f"(?:{'|'.join(ways)})"

    return f"^{others(tree)}$"


ANYTHING = r"[\x{0}-\x{10ffff}]*"


def _one(letter: str) -> str:
    return f"\\x{{{ord(letter):x}}}"


def _escaped(pattern: str, at: int) -> bool:
    """Return whether an odd number of backslashes precedes the character."""
    before = pattern[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _refuse(pattern: str, place: str, part: str) -> NoReturn:
    raise UserError(
        f"the JSON schema cannot be used (the pattern {pattern!r:.100} at {place} has '{part}', "
        "which engines read differently)",
        hint="use syntax that all engines share",
    )
