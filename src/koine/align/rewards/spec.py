"""Reward specifications: `0.7*language+0.3*length:most=20` is a weighted sum of rewards.

    TERM [+ TERM ...]        TERM = [WEIGHT *] NAME [: KEY=VALUE [, KEY=VALUE ...]]

NAME is one of `REWARDS`, or `module:function` for a function of one's own; the keys are the fields of the
reward's class, or the function's keywords. A value with `+`, `,`, `:` or quotes stands in single or double
quotes: `form:pattern='[A-D]|a, b'`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any

from koine.align.rewards.answers import Answer, Arithmetic, SampleAnswer
from koine.align.rewards.form import Form, Length
from koine.align.rewards.functions import load_function
from koine.align.rewards.language import Language
from koine.align.rewards.models import Judge, ModelReward, Scorer, check_held_out, models_of
from koine.align.rewards.reward import (
    Answered,
    ChecksRecords,
    Conversation,
    Record,
    Reward,
    RewardOutcome,
    score,
    single_value,
)
from koine.align.rewards.unit_tests import UnitTests
from koine.errors import UserError, did_you_mean
from koine.fields import check_number, short_repr
from koine.generate.engine import Engine

REWARDS: Mapping[str, type[Any]] = {
    "answer": Answer,
    "sample": SampleAnswer,
    "arithmetic": Arithmetic,
    "language": Language,
    "form": Form,
    "length": Length,
    "reward-model": ModelReward,
    "judge": Judge,
    "unit-tests": UnitTests,
}
_ARGUMENTS = {"reward-model": "scorer", "judge": "engine"}
"""Fields that are models, not settings: `RewardSpec.build` gets them, and the judge's `template`."""

_QUOTED = r"'[^']*'|\"[^\"]*\""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
# A plus sign joins terms where a term follows; that of an exponent (1e+3) has a digit behind it and an e before.
_JOINS = re.compile(rf"({_QUOTED})|(?<![0-9.][eE])\+(?=\s*(?:{_NUMBER}\s*\*\s*)?[A-Za-z_]|\s*$)")
_COMMA = re.compile(rf"({_QUOTED})|,")
_TERM = re.compile(
    rf"\s*(?:(?P<weight>{_NUMBER})\s*\*\s*)?(?P<name>[A-Za-z_][\w.-]*(?::[A-Za-z_]\w*(?![\w-]*\s*=))?)\s*(?::(?P<settings>.*))?",
    re.DOTALL,
)


@dataclass(frozen=True)
class RewardTerm:
    """One reward of a specification: its weight, its name, its settings."""

    weight: float
    name: str
    settings: Mapping[str, Any]

    def build(
        self,
        scorer: Scorer | None = None,
        engine: Engine | None = None,
        judge_template: str | None = None,
    ) -> Reward:
        """Return the reward; see `RewardSpec.build`."""
        if ":" in self.name:
            return load_function(self.name, self.settings)
        arguments: dict[str, Any] = {"scorer": scorer, "engine": engine}
        needed = _ARGUMENTS.get(self.name)
        given = {} if needed is None else {needed: arguments[needed]}
        if None in given.values():
            raise UserError(
                f"the reward '{self.name}' needs a {'reward model' if needed == 'scorer' else 'judge'}",
                hint=f"give its `{needed}`",
            )
        if self.name == "judge" and judge_template is not None:
            given["template"] = judge_template
        reward: Reward = REWARDS[self.name](**given, **self.settings)
        return reward


@dataclass(frozen=True)
class RewardSpec:
    """A weighted sum of rewards, parsed and checked; make one with `RewardSpec.parse`."""

    terms: tuple[RewardTerm, ...]

    @classmethod
    def parse(cls, text: str) -> RewardSpec:
        """Return the specification that `text` describes; `UserError` where it is none."""
        where = f"reward {short_repr(text)}"
        terms = tuple(_parse_term(part, where) for part in _split(text, _JOINS))
        for term in terms:
            if term.name in REWARDS and term.name not in _ARGUMENTS:
                # Made once and thrown away, so that a value out of its bounds is refused at once.
                _with_place(term, where)
        return cls(terms)

    @property
    def needs(self) -> frozenset[str]:
        """The models that `build` needs: `scorer`, `engine`, both or none."""
        return frozenset(_ARGUMENTS[term.name] for term in self.terms if term.name in _ARGUMENTS)

    def build(
        self,
        *,
        scorer: Scorer | None = None,
        engine: Engine | None = None,
        judge_template: str | None = None,
    ) -> Reward:
        """Return the reward.

        Args:
            scorer: the reward model of `reward-model`.
            engine: the judge of `judge`. It must not be the reward model.
            judge_template: the judge's prompt; None for `koine.align.rewards.models.TEMPLATE`.

        Raises:
            UserError: a model is missing, the judge is the reward model, a user's function cannot be loaded.
        """
        if self.needs >= {"scorer", "engine"} and scorer is not None and engine is not None:
            check_held_out(engine, [scorer])
        rewards = tuple(term.build(scorer, engine, judge_template) for term in self.terms)
        if len(rewards) == 1 and self.terms[0].weight == 1:
            return rewards[0]
        return WeightedSum(
            names=tuple(term.name for term in self.terms),
            weights=tuple(term.weight for term in self.terms),
            rewards=rewards,
        )


@dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """The weighted sum of rewards. Where one of them fails, the sum fails, for the same reason."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    rewards: tuple[Reward, ...]

    @property
    def models(self) -> tuple[object, ...]:
        """The models that give this reward."""
        return tuple(model for reward in self.rewards for model in models_of(reward))

    def check(self, record: Record) -> None:
        """Raise `UserError` for a record that one of the rewards cannot score."""
        for reward in self.rewards:
            if isinstance(reward, ChecksRecords):
                reward.check(record)

    def __call__(self, conversation: Conversation, completion: str, record: Record) -> float:
        """Return the sum of one completion."""
        return single_value(self.outcomes([Answered(conversation, completion, record)]))

    def outcomes(self, answered: Sequence[Answered]) -> list[RewardOutcome]:
        """Score all completions by each reward, and add."""
        parts = [score(reward, answered) for reward in self.rewards]
        return [self._sum(outcomes) for outcomes in zip(*parts, strict=True)]

    def _sum(self, outcomes: Sequence[RewardOutcome]) -> RewardOutcome:
        values = []
        for name, weight, outcome in zip(self.names, self.weights, outcomes, strict=True):
            if outcome.value is None:
                return RewardOutcome(None, f"{name}: {outcome.failure}")
            values.append(weight * outcome.value)
        return RewardOutcome(math.fsum(values))


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split at a separator outside of quotes."""
    parts, begin = [], 0
    for match in separator.finditer(text):
        if match.group(1) is None:
            parts.append(text[begin : match.start()])
            begin = match.end()
    return [*parts, text[begin:]]


def _parse_term(text: str, where: str) -> RewardTerm:
    match = _TERM.fullmatch(text)
    if match is None:
        raise UserError(
            f"{short_repr(text.strip())} is no reward",
            where=where,
            hint="write [WEIGHT*]NAME[:KEY=VALUE,...]",
        )
    name, settings = match["name"], _parse_settings(match["settings"], where)
    weight = 1.0 if match["weight"] is None else check_number("weight", float(match["weight"]), where=where)
    if weight == 0:
        raise UserError(f"the weight of '{name}' is 0", where=where, hint="leave the reward out")
    if ":" in name:
        if (known := name.partition(":")[0]) in REWARDS:
            raise UserError(
                f"'{name}' has a setting without a value", where=where, hint=f"write {known}:KEY=VALUE"
            )
        return RewardTerm(weight, name, {key: _free_value(value) for key, value in settings.items()})
    if name not in REWARDS:
        raise UserError(
            f"unknown reward '{name}'",
            where=where,
            hint=f"{did_you_mean(name, REWARDS)} A function of your own is `module:function`",
        )
    types = setting_types(name)
    typed = {}
    for key, value in settings.items():
        if key not in types:
            hint = did_you_mean(key, types) if types else f"'{name}' has no settings"
            raise UserError(f"the reward '{name}' has no setting '{key}'", where=where, hint=hint)
        typed[key] = _typed(key, value, types[key], where)
    for field in dataclasses.fields(REWARDS[name]):
        required = field.default is dataclasses.MISSING and field.init and field.name in types
        if required and field.name not in typed:
            raise UserError(
                f"the reward '{name}' needs the setting '{field.name}'",
                where=where,
                hint=f"for example {name}:{field.name}=20",
            )
    return RewardTerm(weight, name, typed)


def setting_types(name: str) -> dict[str, Any]:
    """Return the settings of a reward of `REWARDS` that a specification can give, with their types."""
    kind = REWARDS[name]
    hints = typing.get_type_hints(kind)
    argument = _ARGUMENTS.get(name)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(kind)
        if field.init and field.name not in (argument, "template")
    }


def _parse_settings(text: str | None, where: str) -> dict[str, str]:
    if text is None:
        return {}
    settings: dict[str, str] = {}
    for part in _split(text, _COMMA):
        key, equals, value = part.strip().partition("=")
        if not equals or not key:
            raise UserError(
                f"{short_repr(part.strip())} is not KEY=VALUE",
                where=where,
                hint="put a value with a comma, a plus or a colon into quotes",
            )
        if key in settings:
            raise UserError(f"the setting '{key}' is given twice", where=where)
        value = value.strip()
        quoted = re.fullmatch(_QUOTED, value, re.DOTALL)
        settings[key.strip()] = value[1:-1] if quoted else value
    return settings


def _typed(key: str, text: str, kind: Any, where: str) -> Any:
    """Return a value of the setting's type."""
    kinds = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if str in kinds:
        return text
    if bool in kinds:
        if text not in ("true", "false"):
            raise UserError(f"{key} is {short_repr(text)}", where=where, hint="it must be true or false")
        return text == "true"
    try:
        return int(text) if int in kinds else check_number(key, float(text), where=where)
    except ValueError as error:
        must = "an integer" if int in kinds else "a number"
        raise UserError(f"{key} is {short_repr(text)}", where=where, hint=f"it must be {must}") from error


def _free_value(text: str) -> float | bool | str:
    """Return the value of a keyword of a user's function: a number or a bool where it looks like one."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _with_place(term: RewardTerm, where: str) -> None:
    try:
        term.build()
    except UserError as error:
        raise UserError(error.what, where=where, hint=error.hint) from error
