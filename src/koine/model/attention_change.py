"""Put another attention variant on a model that has weights, which are carried over exactly.

The layers change and the weights do not: the projections of q, k, v and out serve any window and any position
encoding. Norms of q and k that the variant adds begin as the identity up to the norm itself, without a gain.
The model computes something else from then on, until it is trained further.
"""

from __future__ import annotations

import torch
from torch import nn

from koine.model.config import ModelConfig
from koine.model.decoder import Decoder
from koine.model.formats.config_json import model_type
from koine.model.layer_patterns import variant_name
from koine.model.meta_device import meta_device
from koine.model.norm import HeadNorm


def change_attention(model: Decoder, config: ModelConfig) -> Decoder:
    """Return a decoder of another configuration with the weights of `model`, which it shares.

    Norms of q and k that `model` lacks are new: their weights are 1, or 0 with a unit offset.

    Args:
        model: the model with the weights.
        config: its configuration with other layers, as `with_attention` returns it.

    Raises:
        RuntimeError: the weights have other shapes, or there are some for which `config` has no place.
    """
    with meta_device():
        changed = Decoder(config)
    state = model.state_dict()
    for name, module in changed.named_modules():
        weight = f"{name}.weight"
        if isinstance(module, HeadNorm) and weight not in state:
            like = model.norm.weight
            module.weight = nn.Parameter(
                torch.empty(module.weight.shape, dtype=like.dtype, device=like.device)
            )
            module.reset_parameters()
            state[weight] = module.weight
    changed.load_state_dict(state, assign=True)
    changed.eos_ids = model.eos_ids
    changed.gradient_checkpointing = model.gradient_checkpointing
    return changed.train(model.training)


def describe_change(before: ModelConfig, after: ModelConfig) -> str:
    """Return what a change of the attention does, in one line; empty where the layers stay.

    For example `attention: RoPE, θ 10,000 becomes NoPE; saved as smollm3 (was llama)`.
    """
    if before.layers == after.layers:
        return ""
    saved, was = model_type(after), model_type(before)
    words = f"attention: {variant_name(before)} becomes {variant_name(after)}"
    words += f"; saved as {saved}" + (f" (was {was})" if saved != was else "")
    norms = sum(
        new.qk_norm is not None and old.qk_norm is None
        for old, new in zip(before.layers, after.layers, strict=True)
    )
    return words + (f"; {norms} layers have new norms of q and k, without a gain" if norms else "")
