"""What recipes print when they have succeeded: where the answer is, and which commands go on from there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from koine.evaluate.example_questions import Examples, read_examples
from koine.plan.finished_run import FinishedRun, read_verdict
from koine.plan.formatting import hanging

SHOWN_EXAMPLES = 3


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Return lines of a label and what it says, the latter in one column."""
    width = max(len(label) for label, _ in rows) + 1
    return "\n".join(f"{label + ':':<{width}} {text}" for label, text in rows)


def trained_model(run: FinishedRun, report_holds: str, model: str) -> str:
    """Return where a recipe's report and model are, and the commands to look at the model.

    model: name of its artifact.
    """
    place: Path = run.folder / model
    return aligned(
        [
            (report_holds, run.path(run.folder / "report.html")),
            ("the model", run.path(place)),
            ("its sizes", run.command("model", "describe", place)),
            ("what it was made from", run.command("lineage", place)),
        ]
    )


def chat_answer(run: FinishedRun, comparison: Path) -> str:
    """Return the answer of a run that compares chat models and leaves one as `model`.

    It holds the verdict of the comparison's report, what each stage was for, questions that the model
    answers right, and the commands that go on.
    """
    model = run.folder / "model"
    lines = ["", "What each step was for (seconds of all its steps)", *run.stage_lines()]
    verdict = read_verdict(comparison)
    if verdict is not None:
        question, answer = verdict
        lines += ["", f"The question: {question}", *hanging("  ", answer)]
    examples = read_examples(model)
    if examples is not None:
        lines += ["", *example_lines(examples)]
    commands = [
        ("the report", run.path(run.folder / "report.html")),
        ("chat with it", run.command("chat", model)),
    ]
    if examples is not None and examples.examples:
        once = run.command("chat", model, "--once", examples.examples[0].question, "--temperature", "0")
        commands.append(("one answer", once))
    return "\n".join([*lines, "", aligned(commands)])


def example_lines(examples: Examples) -> list[str]:
    """Return how many questions of the evaluation were answered right, and a few of them."""
    shown = examples.examples[:SHOWN_EXAMPLES]
    share = f"{examples.right:,} of the {examples.asked:,} questions of its evaluation"
    if not examples.right:
        return [f"The model answered none of the {examples.asked:,} questions of its evaluation right."]
    if not shown:
        return [f"The model answered {share} right, none of them in one turn."]
    few = "" if len(shown) == SHOWN_EXAMPLES else f" Only {len(shown)} can be shown:"
    lines = [f"The model answered {share} right{'. For example:' if not few else f'.{few}'}"]
    for one in shown:
        lines += [f"  {one.question}", f"    {one.answer}"]
    return lines
