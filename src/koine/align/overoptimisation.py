"""Over-optimisation: the two warning signs of arXiv 2410.11677, from the evaluations of a training so far.

A (DPO, IPO): the entropy of the top 10 rose, has turned down, and the diversity across inputs still rises.
B (hinge): the entropy still rises, and the mass of the top 10 falls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from koine.fields import check_integer, check_number
from koine.languages import LANGUAGES

SignName = Literal["entropy", "mass"]
State = Literal["early", "none", "begins", "over-optimised"]
ENTROPY: Final = "entropy"
MASS: Final = "mass"
DIVERSITY: Final = "ead"
NEEDED = (ENTROPY, MASS, DIVERSITY)
"""Figures that the rule reads."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How the rule did on runs whose gold reward is known (`koine.align.calibration.measure_rule`).

    over_optimised: runs whose gold reward fell from its peak. detected: those in which the rule stopped.
    other: the other runs. false_alarms: those in which it stopped.
    lead: median steps from the stop to where the gold reward had fallen; below 0: too late.
    regret: mean gold reward of the best evaluation, less that of the one kept, over all runs.
    """

    over_optimised: int
    detected: int
    other: int
    false_alarms: int
    lead: float | None
    regret: float

    def __str__(self) -> str:
        text = (
            f"on {self.over_optimised + self.other} other runs it found {self.detected} of "
            f"{self.over_optimised} over-optimised ones, with {self.false_alarms} false alarms in {self.other}, "
        )
        if self.lead is not None:
            text += f"{abs(self.lead):,.0f} steps {'ahead' if self.lead >= 0 else 'late'}, "
        return f"{text}regret {self.regret:.3f}"


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Constants of the rule. The defaults are not calibrated yet: `calibration` is then None.

    rise: bits that the entropy must have risen above the first evaluation, so that a turn counts.
    fall: bits below its peak from which the entropy has turned down.
    mass_fall: fall of the mass below its highest value so far that counts.
    diversity_rise: rise of EAD since the peak of the entropy that counts as rising.
    patience: evaluations in a row that must show a sign.
    """

    rise: float = 0.05
    fall: float = 0.05
    mass_fall: float = 0.02
    diversity_rise: float = 0.0
    patience: int = 2
    calibration: Calibration | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("rise", "fall", "mass_fall"):
            check_number(name, getattr(self, name), low=0)
        check_number("diversity_rise", self.diversity_rise)
        check_integer("patience", self.patience, low=1)


DEFAULT = Constants()


@dataclass(frozen=True)
class Sign:
    """A warning sign: its kind, and the step since which the figure has turned."""

    name: SignName
    since: int


@dataclass(frozen=True)
class Verdict:
    """The judgement on a training so far.

    Attributes:
        state: "early" (too few evaluations), "none" (no sign), "begins" (a sign in fewer evaluations than
            `patience`), "over-optimised".
        sign: the sign; None where there is none.
        step: steps done when the training became over-optimised; None where it did not.
        keep: steps of the evaluation to keep: the last one without a sign.
        languages: languages that are over-optimised by their own figures, the first ones first.
        text: all of it in words.
    """

    state: State
    sign: Sign | None
    step: int | None
    keep: int | None
    languages: tuple[str, ...]
    text: str


def sign_of(
    evaluations: Sequence[Mapping[str, float]], constants: Constants, suffix: str = ""
) -> Sign | None:
    """Return the sign that the last evaluation shows against those before it; None: it shows none.

    suffix: of the figures' names: `/hi` reads the figures of Hindi.
    """
    entropy, mass, diversity = (
        [one[name + suffix] for one in evaluations] for name in (ENTROPY, MASS, DIVERSITY)
    )
    last = len(evaluations) - 1
    peak = max(range(len(entropy)), key=entropy.__getitem__)
    if entropy[peak] - entropy[0] < constants.rise:
        return None
    if entropy[peak] - entropy[last] >= constants.fall:
        # At equal diversity nothing has risen; a policy that only becomes surer is not over-optimised.
        rises = diversity[last] - diversity[peak] > constants.diversity_rise
        return Sign(ENTROPY, int(evaluations[peak]["step"])) if rises else None
    highest = max(range(len(mass)), key=lambda index: (mass[index], index))
    if mass[highest] - mass[last] >= constants.mass_fall:
        return Sign(MASS, int(evaluations[highest]["step"]))
    return None


@dataclass(frozen=True)
class _Course:
    """The signs of all evaluations, the index where the rule stops, and the index to keep."""

    signs: tuple[Sign | None, ...]
    stop: int | None
    keep: int


def _course(evaluations: Sequence[Mapping[str, float]], constants: Constants, suffix: str = "") -> _Course:
    """Apply the rule to each evaluation in turn, up to the one where it stops."""
    signs: list[Sign | None] = []
    in_row = keep = 0
    for index in range(len(evaluations)):
        sign = sign_of(evaluations[: index + 1], constants, suffix)
        before = signs[-1] if signs else None
        in_row = 0 if sign is None else in_row + 1 if before and before.name == sign.name else 1
        signs.append(sign)
        if sign is None:
            keep = index
        if in_row >= constants.patience:
            return _Course(tuple(signs), index, keep)
    return _Course(tuple(signs), None, keep)


def best_evaluation(evaluations: Sequence[Mapping[str, float]], constants: Constants = DEFAULT) -> int:
    """Return the index of the evaluation to keep: the last one without a sign, before the rule stops."""
    return _course(evaluations, constants).keep


def verdict(evaluations: Sequence[Mapping[str, float]], constants: Constants = DEFAULT) -> Verdict:
    """Judge a training by its evaluations so far, oldest first. It is a pure function.

    Each has `step` and the figures `NEEDED`, and these of languages as `entropy/hi`. A training that was
    over-optimised stays so. A language is judged where all evaluations have its figures.
    """
    if len(evaluations) < 2:
        text = f"{_count(len(evaluations), 'evaluation')} so far: too early to say"
        return Verdict("early", None, None, None, (), text)
    course = _course(evaluations, constants)
    languages = _languages(evaluations, constants)
    sign = course.signs[-1]
    keep = int(evaluations[course.keep]["step"])
    if course.stop is not None and sign is not None:
        text = f"{_words(sign)}: over-optimised"
        if languages:
            text += f"; {_name(languages[0])} first"
        text += f"; the best model is that of step {keep:,}. Rule: {_calibrated(constants)}"
        step = int(evaluations[course.stop]["step"])
        return Verdict("over-optimised", sign, step, keep, languages, text)
    if sign is not None:
        missing = constants.patience - _row(course.signs)
        text = f"{_words(sign)}: over-optimised if {_count(missing, 'more evaluation')} shows it too"
        state: State = "begins"
    else:
        text, state = f"no sign of over-optimisation: {_trend(evaluations)}", "none"
    if languages:
        text += f"; over-optimised by its own figures: {', '.join(map(_name, languages))}"
    return Verdict(state, sign, None, keep, languages, text)


def _languages(evaluations: Sequence[Mapping[str, float]], constants: Constants) -> tuple[str, ...]:
    """Return the over-optimised languages in the order in which their sign began."""
    codes = [name.removeprefix(f"{ENTROPY}/") for name in evaluations[0] if name.startswith(f"{ENTROPY}/")]
    found = []
    for code in codes:
        if not all(f"{name}/{code}" in one for one in evaluations for name in NEEDED):
            continue
        course = _course(evaluations, constants, f"/{code}")
        sign = course.signs[-1]
        if course.stop is not None and sign is not None:
            found.append((sign.since, course.stop, code))
    return tuple(code for _, _, code in sorted(found))


def _row(signs: Sequence[Sign | None]) -> int:
    """Return how many of the last evaluations show the sign of the last one."""
    last = signs[-1]
    assert last is not None
    count = 0
    for sign in reversed(signs):
        if sign is None or sign.name != last.name:
            break
        count += 1
    return count


def _words(sign: Sign) -> str:
    if sign.name == ENTROPY:
        return f"entropy has turned down since step {sign.since:,}, diversity still rises"
    return f"top-10 mass has fallen since step {sign.since:,}, entropy still rises"


def _trend(evaluations: Sequence[Mapping[str, float]]) -> str:
    """Describe the entropy from the first evaluation to the last."""
    first, last = evaluations[0], evaluations[-1]
    change = last[ENTROPY] - first[ENTROPY]
    verb = "rose" if change > 0 else "fell" if change < 0 else "stayed"
    return (
        f"the entropy {verb} from {first[ENTROPY]:.2f} bits at step {int(first['step']):,} to "
        f"{last[ENTROPY]:.2f} at step {int(last['step']):,}"
    )


def _calibrated(constants: Constants) -> str:
    if constants.calibration is None:
        return "its constants are not calibrated on runs with a known reward"
    return str(constants.calibration)


def _name(code: str) -> str:
    return LANGUAGES[code].name if code in LANGUAGES else code


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
