"""How an answer's tokens are drawn: the settings of every engine."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from koine.errors import UserError, did_you_mean
from koine.fields import short_repr
from koine.generate.grammar.schema import schema_text

_WHOLE = ("top_k", "seed", "max_new_tokens")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", *_WHOLE)
_NO_NUMBERS = ("stop", "json_schema")
"""Settings that a chat's `/set NAME VALUE` does not know."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of generation, validated when built (`UserError`).

    temperature: divides the logits; 0 takes the likeliest token always.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the fewest tokens whose probabilities sum to at least this (nucleus sampling).
    min_p: keep tokens at least this many times as likely as the likeliest.
    repetition_penalty: positive logits of tokens seen before are divided by it, negative ones multiplied (CTRL).
    seed: the same seed, question and settings give the same answer; None draws afresh.
    max_new_tokens: the longest answer.
    stop: strings that end the answer; the one met is no part of it.
    json_schema: the answer is a JSON document that follows this schema, keys in its order (extra `grammar`).
    """

    temperature: float = 0.3
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            self._take_number(name)
        self._require("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more")
        self._require("top_k", self.top_k >= 0, "0 (all tokens) or more")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        self._require(
            "repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 changes nothing"
        )
        self._require("seed", self.seed is None or 0 <= self.seed < 2**63, "an integer from 0")
        self._require("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        for name in ("top_k", "max_new_tokens"):
            self._require(name, getattr(self, name) < 2**31, "a number below 2^31")
        self._require(
            "stop",
            isinstance(self.stop, tuple) and all(isinstance(stop, str) and stop for stop in self.stop),
            "a tuple of strings, none of them empty",
        )
        if self.json_schema is not None:
            schema_text(self.json_schema)

    def _take_number(self, name: str) -> None:
        """Make Python's own number of NumPy's; true and false are none, as nothing that is no number is."""
        value = getattr(self, name)
        if name == "seed" and value is None:
            return
        whole = name in _WHOLE
        self._require(
            name,
            isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool),
            "an integer" if whole else "a number",
        )
        try:
            number = int(value) if whole else float(value)
        except OverflowError:
            self._require(name, False, "a smaller number")
        if not isinstance(value, int | float):
            # A 0 stays a 0, and no 0.0: the names of answers in the cache depend on it.
            object.__setattr__(self, name, number)

    def _require(self, name: str, holds: bool, hint: str) -> None:
        if not holds:
            raise UserError(
                f"{name.replace('_', '-')} is {short_repr(getattr(self, name))}", hint=f"give {hint}"
            )

    def replaced(self, name: str, text: str) -> Sampling:
        """These settings with one changed from its written form: `replaced("top-k", "40")`.

        Raises `UserError` for an unknown name, a value that is no number, or one out of range.
        """
        field = name.replace("-", "_")
        kinds = {
            entry.name: entry.type for entry in dataclasses.fields(self) if entry.name not in _NO_NUMBERS
        }
        if field not in kinds:
            known = [known.replace("_", "-") for known in kinds]
            raise UserError(f"unknown setting {short_repr(name)}", hint=did_you_mean(name, known))
        value: Any
        try:
            if text == "none" and field == "seed":
                value = None
            else:
                value = float(text) if kinds[field] == "float" else int(text)
        except ValueError:
            kind = "a number" if kinds[field] == "float" else "an integer"
            raise UserError(f"{name} is {short_repr(text)}", hint=f"give {kind}") from None
        return dataclasses.replace(self, **{field: value})

    def described(self) -> str:
        """All settings in one line, as `/set` writes them."""
        return "  ".join(
            f"{entry.name.replace('_', '-')} {str(getattr(self, entry.name)).lower()}"
            for entry in dataclasses.fields(self)
            if entry.name not in _NO_NUMBERS
        )
