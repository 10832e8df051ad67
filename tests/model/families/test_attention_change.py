"""Another attention put on a checkpoint: which class holds it, what is said, and training from there."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file

from koine.cli.train import train as command
from koine.errors import UserError
from koine.model import LayerSpec, load_model, read_config, variant_name, with_attention
from koine.model.attention_change import change_attention, describe_change
from koine.model.formats.config_json import model_type
from tests.train.tokens import write_tokens

from .cases import first_case
from .conftest import Checkpoint
from .reference import open_reference, reference_logits, text, write_checkpoint
from .variants import other_config

VARIANTS = ("rope", "qk-norm", "nope", "rnope", "rnope-swa")
SAVED_AS = {
    "llama": "llama qwen3 smollm3 smollm3 smollm3",
    "mistral": "mistral qwen3 smollm3 smollm3 smollm3",
    "qwen2": "qwen2 koine koine koine koine",
    "qwen3": "qwen3 qwen3 koine koine koine",
    "gemma3_text": "koine koine koine koine koine",
    "olmo2": "olmo2 olmo2 koine koine koine",
    "cohere2": "cohere cohere cohere2 koine cohere2",
}


@pytest.mark.parametrize("kind", SAVED_AS)
def test_a_variant_is_saved_as_the_class_that_holds_it(kind: str, checkpoint: Checkpoint) -> None:
    config = read_config(checkpoint(first_case(kind), torch.float32))
    saved = [model_type(other_config(config, name)) for name in VARIANTS]
    assert saved == SAVED_AS[kind].split()


def test_layers_keep_their_norms_and_their_own_bases(checkpoint: Checkpoint) -> None:
    gemma = read_config(checkpoint(first_case("gemma3_text"), torch.float32))
    assert variant_name(gemma) == (
        "2 x RoPE with QK-norm (window 8, θ 10,000), 1 x RoPE with QK-norm (θ 1,000,000), "
        "1 x RoPE with QK-norm (window 8, θ 10,000)"
    )
    local = LayerSpec(window=8, qk_norm="head", rope_theta=10_000.0)
    full = LayerSpec(qk_norm="head")
    # The window is the one that was there; the third layer was full, with the model's base.
    assert with_attention(gemma, attention="rnope-swa").layers == (
        local, local, replace(full, window=8), replace(full, rope=False)
    )  # fmt: skip
    assert with_attention(gemma, attention="nope").layers == (replace(full, rope=False),) * 4
    assert with_attention(gemma, rope_theta=2e6).layers == gemma.layers
    swa = with_attention(gemma, attention="rnope-swa", full_every=3)
    assert swa.layers[2] == replace(full, rope=False)
    with pytest.raises(UserError, match="every layer with RoPE has a base of its own"):
        with_attention(swa, rope_theta=2e6)
    assert with_attention(swa, window=5).layers[0] == replace(local, window=5)


def test_what_is_said(checkpoint: Checkpoint) -> None:
    llama = read_config(checkpoint(first_case("llama"), torch.float32))
    assert describe_change(llama, with_attention(llama, rope_theta=1e6)) == ""
    assert describe_change(llama, other_config(llama, "rnope-swa")) == (
        "attention: RoPE, θ 5,000 becomes RNoPE-SWA 1:1, window 5, θ 5,000; saved as smollm3 (was llama)"
    )
    assert describe_change(llama, other_config(llama, "qk-norm")).endswith(
        "saved as qwen3 (was llama); 3 layers have new norms of q and k, without a gain"
    )
    qwen = read_config(checkpoint(first_case("qwen3"), torch.float32))
    assert describe_change(qwen, other_config(qwen, "nope")) == (
        "attention: QK-Norm, θ 1,000,000 becomes NoPE, QK-norm; saved as koine (was qwen3)"
    )


def test_norms_are_never_dropped(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint(first_case("qwen3"), torch.float32))
    without = replace(model.config, layers=(LayerSpec(),) * len(model.config.layers))
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*q_norm"):
        change_attention(model, without)


def pretrain(*arguments: str) -> str:
    words = [
        "pretrain", "--sequence-length", "32", "--batch-size", "4", "--device", "cpu", "--threads", "1",
        "--learning-rate", "0.003", "--dtype", "float32", *arguments,
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(command, words, catch_exceptions=False).output


def test_a_llama_is_given_windows_and_trained(tmp_path: Path) -> None:
    """The command says what changes; the result is a SmolLM3 that transformers opens with our logits."""
    tokenizer, shards = write_tokens(tmp_path)
    size = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]) + 50
    case = first_case("llama")
    given = write_checkpoint(replace(case, changes={**case.changes, "vocab_size": size}), tmp_path / "llama")
    chosen: Any = ("--attention", "rnope-swa", "--window", "8", "--full-every", "3", "--rope-theta", "9000")
    same = ("--model", str(given), "--tokenizer", str(tokenizer), "--data", str(shards["short"]), *chosen)
    said = pretrain(*same, "--steps", "3", "--dry-run", "--out", str(tmp_path / "out"))
    line = "attention: RoPE, θ 5,000 becomes RNoPE-SWA 2:1, window 8, θ 9,000; saved as smollm3 (was llama)"
    assert line in said
    assert not (tmp_path / "out").exists()
    pretrain(*same, "--steps", "3", "--learning-rate", "1e-30", "--out", str(tmp_path / "out"))
    # With next to no learning rate, the weights are those that were given.
    before, after = (load_file(folder / "model.safetensors") for folder in (given, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    trained = tmp_path / "trained"
    pretrain(*same, "--steps", "4", "--checkpoint-every", "2", "--out", str(trained))
    theirs = open_reference(trained)
    assert isinstance(theirs, transformers.SmolLM3ForCausalLM)
    ours, ids = load_model(trained), text(40)
    assert variant_name(ours.config) == "RNoPE-SWA 2:1, window 8, θ 9,000"
    with torch.no_grad():
        logits = ours.logits(ours(torch.tensor([ids])))[0]
    torch.testing.assert_close(logits, reference_logits(theirs, ids), rtol=1e-5, atol=1e-5)
    # The same command resumes: here, it finds that all is done.
    weights = (trained / "model.safetensors").read_bytes()
    pretrain(*same, "--steps", "4", "--checkpoint-every", "2", "--out", str(trained))
    assert (trained / "model.safetensors").read_bytes() == weights
