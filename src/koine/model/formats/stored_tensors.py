"""The tensors of a saved model under our stored names, whatever its class calls them, and the way back.

Our stored names are those of `koine.model.formats.tensor_names`, and heads lie as our decoder rotates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from koine.model.config import ModelConfig
from koine.model.families.family import OWN_NAMES, TensorNames
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

    tensors: all of the layer, by our names without the layer's prefix. Each is looked up once, when it is
        written.
    """
    for name in tensors:
        module, _, kind = name.rpartition(".")
        place = names.fused_place(module)
        if place is None:
            yield f"{names.stored(module)}.{kind}", _class_layout(module, tensors[name], names, config)
        elif module == place[1][0]:
            parts = [_class_layout(part, tensors[f"{part}.{kind}"], names, config) for part in place[1]]
            yield f"{place[0]}.{kind}", torch.cat(parts)


class CanonicalTensors(Mapping[str, Tensor]):
    """The tensors of a saved model by our names and in our layout, each read when it is looked up.

    Args:
        weights: the saved tensors, by the names of the class.
        layout: dtype and shape of every tensor, by our name.
        names: of the class.
        config: of the model.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        names: TensorNames,
        config: ModelConfig,
    ) -> None:
        self.weights, self.layout, self.names, self.config = weights, layout, names, config

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, which is not read."""
        return self.layout[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, which is not read."""
        return self.layout[name][0]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layout:
            raise KeyError(name)
        prefix, rest = layer_of(name)
        if not prefix:
            return self.weights[class_name(name, self.names)]
        theirs = self.names.prefix + prefix.removeprefix(OWN_NAMES.prefix)
        return read_stored(rest, lambda one: self.weights[theirs + one], self.names, self.config)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def class_name(name: str, names: TensorNames) -> str:
    """Return the name of the class's tensor that is one of ours, or that one of ours is part of."""
    prefix, rest = layer_of(name)
    if not prefix:
        return {ours: names.top[place] for place, ours in OWN_NAMES.top.items()}[name]
    module, _, kind = rest.rpartition(".")
    place = names.fused_place(module)
    theirs = names.stored(module) if place is None else place[0]
    return f"{names.prefix}{prefix.removeprefix(OWN_NAMES.prefix)}{theirs}.{kind}"


def layer_of(name: str) -> tuple[str, str]:
    """Split `model.layers.3.mlp.up_proj.weight` into `model.layers.3.` and `mlp.up_proj.weight`.

    The prefix is empty outside the layers.
    """
    if not name.startswith(OWN_NAMES.prefix):
        return "", name
    number, _, rest = name.removeprefix(OWN_NAMES.prefix).partition(".")
    return f"{OWN_NAMES.prefix}{number}.", rest


class _Layer(Mapping[str, Tensor]):
    """The tensors of one layer, without its prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, names: list[str]) -> None:
        self.tensors, self.prefix, self.names = tensors, prefix, names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def class_tensors(
    tensors: Mapping[str, Tensor], names: TensorNames, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a model with the class's names; the reverse of `CanonicalTensors`.

    tensors: by our names. Each is looked up once, when it is written.
    """
    layers: dict[str, list[str]] = {}
    for name in tensors:
        prefix, rest = layer_of(name)
        if prefix:
            layers.setdefault(prefix, []).append(rest)
        else:
            yield class_name(name, names), tensors[name]
    for prefix, rests in layers.items():
        theirs = names.prefix + prefix.removeprefix(OWN_NAMES.prefix)
        for name, tensor in write_stored(_Layer(tensors, prefix, rests), names, config):
            yield theirs + name, tensor


def _class_layout(module: str, tensor: Tensor, names: TensorNames, config: ModelConfig) -> Tensor:
    if names.halves and is_rotated(module):
        return halves_from_pairs(tensor, config, norm=module.endswith("_norm"))
    return tensor


def rows_of(module: str, config: ModelConfig) -> int:
    """Return the rows of a dense model's projection, for a fused one to be split."""
    q, k, v, gate, up = config.projection_sizes
    rows = {"q_proj": q, "k_proj": k, "v_proj": v, "gate_proj": gate, "up_proj": up}
    return rows[module.rpartition(".")[2]]
