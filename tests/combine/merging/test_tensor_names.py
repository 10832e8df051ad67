"""Checkpoints with other tensor names or superfluous tensors are merged; other functions are refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from koine.combine.merging.config import MergeConfig
from koine.combine.merging.plan import plan_merge
from koine.combine.merging.runner import run_merge
from koine.errors import UserError
from tests.combine.merge_configs import tensors
from tests.combine.merging.test_architectures import GPT, build, logits, without_the_library

transformers = pytest.importorskip("transformers")

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def write_pair(folder: Path, kind: str, task: str, sizes: dict[str, Any]) -> tuple[Any, Any]:
    """Models `a` and `b`, opened."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(kind, task, sizes, folder / "a", 0), build(kind, task, sizes, folder / "b", 1)


def change_tensors(path: Path, change: Change) -> None:
    file = path / "model.safetensors"
    content = {name: tensor.clone().contiguous() for name, tensor in change(load_file(file)).items()}
    save_file(content, file, metadata={"format": "pt"})


def edit_config(path: Path, **changes: Any) -> None:
    """Change fields of config.json; `...` removes one."""
    file = path / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def config_in(folder: Path, order: str = "ab", **more: Any) -> MergeConfig:
    fields: dict[str, Any] = {"method": "linear", "weights": (0.5, 0.5), "unrelated": True, **more}
    return MergeConfig(models=tuple(folder / name for name in order), **fields)


def old_masks(content: dict[str, Tensor], module: str, layers: int = 2) -> dict[str, Tensor]:
    """The buffers that attention of old versions saved."""
    mask = torch.ones(1, 1, 64, 64).tril().to(torch.uint8)
    names = {f"{module}.{layer}.attn." for layer in range(layers)}
    return (
        content
        | {f"{name}bias": mask for name in names}
        | {f"{name}masked_bias": torch.tensor(-1e4) for name in names}
    )


def with_head(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return content | {"lm_head.weight": content["transformer.wte.weight"]}


def without_prefix(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): one for name, one in content.items()}


def gamma_beta(content: dict[str, Tensor]) -> dict[str, Tensor]:
    new = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    return {
        name.replace(
            ".".join(name.split(".")[-2:]),
            new.get(".".join(name.split(".")[-2:]), ".".join(name.split(".")[-2:])),
        ): one
        for name, one in content.items()
    }


def with_numbers(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return content | {
        "bert.embeddings.position_ids": torch.arange(64)[None],
        "bert.embeddings.token_type_ids": torch.zeros(1, 64, dtype=torch.int64),
    }


def with_decoder_bias(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """The copies that old BERT checkpoints hold of what is tied."""
    return content | {
        "cls.predictions.decoder.weight": content["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": content["cls.predictions.bias"],
    }


def with_frequencies(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return content | {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)
    }


def neox_masks(content: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    return content | {
        "gpt_neox.layers.0.attention.bias": mask,
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
    }


SPELLINGS: dict[str, tuple[str, str, dict[str, Any], Change]] = {
    "old masks": ("gpt2", "CausalLM", GPT, lambda content: old_masks(content, "transformer.h")),
    "no prefix": ("gpt2", "CausalLM", GPT, without_prefix),
    "no prefix, old masks": (
        "gpt2",
        "CausalLM",
        GPT,
        lambda content: old_masks(without_prefix(content), "h"),
    ),
    "head stored": ("gpt2", "CausalLM", GPT, with_head),
    "gamma and beta": ("bert", "MaskedLM", {}, gamma_beta),
    "gamma, beta and numbers": ("bert", "MaskedLM", {}, lambda content: with_numbers(gamma_beta(content))),
    "bert's tied copies": ("bert", "MaskedLM", {}, with_decoder_bias),
    "rotary tables": ("llama", "CausalLM", {}, with_frequencies),
    "neox masks": ("gpt_neox", "CausalLM", {}, neox_masks),
}


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("case", SPELLINGS)
def test_other_names_of_the_same_tensors_are_merged(
    case: str, order: str, library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In either order, the result opens with every weight and computes the average of both models."""
    kind, task, sizes, change = SPELLINGS[case]
    first, second = write_pair(tmp_path, kind, task, sizes)
    change_tensors(tmp_path / "b", change)
    if not library:
        without_the_library(monkeypatch)
    run_merge(config_in(tmp_path, order), tmp_path / "out")
    opened, about = type(first).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not about["missing_keys"]
    # The average, worked out by the library's own modules in float64.
    theirs = second.double().state_dict()
    middle = {
        name: (one + theirs[name]) / 2 if one.is_floating_point() else one
        for name, one in first.double().state_dict().items()
    }
    first.load_state_dict(middle)
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(logits(opened.eval().double(), ids), logits(first, ids), atol=1e-5)


@pytest.mark.parametrize("in_file", [True, False])
def test_a_tied_head_that_is_stored(in_file: bool, tmp_path: Path) -> None:
    """By the file or by the class's default, the result stays tied under methods with randomness too."""
    write_pair(tmp_path, "gpt2", "CausalLM", GPT)
    for name in "ab":
        change_tensors(tmp_path / name, with_head)
        edit_config(tmp_path / name, tie_word_embeddings=True if in_file else ...)
    run_merge(config_in(tmp_path), tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")


def test_a_head_that_is_no_copy_is_merged(tmp_path: Path) -> None:
    """transformers does not tie a head that differs from the embedding, whatever the file says."""
    write_pair(tmp_path, "gpt2", "CausalLM", GPT)
    change_tensors(
        tmp_path / "b", lambda content: content | {"lm_head.weight": content["transformer.wte.weight"] + 1}
    )
    with pytest.raises(UserError, match=r"has lm_head.weight, which .*a lacks"):
        plan_merge(config_in(tmp_path))
    change_tensors(
        tmp_path / "a", lambda content: content | {"lm_head.weight": content["transformer.wte.weight"] - 1}
    )
    run_merge(config_in(tmp_path), tmp_path / "out")
    merged = tensors(tmp_path / "out")
    a, b = (tensors(tmp_path / name)["lm_head.weight"] for name in "ab")
    assert torch.allclose(merged["lm_head.weight"], (a + b) / 2, atol=1e-6)


@pytest.mark.parametrize(
    "notes",
    [
        {"unsloth_version": "2026.4.2"},
        {"_attn_implementation_autoset": True},
        {"neftune_noise_alpha": 5},
        {"use_flash_attn": True},
        {"temperature": 0.7},
        {"tokenizer_class": "LlamaTokenizer"},
        {"model_max_length": 4096},
        {"unsloth_fixed": {"deep": [1, 2]}},
        {"attention_dropout": 0.1},
        {"hidden_act": ...},
        {"rms_norm_eps": ...},
        {"pretraining_tp": 2},
        {"mlp_bias": ...},
        {"rope_parameters": ..., "rope_theta": 10000.0},
        {"num_key_value_heads": 2, "head_dim": ...},
        {"axolotl_config": "x"},
    ],
    ids=str,
)
def test_unknown_fields_and_explicit_defaults_are_ignored(notes: dict[str, Any], tmp_path: Path) -> None:
    write_pair(tmp_path, "llama", "CausalLM", {})
    edit_config(tmp_path / "b", **notes)
    for order in ("ab", "ba"):
        run_merge(config_in(tmp_path, order), tmp_path / order)
        _, about = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / order, output_loading_info=True
        )
        assert not about["missing_keys"]


def test_a_field_of_infinity_is_read_as_the_library_writes_it(tmp_path: Path) -> None:
    """Mamba2 writes `time_step_limit` as `[0.0, {"__float__": "Infinity"}]`; b leaves the default out."""
    sizes = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2}
    write_pair(tmp_path, "mamba2", "CausalLM", sizes)
    assert "__float__" in (tmp_path / "a/config.json").read_text()
    edit_config(tmp_path / "b", time_step_limit=...)
    plan_merge(config_in(tmp_path)).close()


def test_a_field_that_only_names_layer_types_is_ignored(tmp_path: Path) -> None:
    """Fine-tunes of Qwen2 have another `max_window_layers` than their base, and no window at all."""
    write_pair(tmp_path, "qwen2", "CausalLM", {"max_window_layers": 28})
    edit_config(tmp_path / "b", max_window_layers=1, layer_types=..., sliding_window=4096)
    run_merge(config_in(tmp_path), tmp_path / "merged")
    edit_config(tmp_path / "b", use_sliding_window=True)
    with pytest.raises(UserError, match="layer_types|use_sliding_window|sliding_window"):
        plan_merge(config_in(tmp_path))


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"rope_parameters": ..., "rope_theta": 5e5}, "rope_parameters.rope_theta is 500000.0, and 10000.0"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, and 1e-06"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, and silu"),
        ({"num_attention_heads": 8, "head_dim": 4}, "num_attention_heads is 8, and 4|head_dim is 4, and 8"),
        ({"attention_bias": True}, "attention_bias is True, and False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, and False"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_parameters.* is "),
    ],
)
def test_fields_that_change_the_function_are_refused(
    field: dict[str, Any], says: str, tmp_path: Path
) -> None:
    write_pair(tmp_path, "llama", "CausalLM", {})
    edit_config(tmp_path / "b", **field)
    with pytest.raises(UserError, match=says):
        plan_merge(config_in(tmp_path))


def test_a_window_is_refused_where_the_class_has_one(tmp_path: Path) -> None:
    """Mistral declares a window, Llama does not: a Llama ignores it."""
    write_pair(tmp_path, "mistral", "CausalLM", {})
    edit_config(tmp_path / "b", sliding_window=7)
    with pytest.raises(UserError, match="sliding_window is 7, and 4096"):
        plan_merge(config_in(tmp_path))


def test_without_transformers_nothing_is_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields in both files are compared, one in a single file is refused, `_` fields are ignored."""
    write_pair(tmp_path, "llama", "CausalLM", {})
    without_the_library(monkeypatch)
    edit_config(tmp_path / "b", _attn_implementation_autoset=True)
    plan_merge(config_in(tmp_path)).close()
    edit_config(tmp_path / "b", unsloth_version="2026.4.2")
    with pytest.raises(UserError, match="unsloth_version is 2026.4.2, and not given in .*transformers knows"):
        plan_merge(config_in(tmp_path))
    edit_config(tmp_path / "b", unsloth_version=..., rms_norm_eps=1e-3)
    with pytest.raises(UserError, match="rms_norm_eps is 0.001, and 1e-06 in .*compute something else"):
        plan_merge(config_in(tmp_path))
