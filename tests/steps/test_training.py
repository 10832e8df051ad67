"""The training step, called as a plain function: new models, adaptation, fine-tuning on chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from koine.errors import UserError
from koine.model import preset
from koine.steps.evaluation import LANGUAGE_TRACK, tracked_languages
from koine.steps.text_mixture import TextMixture, adaptation_sources
from koine.steps.training import BEFORE_TRAINING, HeldOutProbe, train_model, training_settings
from tests.steps.worlds import CONFIG, mixture, settings, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def adapt(
    world: Path, out: Path, *, languages: tuple[str, ...] = (), primary_share: float = 0.2, steps: int = 4
) -> None:
    sources = adaptation_sources(languages, primary_share)
    out.mkdir()
    train_model(
        world / "model",
        {source.name: world / "documents" for source in sources},
        world / "cluster",
        world / "corpus",
        mixture=mixture(sources, steps),
        settings=settings(steps, evaluate_every=2, schedule="constant"),
        config=CONFIG,
        probe=HeldOutProbe(
            groups={"primary": ("primary",), "adapted": languages or ("expanded",)},
            documents=2,
            max_bytes=200,
            track_languages=True,
        ),
        out=out,
    )


def test_languages_are_tracked_from_before_the_first_step(world: Path, tmp_path: Path) -> None:
    adapt(world, tmp_path / "out")
    tracked = tracked_languages(tmp_path / "out" / LANGUAGE_TRACK)
    assert sorted(tracked) == [BEFORE_TRAINING, 2, 4]
    assert set(tracked[BEFORE_TRAINING]) == {"de", "hi", "tr"}
    forgetting = json.loads((tmp_path / "out" / "forgetting.json").read_text(encoding="utf-8"))
    for code, change in forgetting["change"].items():
        assert change == pytest.approx(tracked[4][code] - tracked[BEFORE_TRAINING][code])
    assert tracked[4]["hi"] < tracked[BEFORE_TRAINING]["hi"]
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["title"] == "Adapted to hi, tr"
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics) == {"loss", "bits_per_byte_primary", "bits_per_byte_adapted"}


def test_targeted_adaptation_trains_on_the_chosen_language_alone(world: Path, tmp_path: Path) -> None:
    adapt(world, tmp_path / "one", languages=("hi",), primary_share=0.0, steps=2)
    assert set(tracked_languages(tmp_path / "one" / LANGUAGE_TRACK)[BEFORE_TRAINING]) == {"de", "hi"}
    training = json.loads((tmp_path / "one" / "training.json").read_text(encoding="utf-8"))
    (source,) = training["identity"]["mixture"]["phases"][0]["sources"]
    assert source["languages"] == {"hi": 1.0}


@pytest.mark.filterwarnings("ignore:.*lose their end:koine.errors.KoineWarning")
def test_fine_tuning_on_chats(world: Path, tmp_path: Path) -> None:
    sources = adaptation_sources(("hi", "tr"), 0.0)
    train_model(
        world / "model",
        {"adapted": world / "chats"},
        mixture=mixture(sources, 2, packing="no_split"),
        settings=settings(2, schedule="linear"),
        objective="fine-tuning",
        out=tmp_path,
    )
    training = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert "SupervisedFineTuning" in str(training["identity"]["objective"])


def test_a_training_with_mismatched_inputs_is_refused(world: Path, tmp_path: Path) -> None:
    sources = adaptation_sources((), 0.0)
    fields: dict[str, Any] = {"mixture": mixture(sources, 1), "settings": settings(1), "out": tmp_path}
    tokens = {"adapted": world / "documents"}
    with pytest.raises(UserError, match="another model than expected: vocab_size is 600, not 700"):
        train_model(world / "model", tokens, config=preset("koine-0.5m", 700), **fields)
    with pytest.raises(UserError, match="the text gave 600 of the 700 tokens asked for"):
        train_model(None, tokens, world / "cluster", config=preset("koine-0.5m", 700), **fields)
    with pytest.raises(UserError, match="a new model needs a config"):
        train_model(None, tokens, world / "cluster", world / "corpus", **fields)
    with pytest.raises(UserError, match="'expanded' is a role of languages, and no corpus is given"):
        train_model(world / "model", tokens, **fields)
    with pytest.raises(UserError, match="steps is 0; it must be at least 1"):
        TextMixture(sources=sources, steps=0, sequence_length=8, batch_size=1)
    with pytest.raises(UserError, match="learning_rate is 0"):
        training_settings(steps=1, learning_rate=0.0)
