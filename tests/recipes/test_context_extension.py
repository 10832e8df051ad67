"""Context extension: the stages' mixtures and rates, and a model that learns to use what is far away."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.errors import UserError
from koine.files import read_json
from koine.model import Decoder, load_model, preset, save_model, variant_name
from koine.plan.loading import make_plan
from koine.recipes.context_extension import extend
from koine.steps.attention import put_attention
from koine.steps.comparison import compare_lengths
from koine.steps.corpora import text_corpus
from koine.steps.evaluation import evaluate_lengths
from koine.steps.text_mixture import LongText, TextMixture, TextSource
from koine.steps.tokenizers import tokenize_part
from koine.steps.training import train_model, training_settings
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


def stage(
    model: Path,
    world: Path,
    out: Path,
    *,
    steps: int,
    long: LongText | None = None,
    learning_rate: float = 5e-3,
    seed: int = 0,
    **more: Any,
) -> None:
    """One stage of training, in a folder of its own."""
    out.mkdir()
    mixture = TextMixture(
        sources=(TextSource(name="text"),),
        steps=steps,
        sequence_length=16,
        batch_size=16,
        seed=seed,
        long=long,
    )
    settings = training_settings(
        steps=steps,
        learning_rate=learning_rate,
        schedule="linear",
        min_lr_ratio=0.4,
        warmup_steps=4,
        dtype="float32",
        gradient_checkpointing=long is not None,
        seed=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_model(
            model,
            {"text": world / "tokens", "long": world / "tokens"},
            world / "given",
            mixture=mixture,
            settings=settings,
            context_length=mixture.max_length,
            out=out,
            **more,
        )


def test_a_stage_with_long_rows_gains_at_long_context(world: Path, tmp_path: Path) -> None:
    """A row of 16 tokens is too short for the order to come again; only rows of 128 teach to look back."""
    stage(world / "given", world, tmp_path / "short", steps=60)
    long = LongText(every=2, sequence_length=128, source=TextSource(name="long", min_tokens=64))
    stage(
        tmp_path / "short",
        world,
        tmp_path / "long",
        steps=130,
        long=long,
        learning_rate=8e-3,
        seed=1,
        rope_theta=50_000.0,
    )
    for name in ("short", "long"):
        (tmp_path / f"evaluation-{name}").mkdir()
        evaluate_lengths(
            world / "corpus",
            tmp_path / name,
            lengths=(16, 128),
            documents=4,
            seed=0,
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


def test_the_plan_has_a_stage_for_each_length(world: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": world / "given", "data": world / "text.jsonl"}
    plan = make_plan(
        extend,
        {
            **given,
            "lengths": (16, 64, 128),
            "steps": (60, 30, 10),
            "thetas": (1e4, 1e5, 1e6),
            "learning_rate": 1.0,
            "final_rate_share": 0.1,
        },
        runs=tmp_path,
    )
    stages = [plan.nodes[name].parameters for name in ("stage/16", "stage/64", "model")]
    settings = [one["settings"] for one in stages]
    rates = [(one.learning_rate, one.learning_rate * one.min_lr_ratio) for one in settings]
    assert rates == [pytest.approx(pair) for pair in ((1.0, 0.46), (0.46, 0.19), (0.19, 0.1))]
    assert [one["rope_theta"] for one in stages] == [1e4, 1e5, 1e6]
    assert [one["context_length"] for one in stages] == [16, 64, 128]
    long = [one["mixture"].long for one in stages]
    assert [one and one.source.min_tokens for one in long] == [None, 32, 64]
    assert {f"evaluation/{name}" for name in ("given", "16", "64", "128")} <= plan.nodes.keys()
    assert plan.threads_of("model") == 2


def test_another_attention_is_put_on_first_and_healed_by_the_stages(world: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": world / "given", "data": world / "text.jsonl", "lengths": (16, 64)}
    chosen = {"attention": "rnope-swa", "window": 8, "full_every": 2}
    plan = make_plan(extend, {**given, **chosen, "steps": (3, 4)}, runs=tmp_path)
    assert {"evaluation/given", "evaluation/changed"} <= plan.nodes.keys()
    assert [parent for parent in plan.nodes["stage/16"].parents if parent.startswith("stage")] == [
        "stage/changed"
    ]
    (tmp_path / "changed").mkdir()
    put_attention(world / "given", **chosen, out=tmp_path / "changed")
    before, after = load_model(world / "given"), load_model(tmp_path / "changed")
    assert variant_name(after.config) == "RNoPE-SWA 1:1, window 8, θ 10,000"
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters(), strict=True))
    stage(tmp_path / "changed", world, tmp_path / "trained", steps=2)
    assert load_model(tmp_path / "trained").config == after.config


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"window": 8}, "a window or a ratio of full layers without attention"),
        ({"attention": "swa"}, "attention is 'swa'"),
        ({"lengths": (64, 64, 128)}, "each must be longer"),
        ({"steps": (1, 2)}, "2 numbers of steps for 3 lengths"),
        ({"thetas": (1.0,)}, "1 thetas for 3 lengths"),
        ({"long_every": 0}, "long_every is 0"),
        ({"long_share_of_length": 1.5}, "long_share_of_length is 1.5"),
    ],
)
def test_stages_that_do_not_fit_are_refused(
    world: Path, tmp_path: Path, wrong: dict[str, Any], line: str
) -> None:
    fields = {"model": world / "given", "data": world / "text.jsonl", "lengths": (16, 64, 128), **wrong}
    with pytest.raises(UserError, match=line):
        make_plan(extend, fields, runs=tmp_path)
