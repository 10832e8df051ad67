"""The regimes of adaptation, called as the plain functions they are."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from koine.errors import UserError
from koine.steps.adaptation import BEFORE, TRACK, adapt_to, move_to_tokenizer
from koine.steps.corpora import sample_corpus
from koine.steps.evaluation import tracked_languages
from koine.steps.tokenizers import build_tokenizer, tokenize_part
from koine.steps.training import pretrain

SIZES: dict[str, Any] = {
    "preset": "koine-0.5m",
    "vocabulary_size": 600,
    "sequence_length": 96,
    "batch_size": 2,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
    "dtype": "float32",
    "seed": 0,
    "threads": 1,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in three languages, two tokenizers, tokens, and a model of the primary language."""
    root = tmp_path_factory.mktemp("world")
    for name in ("corpus", "universal", "cluster", "documents", "chats", "model"):
        (root / name).mkdir()
    sample_corpus(
        languages=("de", "hi", "tr"),
        primary_cluster="european",
        primary_languages=(),
        documents_per_language=60,
        questions_per_language=30,
        code_bytes=0,
        seed=0,
        out=root / "corpus",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for scope in ("universal", "cluster"):
            build_tokenizer(
                root / "corpus",
                scope=scope,
                vocabulary_size=600,
                scheme="bucketed",
                english_share=0.3,
                sample_bytes=200_000,
                seed=0,
                out=root / scope,
            )
    tokenize_part(
        root / "corpus", root / "cluster", part="documents", domain="documents", out=root / "documents"
    )
    tokenize_part(
        root / "corpus", root / "cluster", part="questions/train", domain="chats", out=root / "chats"
    )
    pretrain(
        root / "corpus",
        root / "cluster",
        root / "documents",
        steps=2,
        code_share=0.0,
        english_share=0.3,
        evaluate_every=2,
        out=root / "model",
        **SIZES,
    )
    return root


def adapted(world: Path, out: Path, **parameters: Any) -> None:
    out.mkdir()
    adapt_to(
        world / "corpus",
        world / "cluster",
        world / "model",
        world / ("chats" if parameters.get("kind") == "chats" else "documents"),
        **{
            "kind": "text",
            "languages": (),
            "primary_share": 0.2,
            "steps": 4,
            "evaluate_every": 2,
            "evaluation_documents": 2,
            "evaluation_bytes": 200,
            **SIZES,
            **parameters,
        },
        out=out,
    )


def test_what_is_learnt_and_forgotten_is_counted_from_before_the_first_step(
    world: Path, tmp_path: Path
) -> None:
    adapted(world, tmp_path / "out")
    tracked = tracked_languages(tmp_path / "out" / TRACK)
    assert sorted(tracked) == [BEFORE, 2, 4]
    assert set(tracked[BEFORE]) == {"de", "hi", "tr"}
    forgetting = json.loads((tmp_path / "out" / "forgetting.json").read_text(encoding="utf-8"))
    for code, change in forgetting["change"].items():
        assert change == pytest.approx(tracked[4][code] - tracked[BEFORE][code])
    assert tracked[4]["hi"] < tracked[BEFORE]["hi"]


@pytest.mark.filterwarnings("ignore:.*lose their end:koine.errors.KoineWarning")
def test_targeted_regimes_see_the_chosen_language_alone(world: Path, tmp_path: Path) -> None:
    adapted(world, tmp_path / "one", languages=("hi",), primary_share=0.0, steps=2)
    assert set(tracked_languages(tmp_path / "one" / TRACK)[BEFORE]) == {"de", "hi"}
    training = json.loads((tmp_path / "one" / "training.json").read_text(encoding="utf-8"))
    (source,) = training["identity"]["mixture"]["phases"][0]["sources"]
    assert source["languages"] == {"hi": 1.0}
    adapted(world, tmp_path / "chats", kind="chats", languages=("hi", "tr"), primary_share=0.0, steps=2)
    assert (tmp_path / "chats" / "model.safetensors").exists()
    with pytest.raises(UserError, match="text or chats"):
        adapted(world, tmp_path / "wrong", kind="books")


@pytest.mark.parametrize("method", ["random", "focus"])
def test_a_moved_model_can_be_adapted(method: str, world: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    move_to_tokenizer(
        world / "model",
        world / "universal",
        world / "corpus",
        method=method,
        languages=("de", "hi", "tr"),
        seed=0,
        out=tmp_path / "moved",
    )
    counts = json.loads((tmp_path / "moved" / "metrics.json").read_text(encoding="utf-8"))
    assert counts["shared"] + counts["spelled"] == 600
    assert counts["dropped"] == counts["spelled"] > 0


def test_no_languages_are_all_of_the_corpus(world: Path, tmp_path: Path) -> None:
    """A method that learns from text must not learn from none in silence, and give the mean of the pieces."""
    for name, languages in (("all", ()), ("named", ("de", "hi", "tr"))):
        move_to_tokenizer(
            world / "model",
            world / "universal",
            world / "corpus",
            method="focus",
            languages=languages,
            seed=0,
            out=tmp_path / name,
        )
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("all", "named")]
    assert weights[0] == weights[1]


def test_expanded_text_comes_out_of_english(world: Path, tmp_path: Path) -> None:
    from koine.steps.training import with_english_share

    with pytest.raises(UserError, match="must be smaller"):
        pretrain(
            world / "corpus",
            world / "cluster",
            world / "documents",
            steps=1,
            code_share=0.0,
            english_share=0.3,
            expanded_share=0.4,
            evaluate_every=1,
            out=tmp_path,
            **SIZES,
        )
    weights = with_english_share(("en", "de", "fr"), (0.30 - 0.05) / 0.95)
    # of all text: 5 % expanded, 25 % English, 35 % each of the two others
    assert 0.95 * weights["en"] == pytest.approx(0.25)
    assert 0.95 * weights["de"] == pytest.approx(0.35)
