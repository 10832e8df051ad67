"""Tasks by name, and the prompts of a run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from koine.errors import UserError
from koine.evaluate.long_context import needles, ruler
from koine.evaluate.long_context.prompts import Material, Prompt

DEPTH_TASKS = ("single", "multi-key", "multi-key-full", "multi-needle")
"""Tasks with a needle at a given depth; they have grids."""
GROUPS = {
    "retrieval": (*DEPTH_TASKS, "multi-value", "multi-query"),
    "tracing": ("variable-tracking",),
    "counting": ("common-words", "frequent-words"),
    "questions": ("question-answering",),
}
"""Groups of tasks whose mean is drawn by length, as RULER does."""
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
POSITIONS, ATTENTION = "positions", "attention"
MEASURES = (*TASKS, POSITIONS, ATTENTION)


class Cell(NamedTuple):
    """Names a prompt: the same cell, seed and material give the same prompt.

    depth: a share; `None` for tasks without one.
    """

    task: str
    length: int
    depth: float | None
    number: int


class LeftOut(TypedDict):
    """A task that was left out, at one length or (`None`) at all."""

    task: str
    length: int | None
    why: str


def make_prompt(
    cell: Cell, *, seed: int, material: Material, questions: ruler.QuestionSet | None = None
) -> Prompt:
    """Make the prompt of a cell, from the arguments alone; questions: for `question-answering`."""
    length = cell.length
    rng = random.Random(f"{seed}:{cell.task}:{length}:{cell.depth}:{cell.number}")
    depth = 0.5 if cell.depth is None else cell.depth
    match cell.task:
        case "single":
            return needles.single(material, length, rng, depth=depth)
        case "multi-key":
            return needles.multi_key(material, length, rng, depth=depth)
        case "multi-key-full":
            return needles.multi_key_full(material, length, rng, depth=depth)
        case "multi-needle":
            return needles.multi_needle(material, length, rng, depth=depth)
        case "multi-value":
            return needles.multi_value(material, length, rng)
        case "multi-query":
            return needles.multi_query(material, length, rng)
        case "variable-tracking":
            return ruler.variable_tracking(material, length, rng)
        case "common-words":
            return ruler.common_words(material, length, rng)
        case "frequent-words":
            return ruler.frequent_words(material, length, rng)
    if cell.task != "question-answering" or questions is None:
        raise ValueError(f"no prompts for '{cell.task}' (questions: {questions is not None})")
    return ruler.question_answering(material, length, rng, questions=questions)


def plan_cells(
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    *,
    seed: int,
    material: Material,
    questions: ruler.QuestionSet | None,
    strict: bool,
) -> tuple[list[Cell], list[LeftOut]]:
    """Return the cell of every prompt, and what is left out for lack of room.

    Every prompt is made once here, so that no error comes hours later.

    Args:
        tasks: names; other measures are ignored.
        lengths: in tokens.
        depths: in per cent.
        samples: prompts of each length and depth; tasks without depths have as many of a length in all.
        seed: of the prompts.
        material: haystack, phrases and tokenizer.
        questions: for `question-answering`, which is left out without them.
        strict: raise `UserError` for a task that has room at no length.
    """
    planned: list[Cell] = []
    left_out: list[LeftOut] = []
    for task in (task for task in TASKS if task in tasks):
        if task == "question-answering" and questions is None:
            left_out.append({"task": task, "length": None, "why": "there are no questions in this language"})
            continue
        found: list[Cell] = []
        for length in sorted(lengths):
            if task in DEPTH_TASKS:
                cells = [
                    Cell(task, length, depth / 100, number) for depth in depths for number in range(samples)
                ]
            else:
                cells = [Cell(task, length, None, number) for number in range(samples * len(depths))]
            try:
                for cell in cells:
                    make_prompt(cell, seed=seed, material=material, questions=questions)
            except UserError as error:
                if strict and not found and length == max(lengths):
                    raise
                left_out.append({"task": task, "length": length, "why": error.what})
            else:
                found += cells
        planned += found
    return planned, left_out
