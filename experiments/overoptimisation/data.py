"""Data of one seed: chats to teach, pairs to train on, and what the policies are measured with."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from koine.data.sample.facts import facts, is_asked, split_of
from koine.data.sample.preferences import (
    KINDS,
    CompletionKind,
    PairSettings,
    PromptPlan,
    completion,
    preference_records,
    prompt_plans,
)
from koine.data.sample.rendering import question
from koine.files import write_json
from koine.plan import Estimate, step
from koine.plan.run.progress import report

RIVALS: dict[str, CompletionKind] = {"strong": "sentence", "weak": "wrong"}
"""Competitors' answers that are of no model; the third are the taught model's own (`measure.measure_start`)."""


def needs(*, languages: tuple[str, ...], chats: int, pairs: int, **_: Any) -> Estimate:
    """Return the estimate of `preference_data`: a gold reward takes a millisecond."""
    records = len(languages) * (chats + 3 * pairs)
    return Estimate(120 * 2**20, 3.0 + records / 1_000, 700 * records)


@step(version="1", estimate=needs)
def preference_data(
    *,
    languages: tuple[str, ...],
    chats: int,
    pairs: int,
    heldout_pairs: int,
    prompts: int,
    memory: int,
    styles: dict[str, float],
    weights: dict[str, float],
    flipped: float,
    seed: int,
    out: Path,
) -> None:
    """Write chats, preferences, and prompts of one seed.

    `chats/`, `pairs/` (a file a language), `heldout.jsonl` (pairs), `prompts.jsonl`, `memory.jsonl`. Pairs and
    chats share questions; held-out pairs and prompts ask other questions about the same facts. `memory` asks
    the chats' own questions.

    Args:
        languages: with questions in the sample world.
        chats, pairs, heldout_pairs, prompts, memory: records of each language.
        styles: weights of the kinds of answers in the chats.
        weights: weights of the kinds of answers in the pairs.
        flipped: share of the training pairs with the wrong label; the held-out ones have none.
        seed: of all draws.
        out: folder to write to.
    """
    settings = PairSettings(flipped=flipped, weights=weights)
    counts: dict[str, int] = {}
    parts: dict[str, list[dict[str, Any]]] = {"heldout": [], "prompts": [], "memory": []}
    for number, code in enumerate(languages):
        plans = prompt_plans(chats, seed=seed)
        counts[f"chats/{code}"] = _write(
            out / "chats" / f"{code}.jsonl", chat_records(code, plans, styles, languages)
        )
        asked = prompt_plans(pairs, seed=seed + 1)
        records = preference_records(code, asked, settings=settings, languages=languages)
        counts[f"pairs/{code}"] = _write(out / "pairs" / f"{code}.jsonl", records)
        held = prompt_plans(heldout_pairs, seed=seed, heldout=True)
        right = PairSettings(flipped=0.0, weights=weights)
        parts["heldout"] += preference_records(code, held, settings=right, languages=languages, part="test")
        answered = prompt_plans(prompts, seed=seed + 1, heldout=True)
        parts["prompts"] += prompt_records(code, answered, languages)
        parts["memory"] += memory_records(code, memory, seed)
        report((number + 1) / len(languages), code)
    for name, part in parts.items():
        counts[name] = _write(out / f"{name}.jsonl", part)
    write_json(out / "metrics.json", counts)


def chat_records(
    code: str, plans: Sequence[PromptPlan], styles: Mapping[str, float], languages: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield chats whose answers are drawn from the pool in the proportions of `styles`."""
    for number, plan in enumerate(plans):
        generator = random.Random(f"{plan.number}:{code}:chat")
        [kind] = generator.choices(list(styles), list(styles.values()))
        asked = question(code, plan.fact, plan.wording)
        text = completion(cast("CompletionKind", kind), code, plan, generator, languages)
        if asked is not None and text is not None:
            messages = [{"role": "user", "content": asked[0]}, {"role": "assistant", "content": text}]
            yield {"id": f"chat-{number:06d}-{code}", "messages": messages, "language": code, "style": kind}


def prompt_records(
    code: str, plans: Sequence[PromptPlan], languages: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield prompts with the competitors' answers of `RIVALS`."""
    for number, plan in enumerate(plans):
        generator = random.Random(f"{plan.number}:{code}:rivals")
        asked = question(code, plan.fact, plan.wording)
        rivals = {name: completion(kind, code, plan, generator, languages) for name, kind in RIVALS.items()}
        if asked is not None and None not in rivals.values():
            yield {
                "id": f"prompt-{number:04d}-{code}",
                "prompt": [{"role": "user", "content": asked[0]}],
                "answer": asked[1],
                "language": code,
                "fact": plan.fact,
                "rivals": rivals,
            }


def memory_records(code: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield questions about `count` facts in a wording of the chats, with their bare answers."""
    known = {plan.fact: plan for plan in prompt_plans(5_000, seed=seed)}
    names = [fact for kind in KINDS for fact in facts()[kind] if is_asked(fact) and fact in known]
    assert all(split_of(fact) in ("train", "recall") for fact in names)
    random.Random(f"{seed}:memory").shuffle(names)
    for fact in names[:count]:
        asked = question(code, fact, known[fact].wording)
        if asked is not None:
            prompt = [{"role": "user", "content": asked[0]}]
            record = {"id": f"memory-{fact}-{code}", "prompt": prompt, "answer": asked[1]}
            yield {**record, "language": code, "fact": fact}


def _write(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write JSON Lines; return the number of records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
