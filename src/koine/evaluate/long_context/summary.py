"""Means of the scores by task, group, length and depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from koine.evaluate.bootstrap import bootstrap_interval
from koine.evaluate.long_context.prompts import Prompt
from koine.evaluate.long_context.tasks import GROUPS, Cell, LeftOut
from koine.evaluate.wilson import wilson_interval

if TYPE_CHECKING:
    from koine.evaluate.long_context.scores import Score
    from koine.tokenizer import Tokenizer

_SHOWN = 400


@dataclass(frozen=True)
class Scored:
    """A prompt with its score."""

    cell: Cell
    prompt: Prompt
    score: Score


def by_task(scored: Sequence[Scored], left_out: Sequence[LeftOut] = (), *, seed: int) -> dict[str, Any]:
    """Return `{task: {length: {"value", "interval", "exact", "logprob", "samples"}}}`.

    The interval is that of the value, over prompts (`score_interval`). A task that was left out at a length has an entry of
    nulls, with the reason as "why".
    """
    result: dict[str, Any] = {}
    for (task, length), scores in _grouped(scored).items():
        interval = score_interval([one.score for one in scores], seed=seed)
        result.setdefault(task, {})[str(length)] = {
            "value": fmean(one.score for one in scores),
            "interval": None if interval is None else list(interval),
            "exact": fmean(one.exact for one in scores),
            "logprob": fmean(one.logprob for one in scores),
            "samples": len(scores),
        }
    for one in left_out:
        if one["length"] is not None:
            nothing = dict.fromkeys(("value", "interval", "exact", "logprob"))
            entry = {**nothing, "samples": 0, "why": one["why"]}
            result.setdefault(one["task"], {})[str(one["length"])] = entry
    return {
        task: dict(sorted(lengths.items(), key=lambda item: int(item[0]))) for task, lengths in result.items()
    }


def score_interval(scores: Sequence[float], *, seed: int) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean score: Wilson's where every score is 0 or 1, else the bootstrap's.

    The bootstrap has no width where all scores are equal; `None` of a single one.
    """
    if set(scores) <= {0.0, 1.0}:
        return wilson_interval(fmean(scores), len(scores))
    return bootstrap_interval(scores, seed=seed)


def _grouped(scored: Sequence[Scored]) -> dict[tuple[str, int], list[Score]]:
    found: dict[tuple[str, int], list[Score]] = {}
    for one in scored:
        found.setdefault((one.cell.task, one.cell.length), []).append(one.score)
    return found


def by_group(scored: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """Return `{group: {length: value}}`, the mean over a group's tasks with equal weights.

    A length is left out where one of the tasks has no score.
    """
    grouped = _grouped(scored)
    result: dict[str, dict[str, float]] = {}
    for group, members in GROUPS.items():
        tasks = [task for task in members if any(task == run for run, _ in grouped)]
        for length in dict.fromkeys(length for _, length in grouped):
            if tasks and all((task, length) in grouped for task in tasks):
                result.setdefault(group, {})[str(length)] = fmean(
                    fmean(one.score for one in grouped[task, length]) for task in tasks
                )
    return result


def grids(scored: Sequence[Scored], lengths: Sequence[int], depths: Sequence[float]) -> dict[str, Any]:
    """Return `{task: {"lengths", "depths", "score" | "exact" | "logprob"}}` for tasks with depths (per cent).

    A score has a row a depth and a column a length; `None` where there was no room.
    """
    result: dict[str, Any] = {}
    for task in dict.fromkeys(one.cell.task for one in scored if one.cell.depth is not None):
        cells: dict[tuple[float | None, int], list[Score]] = {}
        for one in scored:
            if one.cell.task == task:
                cells.setdefault((one.cell.depth, one.cell.length), []).append(one.score)
        result[task] = {"lengths": list(lengths), "depths": list(depths)}
        for name in ("score", "exact", "logprob"):
            result[task][name] = [
                [
                    _mean([getattr(one, name) for one in cells.get((depth / 100, length), [])])
                    for length in lengths
                ]
                for depth in depths
            ]
    return result


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def examples(scored: Sequence[Scored], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the first prompt of each task: needles, question, expected and written answer."""
    first: dict[str, Scored] = {}
    for one in scored:
        first.setdefault(one.cell.task, one)
    found = []
    for task, one in first.items():
        ids = one.prompt.tokens
        needles = [tokenizer.decode(ids[start:end]).strip() for start, end in one.prompt.needles]
        found.append(
            {
                "task": task,
                "length": one.cell.length,
                "needles": [text[:_SHOWN] for text in needles],
                "question": tokenizer.decode(ids[slice(*one.prompt.question)]).strip(),
                "expected": list(one.prompt.expected),
                "written": one.score.written,
                "score": one.score.score,
            }
        )
    return found
