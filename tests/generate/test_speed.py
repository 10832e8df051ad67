"""Speed by context length: the KV cache by closed forms, what is left out, how many runs there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from koine.errors import UserError
from koine.generate import LocalEngine
from koine.generate.speed import NEW_TOKENS, LengthSpeed, Spread, measure_lengths
from koine.model import Decoder, preset, save_model
from koine.tokenizer import train_tokenizer

TEXT = list(range(20, 300))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    words = [f"a river and a hill and {n} stones" for n in range(200)]
    train_tokenizer({"en": lambda: words}, vocab_size=300, english_share=None, min_frequency=1).save(path)
    return path


def neox(folder: Path, tokenizer_folder: Path) -> LocalEngine:
    """A class that opens through transformers."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return LocalEngine(folder, dtype="float32")


def ours(folder: Path, tokenizer_folder: Path, positions: int) -> LocalEngine:
    torch.manual_seed(0)
    config = replace(preset("koine-0.5m", 400, window=64), max_position_embeddings=positions)
    save_model(Decoder(config), folder)
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return LocalEngine(folder, dtype="float32")


def checked(one: LengthSpeed, runs: int) -> None:
    assert one.runs == runs
    for found in (one.prefill_per_second, one.decode_per_second):
        assert found is not None
        assert 0 < found.low <= found.median <= found.high


def test_a_model_of_transformers_has_its_cache_measured(tmp_path: Path, tokenizer_folder: Path) -> None:
    found = measure_lengths(
        neox(tmp_path, tokenizer_folder), TEXT, [128, 256, 512], repeats=2, max_seconds=60
    )
    assert [one.tokens for one in found] == [128, 256, 512]
    for one in found[:2]:
        checked(one, 2)
        # Keys and values of 3 layers, 4 heads of 8, in float32.
        assert (one.cache_bytes, one.cache_basis) == (2 * 3 * 4 * 8 * 4 * one.tokens, "measured")
    assert found[2] == LengthSpeed(tokens=512, left_out="beyond the model's context of 256 tokens")


def test_our_decoder_has_its_cache_computed(tmp_path: Path, tokenizer_folder: Path) -> None:
    engine = ours(tmp_path, tokenizer_folder, 1024)
    assert isinstance(engine.model, Decoder)
    config = engine.model.config
    found = measure_lengths(engine, TEXT, [128], repeats=1, max_seconds=60)
    checked(found[0], 1)
    held = sum(128 if layer.window is None else 64 for layer in config.layers)
    assert (found[0].cache_bytes, found[0].cache_basis) == (2 * config.kv_size * 4 * held, "computed")


def test_a_short_context_is_measured_itself(tmp_path: Path, tokenizer_folder: Path) -> None:
    engine = ours(tmp_path, tokenizer_folder, 96)
    found = measure_lengths(engine, TEXT, [512], repeats=1, max_seconds=60)
    assert [(one.tokens, bool(one.left_out)) for one in found] == [(96, False), (512, True)]


def test_the_limit_of_time_costs_runs_and_then_lengths(tmp_path: Path, tokenizer_folder: Path) -> None:
    engine = ours(tmp_path, tokenizer_folder, 1024)
    found = measure_lengths(engine, TEXT, [64, 1024], repeats=5, max_seconds=1e-6)
    checked(found[0], 1)
    assert found[1].runs == 0
    assert found[1].prefill_per_second is None
    assert found[1].left_out.startswith("one run is expected to take more than")
    # What follows from the configuration is known all the same.
    assert found[1].cache_bytes is not None


def test_wrong_lengths_and_no_text_are_errors(tmp_path: Path, tokenizer_folder: Path) -> None:
    engine = ours(tmp_path, tokenizer_folder, 1024)
    with pytest.raises(UserError, match="the length"):
        measure_lengths(engine, TEXT, [NEW_TOKENS], max_seconds=1)
    with pytest.raises(UserError, match="no tokens"):
        measure_lengths(engine, [], [64], max_seconds=1)


def test_the_spread_is_median_and_range() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
