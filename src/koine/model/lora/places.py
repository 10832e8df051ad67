"""Which parts of our decoder's matrices can have an adapter, and what the class calls them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from koine.errors import UserError
from koine.model.config import ModelConfig
from koine.model.families.family import TensorNames
from koine.model.formats.stored_tensors import read_stored, write_stored
from koine.model.formats.tensor_names import FUSED, OUTPUTS, fused_modules
from koine.model.lora.layers import Part


def adaptable_parts(name: str, config: ModelConfig, names: TensorNames) -> list[Part]:
    """Return the parts of a matrix of a block that can have an adapter, in their order.

    Attention experts cannot: their heads are interleaved in our matrices.

    name: of the matrix in its block, such as `qkv_proj.weight`.
    """
    parts: list[Part] = []
    at = 0
    for modules, size in fused_modules(name, config) if name in FUSED else []:
        if size and len(modules) == 1:
            [module] = modules
            place = names.fused_place(module)
            if place is None:
                parts.append(Part(names.stored(module), (module,), (size,), at))
            elif parts and parts[-1].name == place[0]:
                last = parts.pop()
                parts.append(Part(last.name, (*last.modules, module), (*last.sizes, size), last.start))
            else:
                parts.append(Part(place[0], (module,), (size,), at))
        at += size
    return parts


def joins_inputs(name: str) -> bool:
    """Return whether the parts of a matrix are columns: it joins the outputs of attention and feed-forward."""
    return name in OUTPUTS


def is_target(module: str, targets: Sequence[str]) -> bool:
    """Return whether a module is a target, by the end of its name as in `peft`; no targets: all are."""
    return not targets or any(module == one or module.endswith(f".{one}") for one in targets)


def check_targets(targets: Sequence[str], modules: Iterable[str], *, hint: str = "") -> None:
    """Raise `UserError` for a target that is the end of no module's name."""
    known = list(modules)
    for target in targets:
        if not any(is_target(module, (target,)) for module in known):
            possible = sorted({module.rpartition(".")[2] for module in known})
            raise UserError(
                f"no linear layer that can have a LoRA adapter is called '{target}'",
                hint=f"possible are: {', '.join(possible)}{hint}",
            )


def to_class_rows(b_or: Tensor, part: Part, names: TensorNames, config: ModelConfig) -> Tensor:
    """Reorder the rows of B from our decoder's layout to the class's, as those of its weight are."""
    pieces = b_or.split_with_sizes(part.sizes)
    ours = {f"{module}.weight": piece for module, piece in zip(part.modules, pieces, strict=True)}
    [(_, tensor)] = write_stored(ours, names, config)
    return tensor.contiguous()


def from_class_rows(b_or: Tensor, part: Part, names: TensorNames, config: ModelConfig) -> Tensor:
    """Reorder the rows of B from the class's layout to our decoder's; undoes `to_class_rows`."""
    stored: Mapping[str, Tensor] = {f"{part.name}.weight": b_or}
    pieces = [read_stored(f"{module}.weight", stored.__getitem__, names, config) for module in part.modules]
    return torch.cat(pieces).contiguous()
