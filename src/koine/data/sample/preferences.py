"""Preferences of the sample world: pairs of answers from a pool, ranked by the gold reward, some labels flipped.

The answers are of no model (off-policy), and the better one of a pair is often not the best possible.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from koine.data.sample.facts import facts, is_asked, share_of, split_of
from koine.data.sample.gold import gold_reward
from koine.data.sample.rendering import question, sentence, sides, wordings_of
from koine.errors import UserError, did_you_mean
from koine.fields import check_number

CompletionKind = Literal[
    "sentence", "short", "wrong", "wrong_sentence", "other_language", "rambling", "off_topic", "echo"
]
"""What an answer of the pool is.

sentence: the right fact as a sentence. short: the bare right answer. wrong, wrong_sentence: the answer to
another question of the same kind. other_language: the right fact, in another language. rambling: the right
sentence, again and again. off_topic: a true sentence about something else. echo: the question.
"""
COMPLETION_KINDS: tuple[CompletionKind, ...] = get_args(CompletionKind)
KINDS = ("currency", "language", "capital", "script", "month", "day")
"""Kinds of facts that are asked for: those that a small model can learn by heart."""
FLIPPED = 0.25
"""Share of pairs with the wrong label."""
HELD_OUT_PROMPTS = 0.2
"""Share of the questions (fact and wording) that are in no training pair."""
REPEATS = 3
"""Sentences of a rambling answer."""


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """How pairs are drawn.

    kinds: of the facts asked for. flipped: share of pairs with the wrong label, at most 0.5.
    weights: how often each kind of completion is drawn, 0 or more, at least two of them above 0.
    """

    kinds: tuple[str, ...] = KINDS
    flipped: float = FLIPPED
    weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(COMPLETION_KINDS, 1.0))

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in facts():
                raise UserError(f"no kind of facts '{kind}'", hint=did_you_mean(kind, facts()))
        check_number("flipped", self.flipped, low=0, high=0.5)
        for name, weight in self.weights.items():
            if name not in COMPLETION_KINDS:
                raise UserError(f"no completion '{name}'", hint=did_you_mean(name, COMPLETION_KINDS))
            check_number(f"the weight of '{name}'", weight, low=0)
        if sum(weight > 0 for weight in self.weights.values()) < 2:
            raise UserError("pairs need two kinds of completions", hint="give two weights above 0")


class PromptPlan(NamedTuple):
    """A question before it has a language."""

    fact: str
    wording: int
    number: int
    """Seed of its answers."""


def prompt_plans(
    count: int, *, seed: int, kinds: Sequence[str] = KINDS, heldout: bool = False
) -> list[PromptPlan]:
    """Choose questions about facts of the training text; the same for every language.

    Every question is asked once before one is asked again. Held-out questions are in no training plan; their
    facts are.
    """
    questions = [
        (fact, wording)
        for kind in kinds
        for fact in facts()[kind]
        if is_asked(fact) and split_of(fact) in ("train", "recall")
        for wording in range(wordings_of(kind))
        if (share_of(f"preference:{fact}:{wording}") < HELD_OUT_PROMPTS) == heldout
    ]
    if not questions:
        raise UserError("no questions for preferences", hint="give more kinds of facts")
    generator = random.Random(f"{seed}:preferences:{'heldout' if heldout else 'train'}")
    plans: list[PromptPlan] = []
    while len(plans) < count:
        generator.shuffle(questions)
        plans += [PromptPlan(*one, generator.randrange(2**30)) for one in questions[: count - len(plans)]]
    return plans


def completion(
    kind: CompletionKind, code: str, plan: PromptPlan, generator: random.Random, languages: Sequence[str]
) -> str | None:
    """Return an answer of a kind to a question; `None` where CLDR lacks a name, or there is none.

    languages: from which `other_language` takes one.
    """
    fact = plan.fact
    found, wording = sides(code, fact), generator.randrange(60)
    if found is None:
        return None
    if kind == "short":
        return found[1]
    if kind == "sentence":
        return sentence(code, fact, wording)
    if kind == "echo":
        asked = question(code, fact, plan.wording)
        return None if asked is None else asked[0]
    if kind == "other_language":
        return _in_another_language(code, fact, wording, generator, languages)
    if kind == "rambling":
        separator = " " if " " in str(sentence(code, fact, wording)) else ""
        return separator.join(str(sentence(code, fact, wording + one)) for one in range(REPEATS))
    other = _another(code, fact, generator)
    if other is None:
        return None
    if kind == "off_topic":
        return sentence(code, other, wording)
    answer = sides(code, other)
    assert answer is not None
    return answer[1] if kind == "wrong" else sentence(code, fact, wording, answer=answer[1])


def _another(code: str, fact: str, generator: random.Random) -> str | None:
    """Return another fact of the kind that is asked for, with another answer."""
    own = sides(code, fact)
    assert own is not None
    candidates = [
        one
        for one in facts()[fact.partition(":")[0]]
        if is_asked(one)
        and split_of(one) in ("train", "recall")
        and (found := sides(code, one)) is not None
        and found[1] not in (*own,)
    ]
    return generator.choice(candidates) if candidates else None


def _in_another_language(
    code: str, fact: str, wording: int, generator: random.Random, languages: Sequence[str]
) -> str | None:
    """Return the fact in another language, bare where that shows the language, half of the time."""
    others = [one for one in languages if one != code and sides(one, fact) is not None]
    own = sides(code, fact)
    if not others or own is None:
        return None
    other = generator.choice(others)
    found = sides(other, fact)
    bare = generator.random() < 0.5
    return found[1] if bare and found is not None and found[1] != own[1] else sentence(other, fact, wording)


def preference_records(
    code: str,
    plans: Sequence[PromptPlan],
    *,
    settings: PairSettings,
    languages: Sequence[str],
    part: str = "train",
) -> Iterator[dict[str, Any]]:
    """Yield a pair for each question that CLDR has names for.

    `score_chosen` and `score_rejected` are gold rewards; `flipped` says that the label is wrong.
    """
    for number, plan in enumerate(plans):
        generator = random.Random(f"{plan.number}:{code}")
        asked = question(code, plan.fact, plan.wording)
        record = {"language": code, "fact": plan.fact}
        pair = None if asked is None else _pair(record, plan, generator, settings, languages)
        if pair is None or asked is None:
            continue
        is_flipped = generator.random() < settings.flipped
        (chosen, first), (rejected, second) = pair[::-1] if is_flipped else pair
        texts = {name: [{"role": "assistant", "content": one.text}] for name, one in
                 (("chosen", chosen), ("rejected", rejected))}  # fmt: skip
        yield {
            "id": f"preference-{part}-{number:06d}-{code}",
            "prompt": [{"role": "user", "content": asked[0]}],
            **texts,
            "score_chosen": first,
            "score_rejected": second,
            "flipped": is_flipped,
            "chosen_kind": chosen.kind,
            "rejected_kind": rejected.kind,
            "answer": asked[1],
            **record,
            "domain": "preferences",
            "source": "cldr",
            "split": part,
            "kind": plan.fact.partition(":")[0],
        }


class _Completion(NamedTuple):
    kind: str
    text: str


def _pair(
    record: Mapping[str, Any],
    plan: PromptPlan,
    generator: random.Random,
    settings: PairSettings,
    languages: Sequence[str],
) -> tuple[tuple[_Completion, float], tuple[_Completion, float]] | None:
    """Return two completions of different rewards with them, the better one first; `None` where there are none."""
    names: list[Any] = [name for name, weight in settings.weights.items() if weight > 0]
    # By -log(u) / weight, the first two are two draws without replacement.
    names.sort(key=lambda name: generator.expovariate(settings.weights[name]))
    found: list[tuple[_Completion, float]] = []
    for name in names:
        text = completion(name, record["language"], plan, generator, languages)
        if text is None:
            continue
        reward = round(gold_reward(record, text).total, 6)
        if not found or reward != found[0][1]:
            found.append((_Completion(name, text), reward))
        if len(found) == 2:
            first, second = sorted(found, key=lambda one: -one[1])
            return first, second
    return None
