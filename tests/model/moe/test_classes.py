"""Mixtures that are classes of `transformers`: fused experts, names, losses, and what is refused.

Equal logits, gradients and tensors: tests/model/families.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from koine.errors import UserError
from koine.model import Decoder, load_model, save_model
from koine.model.config import MixtureConfig
from koine.model.families.reading import UnsupportedModelError
from koine.model.formats.config_json import read_config
from koine.model.moe.losses import load_balancing_loss
from koine.model.moe.routers import Routing

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
CASES: dict[str, list[dict[str, Any]]] = {
    "flex_olmo": [{"num_experts": 3}, {"num_experts": 3, "norm_topk_prob": True}],
    "mixtral": [
        {"num_local_experts": 3},
        {"num_local_experts": 3, "sliding_window": 5, "tie_word_embeddings": True},
        {"num_local_experts": 2, "num_experts_per_tok": 1, "hidden_act": "gelu"},
    ],
    "olmoe": [{"num_experts": 3}, {"num_experts": 3, "norm_topk_prob": True, "rope_parameters": YARN}],
    "qwen2_moe": [
        {"num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
        {
            "num_experts": 3, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "qkv_bias": False,
            "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 5,
        },
    ],
    "qwen3_moe": [
        {"num_experts": 3, "moe_intermediate_size": 24, "head_dim": 16},
        {
            "num_experts": 3, "moe_intermediate_size": 16, "norm_topk_prob": True, "attention_bias": True,
            "use_sliding_window": True, "sliding_window": 6,
        },
    ],
}  # fmt: skip
EVERY = [pytest.param(kind, extra, id=f"{kind}-{n}") for kind in CASES for n, extra in enumerate(CASES[kind])]
TOKENS = torch.randint(0, 96, (2, 23), generator=torch.Generator().manual_seed(3))


def random_model(kind: str, extra: dict[str, Any]) -> Any:
    """Return a model of a class, with random norms too."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | extra))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + ("norm" in name))
    return model


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("kind", "extra"), EVERY)
@torch.no_grad()
def test_fused_experts_are_read(tmp_path: Path, kind: str, extra: dict[str, Any]) -> None:
    """As `save_original_format=False` writes them: one tensor for all experts of a layer."""
    theirs = random_model(kind, extra)
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    theirs.save_pretrained(tmp_path / "apart")
    assert any(
        name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "fused" / "model.safetensors")
    )
    fused, apart = (load_model(tmp_path / name).state_dict() for name in ("fused", "apart"))
    assert all(torch.equal(fused[name], apart[name]) for name in apart)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@torch.no_grad()
def test_names_of_experts_and_factors_are_kept(tmp_path: Path, kind: str) -> None:
    """The class ignores them, and writes them again."""
    theirs = random_model(kind, CASES[kind][0])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    old = ours.config.mixture
    assert old is not None
    mixture = MixtureConfig(
        experts=("seed", "code", "law"), top_k=2, normalise_top_k=old.normalise_top_k, z_loss=0.003,
        load_balancing=0.02,
    )  # fmt: skip
    from dataclasses import replace

    named = Decoder(replace(ours.config, mixture=mixture))
    named.load_state_dict(ours.state_dict())
    save_model(named, tmp_path / "named")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "named").save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again").mixture == mixture
    assert json.loads((tmp_path / "again" / "config.json").read_text())["router_aux_loss_coef"] == 0.02


@torch.no_grad()
def test_the_load_balancing_loss_of_transformers_is_top_k_times_ours(tmp_path: Path) -> None:
    """Theirs counts assignments per token, ours shares of the assignments; theirs pools the layers, ours sums."""
    extra = CASES["qwen3_moe"][0] | {"num_hidden_layers": 1}
    theirs = random_model("qwen3_moe", extra)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    routings: list[Routing] = []
    ours(TOKENS, routings=routings)
    [routing] = routings
    loss = load_balancing_loss(routing.probabilities.flatten(0, 1), routing.experts.flatten(0, 1))
    assert relative(2 * loss, theirs(TOKENS, output_router_logits=True).aux_loss) < 1e-6


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ],
)
def test_what_our_decoder_lacks_is_refused_by_name(
    tmp_path: Path, kind: str, fields: dict[str, Any], says: str
) -> None:
    random_model(kind, CASES[kind][0]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | fields))
    with pytest.raises(UnsupportedModelError, match=says):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_experts_per_tok": 9}, "top_k is 9"),
        ({"num_local_experts": 10**9}, "num_local_experts"),
        ({"expert_names": ["a", "b"]}, "expert_names"),
        ({"expert_names": ["a", "b", "b"]}, "two experts are named 'b'"),
        ({"router_aux_loss_coef": -1}, "load_balancing is -1"),
    ],
)
def test_wrong_fields_are_refused(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    random_model("qwen3_moe", CASES["qwen3_moe"][0]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | fields))
    with pytest.raises(UserError, match=says):
        read_config(tmp_path)


def test_fused_experts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    random_model("mixtral", CASES["mixtral"][0]).save_pretrained(tmp_path, save_original_format=False)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file(stored | {name: stored[name][:2].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks 2 tensors"):
        load_model(tmp_path)
    save_file(stored | {name: stored[name][:, :-2].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"w1.weight has shape \[23, 32\], config.json says \[24, 32\]"):
        load_model(tmp_path)
