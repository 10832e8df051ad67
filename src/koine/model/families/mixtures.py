"""Read and write the fields that classes with experts share: a linear router, and experts in every layer."""

from __future__ import annotations

import json
from typing import Any

from koine.fields import Fields
from koine.model.config import SIZES, MixtureConfig, ModelConfig
from koine.model.families.family import LLAMA_NORMS
from koine.model.families.reading import keep, unsupported

MOST_EXPERTS = 2**14
ROUTER_NAMES = {"mlp.router": "mlp.gate"}
"""The name of the router in most classes with experts."""
LLAMA_MOE_NAMES = LLAMA_NORMS | ROUTER_NAMES


def read_mixture(
    fields: Fields, *, experts: int, top_k: int, load_balancing: float, **given: Any
) -> MixtureConfig:
    """Return the experts.

    The classes have no names of experts and no z-loss: we add `expert_names` and `router_z_loss_coef`.
    Their load-balancing loss is not ours (`koine.model.moe.losses`); its factor is kept as a number.

    Args:
        fields: the file's.
        experts: the class's default count.
        top_k: its default experts of each token.
        load_balancing: its default factor.
        given: further fields of `MixtureConfig`.
    """
    # Two names of one field; each class reads both.
    given_names = [one for one in ("num_experts", "num_local_experts") if fields.get(one, None) is not None]
    name = given_names[0] if given_names else "num_experts"
    count = fields.integer(name, experts, low=1, high=MOST_EXPERTS)
    own = fields.entries("expert_names", None)
    if own is not None and (len(own) != count or not all(isinstance(one, str) for one in own)):
        raise fields.wrong("expert_names", f"a list of {count} names")
    return MixtureConfig(
        experts=default_names(count) if own is None else tuple(own),
        top_k=fields.integer("num_experts_per_tok", top_k, low=1, high=MOST_EXPERTS),
        load_balancing=fields.number("router_aux_loss_coef", load_balancing),
        z_loss=fields.number("router_z_loss_coef", 0.0),
        **given,
    )


def default_names(count: int) -> tuple[str, ...]:
    """Return the names of experts without names."""
    return tuple(f"expert-{number}" for number in range(count))


def write_mixture(config: ModelConfig, name: str = "num_experts") -> dict[str, Any]:
    """Return the fields of `read_mixture`; none for a dense model. `name` is that of the count."""
    mixture = config.mixture
    if mixture is None:
        return {}
    out: dict[str, Any] = {
        name: len(mixture.experts),
        "num_experts_per_tok": mixture.top_k,
        "router_aux_loss_coef": mixture.load_balancing,
    }
    if mixture.experts != default_names(len(mixture.experts)):
        out["expert_names"] = list(mixture.experts)
    if mixture.z_loss:
        out["router_z_loss_coef"] = mixture.z_loss
    return out


def check_every_layer_has_experts(fields: Fields) -> None:
    """Raise `UnsupportedModelError` where some layers are dense."""
    step = fields.integer("decoder_sparse_step", 1, low=0)
    if step != 1:
        raise unsupported(fields, "decoder_sparse_step", step, "experts in every layer")
    dense = fields.entries("mlp_only_layers", None)
    if dense:
        raise unsupported(fields, "mlp_only_layers", dense, "experts in every layer")
    keep(fields, "decoder_sparse_step", "mlp_only_layers")


def read_expert_size(fields: Fields, default: int) -> int:
    """Return the width of an expert, where `intermediate_size` is that of dense layers, which there are none."""
    keep(fields, "intermediate_size")
    got: int = fields.integer("moe_intermediate_size", default, low=1, high=SIZES["intermediate_size"])
    return got


def write_expert_size(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of `read_expert_size`."""
    dense = dict(config.carried).get("intermediate_size")
    return {
        "moe_intermediate_size": config.intermediate_size,
        "intermediate_size": config.intermediate_size if dense is None else json.loads(dense),
    }


def normalises(config: ModelConfig) -> bool:
    """Return whether the probabilities of a token's experts are divided by their sum."""
    return config.mixture is not None and config.mixture.normalise_top_k
