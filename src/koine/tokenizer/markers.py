"""Encode rendered conversations: markers of the template take effect, look-alikes in messages do not.

Before rendering, a look-alike in a message is hidden from the library: its first character becomes a
private-use character that occurs nowhere in the conversation. After rendering, the remaining markers were
written by the template. They become aliases of the same length: tokens of their own with the same settings.
The look-alikes get their first characters back. So the text around both is tokenized as if neither had been
changed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from koine.tokenizer.control import PlainText
from koine.tokenizer.template import free_characters, strings_of


class Hidden:
    """Messages with look-alikes hidden.

    Attributes:
        messages: the messages for the template.
        shown: stand-in -> the character that it stands for; empty if nothing was hidden.
        found: whether any message holds a look-alike, also one that only the tokenizer's normalisation makes.
    """

    def __init__(
        self, messages: Sequence[Mapping[str, Any]], plain: PlainText, others: Sequence[str] = ()
    ) -> None:
        """Hide look-alikes in `messages`; `others` are further texts of the rendering, as the template."""
        firsts = {token[0] for token in plain.hard | plain.soft}
        texts = list(strings_of(messages))
        self.shown: dict[str, str] = {}
        self.found = False
        self.messages = [dict(message) for message in messages]
        if not any(first in text for text in texts for first in firsts) and not plain.normalised:
            return
        free = free_characters([*texts, *others])
        stand_ins = {first: next(free) for first in sorted(firsts)}
        for message in self.messages:
            # The assistant may write soft markers: its thinking, its tool calls.
            tokens = plain.hard if message["role"] == "assistant" else plain.hard | plain.soft
            for key, value in message.items():
                if key != "role":
                    message[key] = _replaced(value, lambda text, tokens=tokens: hide(text, tokens, stand_ins))
        left = set(strings_of(self.messages))
        self.shown = {new: old for old, new in stand_ins.items() if any(new in text for text in left)}
        self.found = bool(self.shown) or any(plain.normalises_to_control(text) for text in texts)


def _replaced(value: Any, change: Any) -> Any:
    """Apply `change` to every string in a nested value."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _replaced(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(one, change) for one in value]
    return value


def hide(text: str, tokens: Iterable[str], stand_ins: Mapping[str, str]) -> str:
    """Replace the first character of every token in the text.

    Also of a token's beginning at the text's end, which the template could complete.
    """
    present = [token for token in tokens if token in text]
    places = set()
    if present:
        starts = re.compile("(?=" + "|".join(map(re.escape, present)) + ")")
        places = {match.start() for match in starts.finditer(text)}
    tail = text[-max(map(len, tokens), default=1) :]
    for length in range(2, len(tail) + 1):
        if any(token.startswith(tail[-length:]) for token in tokens):
            places.add(len(text) - length)
    if not places:
        return text
    return "".join(
        stand_ins[character] if place in places else character for place, character in enumerate(text)
    )


class MarkerEncoder:
    """Encode rendered conversations in which some text was hidden. Thread-safe."""

    def __init__(self, plain: PlainText, ids: Mapping[str, int]) -> None:
        """ids: ids of the control tokens."""
        self._plain = plain
        self._ids = ids
        self._lock = threading.Lock()
        self._backend: Any = None
        self._alias_of: dict[str, str] = {}
        self._real: dict[int, int] = {}

    def encode(self, text: str, shown: Mapping[str, str]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and the offsets of each token in the text.

        Markers take effect, what `shown` restores does not. `text` is as the template rendered it, with
        stand-ins.
        """
        with self._lock:
            marked = self._with_aliases(text, shown)
            for stand_in, original in shown.items():
                marked = marked.replace(stand_in, original)
            encoding = self._backend.encode(marked, add_special_tokens=False)
        return [self._real.get(token, token) for token in encoding.ids], encoding.offsets

    def _with_aliases(self, text: str, shown: Mapping[str, str]) -> str:
        """Replace the markers in a text by their aliases; new markers get new aliases."""
        present = [token for token in self._ids if token in text]
        if self._backend is None or any(alias in text for alias in self._alias_of.values()):
            self._backend, self._alias_of, self._real = self._plain.copy(), {}, {}
        new = [token for token in present if token not in self._alias_of]
        if new:
            free = free_characters([text, *shown, *self._alias_of.values()])
            self._add({token: next(free) for token in new})
        if not present:
            return text
        longest_first = sorted(present, key=len, reverse=True)
        markers = re.compile("|".join(map(re.escape, longest_first)))
        return markers.sub(lambda match: self._alias_of[match[0]] * len(match[0]), text)

    def _add(self, aliases: Mapping[str, str]) -> None:
        """Add aliases to the backend, with the settings of their markers."""
        from tokenizers import AddedToken

        habits = {one.content: one for one in self._backend.get_added_tokens_decoder().values()}
        for token, alias in aliases.items():
            own = habits[token]
            self._backend.add_tokens(
                [
                    AddedToken(
                        alias * len(token),
                        single_word=own.single_word,
                        lstrip=own.lstrip,
                        rstrip=own.rstrip,
                        normalized=own.normalized,
                        special=False,
                    )
                ]
            )
            self._alias_of[token] = alias
            self._real[self._backend.token_to_id(alias * len(token))] = self._ids[token]
