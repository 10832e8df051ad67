"""Weight decay acts on matrices, and not on parameters that scale or shift."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from koine.model import Decoder
from koine.model.causal_lm import CausalLM
from koine.model.config import LayerSpec, MixtureConfig, ModelConfig
from koine.train import TrainSettings
from koine.train.decay import block_matrices, decayed_parameters
from koine.train.optimiser import Optimiser

from .models import small_config

DENSE = {"embedding", "in_proj", "out_proj", "head"}
EXPERTS = {"experts_in", "experts_out", "router", "into", "out"}
DOMAINS = {"domain_size": 6}
BAM = {"attention": "kv-experts"}
SHARED = {"attention": "shared-kv", "shared_expert": True}


def variants() -> dict[str, ModelConfig]:
    """Our decoder with and without QK-Norm, tied and untied, dense and with all experts and routers."""
    plain = replace(small_config(), tie_embeddings=False)
    normed = replace(
        plain,
        layers=(LayerSpec(qk_norm="heads"), LayerSpec(rope=False, window=8, qk_norm="heads")),
        num_kv_heads=2,
    )
    found = {"plain": plain, "tied": replace(plain, tie_embeddings=True), "qk-norm": normed}
    for name, fields in {"btx": {}, "nexus": DOMAINS, "bam": BAM, "bam-shared": SHARED}.items():
        mixture = MixtureConfig(experts=("a", "b", "c"), **fields)  # type: ignore[arg-type]
        found[name] = replace(normed, mixture=mixture)
    return found


@pytest.mark.parametrize("name", variants())
def test_our_decoder(name: str) -> None:
    """Norms are the only parameters that are not decayed, and QK-Norm's have two axes."""
    model = Decoder(variants()[name])
    decayed = decayed_parameters(model)
    for parameter, tensor in model.named_parameters():
        words = parameter.split(".")
        if words[-2].endswith("norm") or words[0] == "norm":
            assert parameter not in decayed, parameter
        else:
            assert (words[-1] in EXPERTS) or words[-2] in DENSE | EXPERTS, parameter
            assert parameter in decayed, parameter
        assert tensor.dim() >= 2 or parameter not in decayed
    if name == "qk-norm":
        assert model.blocks[0].q_norm.weight.dim() == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("name", variants())
def test_muon_takes_the_two_dimensional_matrices_of_blocks(name: str) -> None:
    model = Decoder(variants()[name])
    named = dict(model.named_parameters())
    found = block_matrices(model)  # type: ignore[arg-type]
    assert all(named[one].dim() == 2 and one.startswith("blocks.") for one in found)
    left = {one for one in named if one.startswith("blocks.") and named[one].dim() == 2 and one not in found}
    assert all("norm" in one for one in left), left


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 32}),
        (
            "llama",
            {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 24,
                "vocab_size": 32,
                "tie_word_embeddings": False,
            },
        ),
    ],
)
def test_muon_leaves_embeddings_and_heads_of_other_models(kind: str, fields: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = CausalLM(transformers.AutoModelForCausalLM.from_config(config))
    found = block_matrices(model)  # type: ignore[arg-type]
    assert found
    assert not any(word in name for name in found for word in ("wte", "wpe", "embed", "lm_head"))
    layers = {"gpt2": {"c_attn", "c_proj", "c_fc"}, "llama": {"q_proj", "o_proj", "up_proj", "down_proj"}}[
        kind
    ]
    assert layers <= {name.split(".")[-2] for name in found}


def test_a_gain_of_qk_norm_is_not_pulled_to_zero() -> None:
    """One step with zero gradients multiplies matrices by `1 - rate * decay`, and nothing else."""
    model = Decoder(variants()["qk-norm"])
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    optimiser = Optimiser(model, TrainSettings(weight_decay=0.5, dtype="float32"), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step(0.1)
    for name, parameter in model.named_parameters():
        factor = 1.0 if "norm" in name else 0.95
        assert torch.allclose(parameter, factor * before[name], rtol=1e-6, atol=0), name


class _Products(TorchDispatchMode):
    """Records which parameters, by data pointer, are factors of a matmul, a lookup or a convolution."""

    FACTORS: ClassVar = {  # the arguments of each operation that multiply; the others are added
        "mm": (0, 1),
        "bmm": (0, 1),
        "addmm": (1, 2),
        "baddbmm": (1, 2),
        "embedding": (0,),
        "convolution": (1,),
        "_grouped_mm": (0, 1),
        "mv": (0, 1),
    }

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for place in self.FACTORS.get(func.overloadpacket.__name__, ()):
            if place < len(args) and isinstance(args[place], Tensor):
                self.found.add(args[place].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FEW_EXPERTS = {
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "num_experts": 3,
    "moe_intermediate_size": 16,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {},
    "cohere": {"use_qk_norm": True},
    "olmo2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "mixtral": FEW_EXPERTS,
    "gpt_oss": {**FEW_EXPERTS, "head_dim": 8},
    "olmoe": FEW_EXPERTS,
    "mamba": {"state_size": 4},
    "falcon_mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 32},
    "bloom": {"n_layer": 2, "n_head": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_models_of_transformers(kind: str) -> None:
    """Factors of matmuls in a forward pass are decayed; parameters that are added or scale are not."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **ARCHITECTURES[kind]})
    inner = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = CausalLM(inner).eval()
    with _Products() as products, torch.no_grad():
        inner(input_ids=torch.randint(3, 64, (2, 12)), use_cache=False)
    factors = {
        name
        for name, parameter in model.named_parameters()
        if parameter.untyped_storage().data_ptr() in products.found and parameter.dim() >= 2
    }
    assert decayed_parameters(model) == factors
    assert factors


def test_no_weight_decay_attribute_and_stacked_biases() -> None:
    """`_no_weight_decay` of state space models is obeyed; stacked biases are no matrix."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.zeros(3, 4, 5))
            self.kernel_bias = nn.Parameter(torch.zeros(3, 4))
            self.A_log = nn.Parameter(torch.zeros(3, 4))
            self.mix = nn.Parameter(torch.zeros(1, 1, 8))
            self.kept = nn.Parameter(torch.zeros(3, 4))
            self.kept._no_weight_decay = True  # type: ignore[attr-defined]

    assert decayed_parameters(Odd()) == {"kernel"}
