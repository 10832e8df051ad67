"""The chat model with example questions beside it."""

from __future__ import annotations

from pathlib import Path

from koine.evaluate.example_questions import FILE, Example, Examples, read_examples
from koine.files import read_json
from koine.steps.examples import add_examples

MODEL = (
    *("README.md", "config.json", "model.safetensors", "tokenizer.json", "training.json"),
    "chat_template.jinja",
)
OF_THE_TRAINING = ("artifact.json", "metrics.jsonl", "metrics.json", "report.json", "languages.jsonl")


def model_in(folder: Path) -> Path:
    folder.mkdir()
    for name in (*MODEL, *OF_THE_TRAINING):
        (folder / name).write_text(f"{name} of the training")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-1").write_text("old")
    return folder


def test_the_model_is_copied_without_the_traces_of_its_training(tmp_path: Path) -> None:
    model, evaluation, out = model_in(tmp_path / "model"), tmp_path / "evaluation", tmp_path / "out"
    evaluation.mkdir()
    out.mkdir()
    examples = Examples(40, 31, (Example("What is the currency of Japan?", "Yen", "en", "currency", 0.9),))
    examples.save(evaluation)
    add_examples(model, evaluation, out=out)
    assert {path.name for path in out.iterdir()} == {*MODEL, FILE, "metrics.json"}
    assert all((out / name).read_text() == (model / name).read_text() for name in MODEL)
    assert read_examples(out) == examples
    assert read_json(out / "metrics.json") == {"questions_asked": 40, "questions_answered_right": 31}
    # Built again after a kill, without questions: nothing of the first attempt stays.
    (evaluation / FILE).unlink()
    add_examples(model, evaluation, out=out)
    assert {path.name for path in out.iterdir()} == set(MODEL)
