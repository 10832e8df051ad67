"""Random models of every architecture, converted to GGUF and imported again, are the same models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from koine.errors import UserError
from koine.model.formats.importing.architectures import ARCHITECTURES
from koine.model.formats.importing.gguf_config import llama3_factors
from koine.model.formats.importing.runner import import_model

from .gguf_files import VOCABULARY, converted, metadata_of, random_model, saved_state, write_file
from .reference import loaded_by_transformers

pytest.importorskip("gguf", reason="reading GGUF files needs the extra [gguf]")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}

# name -> architecture of llama.cpp, class of the configuration, its fields besides SIZES
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaConfig", {}),
    "llama-tied": ("llama", "LlamaConfig", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-biases": ("llama", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", "LlamaConfig", {"rope_parameters": LINEAR}),
    "llama-yarn": ("llama", "LlamaConfig", {"rope_parameters": YARN}),
    "llama-3": ("llama", "LlamaConfig", {"rope_parameters": LLAMA3, "max_position_embeddings": 16_384}),
    "mixtral": ("llama", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "smollm3": ("smollm3", "SmolLM3Config", {"num_hidden_layers": 5}),
    "qwen2": ("qwen2", "Qwen2Config", {}),
    "qwen3": ("qwen3", "Qwen3Config", {"head_dim": 16}),
    "qwen2moe": (
        "qwen2moe", "Qwen2MoeConfig",
        {**EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "norm_topk_prob": False},
    ),
    "qwen3moe": ("qwen3moe", "Qwen3MoeConfig", {**EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True}),
    "olmoe": ("olmoe", "OlmoeConfig", {**EXPERTS, "norm_topk_prob": False, "clip_qkv": 0.5}),
    "gemma2": (
        "gemma2", "Gemma2Config",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "gemma3", "Gemma3TextConfig",
        {
            "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5, "num_hidden_layers": 7,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-linear": (
        "gemma3", "Gemma3TextConfig",
        {
            "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5, "num_hidden_layers": 6,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    # The head size of all Gemma models: `transformers` scales by it whatever the file says.
    "gemma2-256": (
        "gemma2", "Gemma2Config", {"head_dim": 256, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    "gemma3-256": (
        "gemma3", "Gemma3TextConfig",
        {"head_dim": 256, "sliding_window": 5, "num_hidden_layers": 7, "tie_word_embeddings": True},
    ),
    "olmo2": ("olmo2", "Olmo2Config", {}),
    "phi3": ("phi3", "Phi3Config", {"sliding_window": 5}),
    "phi3-partial": (
        "phi3", "Phi3Config",
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "granite": (
        "granite", "GraniteConfig",
        {
            "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "command-r": ("command-r", "CohereConfig", {"use_qk_norm": False, "tie_word_embeddings": True}),
    "command-r-plus": ("command-r", "CohereConfig", {"use_qk_norm": True, "tie_word_embeddings": True}),
    "cohere2": ("cohere2", "Cohere2Config", {"sliding_window": 5, "num_hidden_layers": 5, "tie_word_embeddings": True}),
}  # fmt: skip
BY_TRANSFORMERS = ("llama", "llama-tied", "qwen2", "gemma2-256", "gemma3-256")
"""Those that `transformers` itself reads from a GGUF file. Of Qwen3 it ignores the size of heads, of MoEs that
of experts, and it knows no SmolLM3, OLMo 2, Granite or Cohere."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def written(name: str, folder: Path, **changes: Any) -> tuple[Any, Path]:
    """Return a random model and its GGUF file."""
    architecture, kind, fields = MODELS[name]
    config = getattr(transformers, kind)(**{**SIZES, **fields})
    model = random_model(config)
    tensors = converted(saved_state(model, folder / "saved"), config, architecture)
    if name == "llama-3":
        factors = llama3_factors(500_000.0, 8, 8.0, 8192).astype(np.float32)
        tensors["rope_freqs.weight"] = torch.from_numpy(factors)
    values = {**metadata_of(config, architecture), **changes}
    return model, write_file(folder / "model.gguf", architecture, values, tensors)


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (2, 24))
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


def test_every_architecture_is_tested() -> None:
    assert {architecture for architecture, _, _ in MODELS.values()} == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", MODELS)
def test_the_imported_model_is_the_one_that_was_converted(name: str, tmp_path: Path) -> None:
    model, file = written(name, tmp_path)
    import_model(file, tmp_path / "out")
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(opened) is type(model)
    before, after = model.state_dict(), opened.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        # The norms of Gemma go through 1 + w in float32.
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=2.5e-7 if "gemma" in name else 0)
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=2e-5 if "gemma" in name else 0)


@pytest.mark.parametrize("name", BY_TRANSFORMERS)
def test_logits_equal_those_of_what_transformers_reads(name: str, tmp_path: Path) -> None:
    _, file = written(name, tmp_path)
    import_model(file, tmp_path / "out")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(opened), logits(loaded_by_transformers(file)))


def test_saving_the_opened_model_again_gives_the_same_tensors(tmp_path: Path) -> None:
    """So the names in the file are those that `transformers` itself writes, experts too."""
    from safetensors.torch import load_file

    for name in ("qwen3moe", "mixtral"):
        _, file = written(name, tmp_path / name if (tmp_path / name).mkdir() is None else tmp_path)
        import_model(file, tmp_path / name / "out")
        ours = load_file(tmp_path / name / "out" / "model.safetensors")
        theirs = load_file(tmp_path / name / "saved" / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("rope.scaling.type", "longrope", "rotary scaling 'longrope'"),
        ("rope.dimension_count", 4, "rotates 4 of the 8 dimensions"),
        ("attention.sliding_window", 128, "the metadata 'llama.attention.sliding_window'"),
        ("attention.value_length", 4, "values of 4 per head"),
        ("attention.causal", False, "no causal model"),
        ("attention.head_count_kv", 3, "4 heads and 3 key-value heads"),
        ("attention.head_count", [4, 4, 2], "no int or float"),
        ("embedding_length", 64, "the metadata say"),
        ("block_count", 4, "lacks the tensor blk.3.attn_q.weight"),
        ("block_count", 2, "tensors that 'llama' has not: blk.2."),
        ("block_count", 0, "no size from 1 on"),
        ("block_count", 2_000_000_000, "2,000,000,000 blocks"),
        ("rope.freq_base", float("nan"), "is nan"),
        ("wholly_new", 3, "the metadata 'llama.wholly_new', which may change"),
    ],
)
def test_metadata_that_change_the_mathematics_are_refused_by_name(
    key: str, value: Any, says: str, tmp_path: Path
) -> None:
    _, file = written("llama", tmp_path, **{key: value})
    with pytest.raises(UserError, match=says):
        import_model(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rotary_factors_of_another_scaling_are_refused(tmp_path: Path) -> None:
    architecture, kind, fields = MODELS["llama"]
    config = getattr(transformers, kind)(**{**SIZES, **fields})
    tensors = converted(saved_state(random_model(config), tmp_path / "saved"), config, architecture)
    tensors["rope_freqs.weight"] = torch.tensor([1.0, 3.0, 2.0, 8.0])
    file = write_file(tmp_path / "model.gguf", architecture, metadata_of(config, architecture), tensors)
    with pytest.raises(UserError, match="not those of Llama 3's scaling"):
        import_model(file, tmp_path / "out")


def test_phi3s_long_factors_become_longrope(tmp_path: Path) -> None:
    factors = {"long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3]}
    config = transformers.Phi3Config(
        **SIZES,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **factors,
        },
    )  # fmt: skip
    model = random_model(config)
    tensors = converted(saved_state(model, tmp_path / "saved"), config, "phi3")
    tensors["rope_factors_long.weight"] = torch.tensor(factors["long_factor"])
    tensors["rope_factors_short.weight"] = torch.tensor(factors["short_factor"])
    values = {**metadata_of(config, "phi3"), "rope.scaling.original_context_length": 16}
    import_model(write_file(tmp_path / "model.gguf", "phi3", values, tensors), tmp_path / "out")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # 24 tokens: more than the original length, so the long factors are used.
    assert torch.equal(logits(opened), logits(model))


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_repeats_the_embedding_is_tied(equal: bool, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    model = random_model(config)
    if equal:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    tensors = converted(saved_state(model, tmp_path / "saved"), config, "llama")
    assert "output.weight" in tensors
    import_model(
        write_file(tmp_path / "model.gguf", "llama", metadata_of(config, "llama"), tensors), tmp_path / "out"
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is equal
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(opened), logits(model))


def test_what_koine_exports_comes_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from koine.tokenizer import load_tokenizer
    from tests.bad_inputs import worlds

    model = worlds.built("exportable")
    import_model(worlds.built("gguf") / "model.gguf", tmp_path / "out")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config, imported = (json.loads((path / "config.json").read_text()) for path in (model, tmp_path / "out"))
    assert {name: imported.get(name, value) for name, value in config.items()} == config
    old, new = load_tokenizer(model), load_tokenizer(tmp_path / "out")
    for text in ("Die Katze schläft, 7 Nächte.\n\n  x", "ΑΒ γδ – 猫 dogs' END"):
        assert new.encode(text) == old.encode(text)
        assert new.decode(new.encode(text)) == text
