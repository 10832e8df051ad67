"""Context extension: the stages' mixtures and rates, and a model that learns to use what is far away."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.data.mixture import Shape
from koine.errors import UserError
from koine.files import read_json
from koine.model import Decoder, load_model, preset, save_model
from koine.plan import Plan
from koine.recipes.context_extension import extend
from koine.steps.context_extension import compare_lengths, evaluate_lengths, extend_stage, stage_mixture
from koine.steps.corpora import text_corpus
from koine.steps.tokenizers import tokenize_part
from koine.tokenizer import train_tokenizer

WORDS = ["river", "sea", "stone", "wind", "hill", "road", "lake", "wood", "field", "bridge", "tower", "gate"]


def text(number: int, words: int) -> str:
    """The same dozen words in an order of its own, again and again: known to whoever sees further back than a dozen words."""
    order = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(number)).tolist()
    return " ".join(WORDS[order[index % len(order)]] for index in range(words))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text with some long documents, a tokenizer, a model with room for 16 positions."""
    root = tmp_path_factory.mktemp("extend")
    records = [{"id": str(n), "text": text(n, 200 if n % 2 else 8), "language": "en"} for n in range(120)]
    (root / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("corpus", "tokens", "given"):
        (root / name).mkdir()
    text_corpus(
        root / "text.jsonl",
        fields=(),
        languages=(),
        max_bytes_per_language=1_000_000,
        min_bytes_per_language=1_000,
        max_bad_share=0.0,
        out=root / "corpus",
    )
    tokenizer = train_tokenizer(
        {"en": lambda: [record["text"] for record in records]},
        vocab_size=340,
        english_share=None,
        min_frequency=2,
    )
    tokenizer.save(root / "given")
    torch.manual_seed(0)
    config = preset("koine-0.5m", tokenizer.vocab_size, window=16)
    save_model(Decoder(replace(config, max_position_embeddings=16)), root / "given")
    tokenize_part(root / "corpus", root / "given", part="documents", domain="documents", out=root / "tokens")
    return root


def stage(world: Path, model: Path, out: Path, **fields: Any) -> None:
    out.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extend_stage(
            model,
            world / "given",
            world / "tokens",
            world / "tokens",
            **{
                "base_length": 16,
                "length": 16,
                "long_every": 2,
                "long_min_tokens": 0,
                "rope_theta": 0.0,
                "steps": 60,
                "batch_size": 16,
                "micro_batch_size": 16,
                "learning_rate": 5e-3,
                "final_learning_rate": 2e-3,
                "warmup_steps": 4,
                "dtype": "float32",
                "seed": 0,
                "threads": 1,
                **fields,
            },
            out=out,
        )


def test_two_stages_and_what_they_gain(world: Path, tmp_path: Path) -> None:
    """A row of 16 tokens is too short for the order to come again; only the stage with rows of 128 can learn to look back."""
    stage(world, world / "given", tmp_path / "short")
    stage(
        world,
        tmp_path / "short",
        tmp_path / "long",
        length=128,
        long_min_tokens=64,
        rope_theta=50_000.0,
        steps=130,
        learning_rate=8e-3,
        seed=1,
    )
    for name in ("short", "long"):
        (tmp_path / f"evaluation-{name}").mkdir()
        evaluate_lengths(
            world / "corpus",
            tmp_path / name,
            lengths=(16, 128),
            documents=4,
            seed=0,
            threads=1,
            out=tmp_path / f"evaluation-{name}",
        )
    compare_lengths(
        {"16": tmp_path / "evaluation-short", "128": tmp_path / "evaluation-long"},
        lengths=(16, 128),
        out=tmp_path,
    )
    results = read_json(tmp_path / "results.json")
    bits = results["bits_per_byte"]
    assert bits["128"]["128"] < 0.8 * bits["16"]["128"]
    assert abs(results["gain"]["16"]) < 0.005
    assert results["gain"]["128"] == bits["128"]["16"] - bits["128"]["128"] > 0.015
    assert read_json(tmp_path / "report.json")["blocks"][1]["rows"][0][0] == "after 16"

    config = load_model(tmp_path / "long").config
    assert (config.rope_theta, config.max_position_embeddings) == (50_000.0, 128)
    about = read_json(tmp_path / "long" / "training.json")
    assert about["settings"]["gradient_checkpointing"] is True
    lines = [json.loads(line) for line in (tmp_path / "long" / "metrics.jsonl").read_text().splitlines()]
    assert [line["sequence_length"] for line in lines[:4]] == [16, 128, 16, 128]


def test_the_mixture_of_a_stage(tmp_path: Path) -> None:
    def shapes(length: int, every: int, batch: int = 16) -> dict[Shape, int]:
        mixture = stage_mixture(
            tmp_path, tmp_path, base_length=512, length=length, long_every=every, long_min_tokens=0, steps=20,
            batch_size=batch, seed=0,
        )  # fmt: skip
        return mixture.shapes()

    assert shapes(512, 4) == {Shape(512, 16): 20}
    assert shapes(2048, 4) == {Shape(512, 16): 15, Shape(2048, 4): 5}
    assert shapes(8192, 4, batch=8) == {Shape(512, 8): 15, Shape(8192, 1): 5}
    assert shapes(2048, 1) == {Shape(2048, 4): 20}


def test_the_plan(world: Path, tmp_path: Path) -> None:
    plan = Plan("extend", tmp_path)
    extend(
        plan,
        model=world / "given",
        data=world / "text.jsonl",
        lengths=(16, 64, 128),
        steps=(60, 30, 10),
        thetas=(1e4, 1e5, 1e6),
        learning_rate=1.0,
        final_rate_share=0.1,
    )
    stages = [plan.nodes[name].parameters for name in ("stage/16", "stage/64", "model")]
    rates = [(one["learning_rate"], one["final_learning_rate"]) for one in stages]
    assert rates == [pytest.approx(pair) for pair in ((1.0, 0.46), (0.46, 0.19), (0.19, 0.1))]
    assert [one["rope_theta"] for one in stages] == [1e4, 1e5, 1e6]
    assert [one["long_min_tokens"] for one in stages] == [0, 32, 64]
    assert {f"evaluation/{name}" for name in ("given", "16", "64", "128")} <= plan.nodes.keys()
    for wrong, line in (
        ({"lengths": (64, 64, 128)}, "each must be longer"),
        ({"steps": (1, 2)}, "2 numbers of steps for 3 lengths"),
        ({"thetas": (1.0,)}, "1 thetas for 3 lengths"),
        ({"long_every": 0}, "long_every is 0"),
    ):
        fields: dict[str, Any] = {"lengths": (16, 64, 128), **wrong}
        with pytest.raises(UserError, match=line):
            extend(Plan("x", tmp_path), model=world / "given", data=world / "text.jsonl", **fields)
