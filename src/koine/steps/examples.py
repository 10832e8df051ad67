"""The step that puts example questions beside a chat model."""

from __future__ import annotations

import shutil
from pathlib import Path

from koine.data.drawn import FILE as DRAWN
from koine.evaluate.example_questions import FILE, read_examples
from koine.files import write_json
from koine.model.formats.carried_files import carried_paths
from koine.plan import step
from koine.steps import checks, estimates
from koine.steps.evaluation import LANGUAGE_TRACK

MADE_BY_THE_TRAINING = (LANGUAGE_TRACK, "forgetting.json")
"""Files of earlier trainings that every later one carries along; they are no part of the model."""
ABOUT_THE_MODEL = ("README.md", "training.json", DRAWN)
"""Files that stay true of the copy: its card, and what the next training and the chat read."""


@step(version="1", estimate=estimates.copy, check=checks.copied)
def add_examples(model: Path, evaluation: Path, *, out: Path) -> None:
    """Copy a chat model; example questions that it answered right go beside it.

    evaluation: folder that `evaluate_model` wrote about this model.
    """
    about = [Path(name) for name in ABOUT_THE_MODEL if (model / name).exists()]
    for inside in [*map(Path, carried_paths(model)), *about]:
        if inside.name not in MADE_BY_THE_TRAINING:
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model / inside, out / inside)
    examples = read_examples(evaluation)
    if examples is None:
        for name in (FILE, "metrics.json"):
            (out / name).unlink(missing_ok=True)
        return
    examples.save(out)
    write_json(
        out / "metrics.json", {"questions_asked": examples.asked, "questions_answered_right": examples.right}
    )
