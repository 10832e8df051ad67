"""The steps around tokenizers: moving a model to another one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from koine.steps.tokenizers import move_to_tokenizer
from tests.steps.worlds import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("method", ["random", "focus"])
def test_a_model_is_moved_to_another_tokenizer(method: str, world: Path, tmp_path: Path) -> None:
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


def test_no_language_named_means_all_of_the_corpus(world: Path, tmp_path: Path) -> None:
    """Without text, a method that learns from it would silently return the mean of the subwords."""
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
