"""The tensors of a saved model under our stored names, whatever its class calls them, and the way back.

Our stored names are those of `koine.model.formats.tensor_names`, and heads lie as our decoder rotates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from koine.model.config import ModelConfig
from koine.model.families.family import TensorNames
from koine.model.formats.rotary_layout import halves_from_pairs, is_rotated, pairs_from_halves


def read_stored(
    name: str, stored: Callable[[str], Tensor], names: TensorNames, config: ModelConfig
) -> Tensor:
    """Return a tensor of a layer by our name.

    Args:
        name: such as `self_attn.q_proj.weight`, without the layer's prefix.
        stored: returns a tensor of the class by its name without the prefix; raises `KeyError` without one.
        names: of the class.
        config: sizes.
    """
    module, _, kind = name.rpartition(".")
    place = names.fused_place(module)
    if place is None:
        tensor = stored(f"{names.stored(module)}.{kind}")
    else:
        fused, parts = place
        sizes = [rows_of(part, config) for part in parts]
        tensor = stored(f"{fused}.{kind}").split_with_sizes(sizes)[parts.index(module)]
    if names.halves and is_rotated(module):
        return pairs_from_halves(tensor, config, norm=module.endswith("_norm"))
    return tensor


def write_stored(
    tensors: Mapping[str, Tensor], names: TensorNames, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a layer with the class's names; the reverse of `read_stored`.

    tensors: all of the layer, by our names without the layer's prefix.
    """
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        place = names.fused_place(module)
        if place is None:
            yield f"{names.stored(module)}.{kind}", _class_layout(module, tensor, names, config)
        elif module == place[1][0]:
            parts = [_class_layout(part, tensors[f"{part}.{kind}"], names, config) for part in place[1]]
            yield f"{place[0]}.{kind}", torch.cat(parts)


def _class_layout(module: str, tensor: Tensor, names: TensorNames, config: ModelConfig) -> Tensor:
    if names.halves and is_rotated(module):
        return halves_from_pairs(tensor, config, norm=module.endswith("_norm"))
    return tensor


def rows_of(module: str, config: ModelConfig) -> int:
    """Return the rows of a dense model's projection, for a fused one to be split."""
    q, k, v, gate, up = config.projection_sizes
    rows = {"q_proj": q, "k_proj": k, "v_proj": v, "gate_proj": gate, "up_proj": up}
    return rows[module.rpartition(".")[2]]
