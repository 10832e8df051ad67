"""Remove secrets from a server's texts, then control characters, then cut them.

A server that knows the key may send it back in any part of a response and in any spelling. Texts are
therefore compared in a plain form: escapes decoded (`\\u0073`, `%73`, `&#115;`), in lower case, letters and
digits only.
"""

from __future__ import annotations

import base64
import logging
import re
import unicodedata
import urllib.parse
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

MASK = "***"

FRAGMENT = 8
"""Letters and digits of the shortest masked piece of a secret: half a key is half guessed."""

MOST_CHARACTERS = 1 << 16
"""Most characters of a server's text that are searched; those at the edge are not shown."""
EDGE_CHARACTERS = 1 << 12

LINE_CHARACTERS = 300
"""Most characters of a server's text in a message."""

_ESCAPE = re.compile(
    r"\\+u(?P<four>[0-9a-fA-F]{4})|\\+u\{0*(?P<braced>[0-9a-fA-F]{1,4})\}|\\+x(?P<hex>[0-9a-fA-F]{2})"
    r"|%(?:25)*(?P<percent>[0-9a-fA-F]{2})"
    r"|&(?:amp;)*\#[xX]0*(?P<entity_hex>[0-9a-fA-F]{1,4});?|&(?:amp;)*\#0*(?P<entity>[0-9]{1,5});?"
    r"|\\+(?P<octal>[0-7]{3})|\\+(?P<letter>[nrtbf])"
)
# Other spellings of a letter: an escape, or a variant of another width or style.
_SPELLED = re.compile(
    _ESCAPE.pattern
    + "|[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\u00aa\u00b2-\u00ba\u02b0-\u02e3\u1d2c-\u1d6a\u2070-\u209c\u2100-\u214f"
    "\u2460-\u24ff\U0001d400-\U0001d7ff\U0001f100-\U0001f189]"
)
_BASES = {"four": 16, "braced": 16, "hex": 16, "percent": 16, "entity_hex": 16, "entity": 10, "octal": 8}
_LOGGERS = ("httpx2", "httpcore2", "httpx2.client")


class Redactor:
    """Masks secrets in a server's texts.

    A secret of fewer than four letters and digits is a placeholder ("x") and is not masked.
    """

    def __init__(self, secrets: Collection[str] = ()) -> None:
        """secrets: the key, and passwords of proxies."""
        self._pieces: dict[int, set[str]] = {}
        self._whole: set[str] = set()
        self._secrets = [secret for secret in secrets if _is_secret(secret)]
        for secret in secrets:
            if len(_plain(secret)) < 4:
                continue
            for form in _forms(secret):
                size = min(FRAGMENT, len(form))
                pieces = self._pieces.setdefault(size, set())
                pieces.update(form[place : place + size] for place in range(len(form) - size + 1))
                if _is_secret(secret):
                    self._whole.add(form)

    def __repr__(self) -> str:
        return "Redactor()"

    def text(self, text: str) -> str:
        """Mask every piece of a secret."""
        return self._replaced(text, ((size, pieces) for size, pieces in self._pieces.items()))

    def completion(self, text: str) -> str:
        """Mask whole secrets in a completion: their pieces may be words of the text.

        Placeholders for keys ("EMPTY", "not-needed") are words too, and stay.
        """
        if not _SPELLED.search(text):
            # The common case, in few passes over the text.
            plain = re.sub("[^0-9a-z]+", "", text.lower())
            if not any(form in plain for form in self._whole):
                return text
        sizes: dict[int, set[str]] = {}
        for form in self._whole:
            sizes.setdefault(len(form), set()).add(form)
        return self._replaced(text, sizes.items())

    def line(self, text: str, characters: int = LINE_CHARACTERS) -> str:
        """Return the masked text in one line without control characters, cut last."""
        masked = self.text(text[:MOST_CHARACTERS])
        if len(text) > MOST_CHARACTERS:
            # At the cut may be part of a secret that is too short to be recognised.
            masked = masked[:-EDGE_CHARACTERS]
        line = " ".join("".join(" " if _is_control(letter) else letter for letter in masked).split())
        return line if len(line) <= characters else line[:characters] + "..."

    def occurs_in(self, content: bytes) -> bool:
        """Return whether the content contains a secret, character by character."""
        return any(secret.encode("utf-8") in content for secret in self._secrets)

    @staticmethod
    def _replaced(text: str, sizes: Iterable[tuple[int, set[str]]]) -> str:
        if not text:
            return text
        letters, starts, ends = _plain_places(text)
        hidden: list[tuple[int, int]] = []
        for size, pieces in sizes:
            for place in range(len(letters) - size + 1):
                if letters[place : place + size] in pieces:
                    hidden.append((starts[place], ends[place + size - 1]))
        if not hidden:
            return text
        parts, shown = [], 0
        for start, end in _merged(hidden):
            parts += [text[shown:start], MASK]
            shown = end
        return "".join(parts) + text[shown:]


@contextmanager
def redact_logs(redactor: Redactor) -> Iterator[None]:
    """Mask the log records of the HTTP library (status lines, headers) inside the context."""

    class Masking(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            record.msg, record.args = redactor.text(record.getMessage()), ()
            if record.exc_info and record.exc_info[1] is not None:
                record.msg += f" ({type(record.exc_info[1]).__name__})"
            record.exc_info = record.exc_text = None
            return True

    known = [
        name for name in logging.root.manager.loggerDict if name.partition(".")[0] in ("httpx2", "httpcore2")
    ]
    loggers = [logging.getLogger(name) for name in {*known, *_LOGGERS}]
    masking = Masking()
    for logger in loggers:
        logger.addFilter(masking)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(masking)


def proxy_passwords() -> list[str]:
    """Return the passwords in the environment's proxy URLs."""
    from urllib.request import getproxies

    found = []
    for address in getproxies().values():
        user = address.rpartition("@")[0].rpartition("//")[2]
        password = user.partition(":")[2]
        found += [password, urllib.parse.unquote(password)]
    return [password for password in found if password]


def _is_secret(secret: str) -> bool:
    """Return whether a key is more than a placeholder for servers without keys."""
    plain = _plain(secret)
    return len(plain) >= FRAGMENT and (
        any(letter.isdigit() for letter in plain)
        or secret.startswith("sk-")
        or (secret != secret.lower() and secret != secret.upper())
        or len(plain) >= 20
    )


def _forms(secret: str) -> set[str]:
    """Return the plain forms of a secret: as it is, reversed, hexadecimal, base32 and base64."""
    data = secret.encode("utf-8")
    forms = {secret, secret[::-1], data.hex()}
    for skipped in range(3):
        # The first and last characters depend on the bytes around the secret.
        coded = base64.b64encode(b"\0" * skipped + data).decode().rstrip("=")
        forms.add(coded[(0, 2, 3)[skipped] : len(coded) - ((skipped + len(data)) % 3 > 0)])
    for skipped in range(5):
        coded = base64.b32encode(b"\0" * skipped + data).decode().rstrip("=")
        forms.add(coded[(0, 2, 4, 5, 7)[skipped] : len(coded) - ((skipped + len(data)) % 5 > 0)])
    plain = {_plain(form) for form in forms}
    return {form for form in plain if len(form) >= 4}


def _plain(text: str) -> str:
    return _plain_places(text)[0]


def _plain_places(text: str) -> tuple[str, list[int], list[int]]:
    """Return the plain form, and where each of its letters starts and ends in the text."""
    letters: list[str] = []
    starts: list[int] = []
    ends: list[int] = []

    def add(character: str, start: int, end: int) -> None:
        if not character.isascii():
            character = unicodedata.normalize("NFKC", character)
        for letter in character.lower():
            if letter.isalnum() and letter.isascii():
                letters.append(letter)
                starts.append(start)
                ends.append(end)

    place = 0
    for escape in _ESCAPE.finditer(text):
        for index in range(place, escape.start()):
            add(text[index], index, index + 1)
        found = escape.groupdict()
        code = next(
            (int(found[name], base) for name, base in _BASES.items() if found[name]),
            10,
        )
        add(chr(code), escape.start(), escape.end())
        place = escape.end()
    for index in range(place, len(text)):
        add(text[index], index, index + 1)
    return "".join(letters), starts, ends


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _is_control(character: str) -> bool:
    """Return whether a character could control a terminal or reverse a line."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
