"""The first lines of a chat: the model, the context that it was trained on, questions to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.evaluate.example_questions import Examples, read_examples
from koine.files import read_json
from koine.plan.formatting import hanging


@dataclass(frozen=True)
class Opening:
    """What a model's folder says about itself.

    trained_context: tokens of the longest rows that the model was trained on; None where it is not known.
    problems: files that could not be read, one line each. The chat works without them.
    """

    trained_context: int | None = None
    examples: Examples | None = None
    problems: tuple[str, ...] = ()

    def lines(self, described: str, context: int) -> list[str]:
        """Return the lines that open a chat.

        described: the engine's line about the model. context: its context in tokens.
        """
        notes = []
        if self.trained_context is not None:
            worse = "; longer chats get worse answers" if self.trained_context < context else ""
            notes.append(f"It was trained on {self.trained_context:,} tokens at a time{worse}.")
        if self.examples is not None and self.examples.examples:
            notes.append(
                f"It answered {self.examples.right:,} of {self.examples.asked:,} questions right "
                "in its evaluation, such as:"
            )
            notes += [f"  {one.question}" for one in self.examples.examples]
        if not notes:
            return [f"{described}; /help lists the commands", *self.problems]
        return [*hanging("", described), *notes, *self.problems, "/help lists the commands."]


def read_opening(model: Path) -> Opening:
    """Return what a model directory says about its training and its evaluation."""
    problems = []
    examples, training = None, None
    try:
        examples = read_examples(model)
    except UserError as error:
        problems.append(f"(no example questions: {error})")
    try:
        training = read_json(model / "training.json") if (model / "training.json").exists() else None
    except UserError as error:
        problems.append(f"(length of the training texts unknown: {error})")
    return Opening(trained_context(training), examples, tuple(problems))


def trained_context(training: Any) -> int | None:
    """Return the tokens of the longest rows of a training, from the content of its `training.json`.

    None where the content is another program's.
    """
    mixture = training.get("mixture") if isinstance(training, Mapping) else None
    if not isinstance(mixture, Mapping):
        return None
    phases = mixture.get("phases")
    parts = [mixture]
    for phase in phases if isinstance(phases, list) else []:
        if isinstance(phase, Mapping):
            parts += [part for part in (phase, phase.get("long")) if isinstance(part, Mapping)]
    lengths = [part.get("sequence_length") for part in parts]
    return max((length for length in lengths if isinstance(length, int)), default=None)
