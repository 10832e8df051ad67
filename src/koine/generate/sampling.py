"""Settings of generation, shared by every engine."""

from __future__ import annotations

import dataclasses
import numbers
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from koine.errors import UserError, did_you_mean
from koine.fields import check_integer, check_number, short_repr
from koine.generate.grammar.schema import schema_text

GREEDY_BELOW = 1e-6
"""Temperatures below this are greedy.

float32 logits of about 10 are 1e-6 apart, so a lower temperature could only differ from greedy decoding where
rounding decides, and dividing by it soon leaves the range of float32.
"""

_MAX_COUNT = 2**31 - 1
_MAX_SEED = 2**63 - 1
_INTEGERS: dict[str, dict[str, Any]] = {
    "top_k": {"low": 0, "high": _MAX_COUNT},
    "seed": {"low": 0, "high": _MAX_SEED},
    "max_new_tokens": {"low": 1, "high": _MAX_COUNT},
}
_NUMBERS: dict[str, dict[str, Any]] = {
    "temperature": {"low": 0},
    "top_p": {"above": 0, "high": 1},
    "min_p": {"low": 0, "high": 1},
    "repetition_penalty": {"above": 0},
}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of generation. Raises `UserError` for a value out of range.

    temperature: divides the logits; 0 is greedy decoding.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the fewest tokens whose probabilities sum to at least this (nucleus sampling).
    min_p: keep tokens at least this many times as likely as the likeliest.
    repetition_penalty: divides positive logits of tokens in the text so far, multiplies negative ones (CTRL).
    seed: the same seed, prompt and settings give the same tokens; None draws a fresh seed.
    max_new_tokens: maximum number of generated tokens.
    stop: strings that end generation; the completion does not include the one found.
    json_schema: the completion is a JSON document of this schema, keys in its order (extra `grammar`).
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
        for name, bounds in _INTEGERS.items():
            value = self._without_numpy(name)
            if not (name == "seed" and value is None):
                check_integer(_option(name), value, **bounds)
        for name, limits in _NUMBERS.items():
            # Checked, not converted: cached responses are found by the setting's JSON, where 0 is not 0.0.
            check_number(_option(name), self._without_numpy(name), **limits)
        if not isinstance(self.stop, tuple) or not all(isinstance(one, str) and one for one in self.stop):
            raise UserError(
                f"stop is {short_repr(self.stop)}", hint="it must be a tuple of strings, none of them empty"
            )
        if self.json_schema is not None:
            schema_text(self.json_schema)

    def _without_numpy(self, name: str) -> Any:
        """Return a setting, replaced by Python's own number where it is one of NumPy's."""
        value = getattr(self, name)
        if isinstance(value, int | float):
            return value
        if isinstance(value, numbers.Integral):
            value = int(value)
        elif isinstance(value, numbers.Real) and name in _NUMBERS:
            value = float(value)
        object.__setattr__(self, name, value)
        return value

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken (after the repetition penalty), and nothing drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def filters(self) -> tuple[float, int, float, float, float]:
        """The settings that change the logits. Requests with equal ones are sampled together."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty

    def per_prompt(self, count: int) -> list[Sampling]:
        """Return settings for `count` prompts: prompt i gets `seed + i`.

        So no prompt's completion depends on the others. A seed of None counts from a fresh seed.
        """
        first = fresh_seed() if self.seed is None else self.seed
        return [dataclasses.replace(self, seed=first + index) for index in range(count)]

    def replaced(self, name: str, text: str) -> Sampling:
        """Return these settings with one changed from text: `replaced("top-k", "40")`.

        Raises `UserError` for an unknown name, a text that is no number, or a value out of range.
        """
        field = name.replace("-", "_")
        known = _text_settings()
        if field not in known:
            raise UserError(
                f"unknown setting {short_repr(name)}",
                hint=did_you_mean(name, [_option(setting) for setting in known]),
            )
        if field == "seed" and text == "none":
            return dataclasses.replace(self, seed=None)
        integer = field in _INTEGERS
        try:
            value = int(text) if integer else float(text)
        except ValueError:
            kind = "an integer" if integer else "a number"
            raise UserError(f"{name} is {short_repr(text)}", hint=f"it must be {kind}") from None
        changed: dict[str, Any] = {field: value}
        return dataclasses.replace(self, **changed)

    def described(self) -> str:
        """Return the settings that `/set` knows, in one line."""
        return "  ".join(f"{_option(name)} {str(getattr(self, name)).lower()}" for name in _text_settings())


def fresh_seed() -> int:
    """Return a seed from the operating system's randomness."""
    return secrets.randbelow(2**31)


def _text_settings() -> list[str]:
    """The settings that are numbers, in the order of their definition: a chat's `/set` knows these."""
    return [
        entry.name
        for entry in dataclasses.fields(Sampling)
        if entry.name in _INTEGERS or entry.name in _NUMBERS
    ]


def _option(name: str) -> str:
    """The setting's name as the command line spells it."""
    return name.replace("_", "-")
