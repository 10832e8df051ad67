"""Experts that a checkpoint holds fused, in one tensor of three axes for all experts of a layer.

`transformers` saves a tensor for each expert by default, and fused ones with `save_original_format=False`:
`mlp.experts.gate_up_proj` `[experts, 2 * intermediate, hidden]` and `mlp.experts.down_proj`
`[experts, hidden, intermediate]`. The router is then `mlp.gate`, whatever the class calls it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from koine.errors import UserError
from koine.model.families.family import TensorNames

_FUSED = re.compile(r"^(.*\.\d+\.)mlp\.(experts\.gate_up_proj|experts\.down_proj|gate\.weight)$")


@dataclass(frozen=True)
class TensorSlice:
    """A tensor in a file, or a part of one whose bytes are contiguous; `begin` is its first byte."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def part(self, index: int, count: int) -> TensorSlice:
        """Return one of `count` equal parts of the first axis; without that axis where it has length 1."""
        rows = self.shape[0] // count
        shape = self.shape[1:] if rows == 1 and len(self.shape) > 2 else (rows, *self.shape[1:])
        size = torch.Size((rows, *self.shape[1:])).numel() * self.dtype.itemsize
        return TensorSlice(self.file, self.dtype, shape, self.begin + index * size)

    def read(self) -> Tensor:
        """Read the tensor into memory of its own: a mapped file would stay in memory as a whole."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if tensor.numel():
            view = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.begin)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise UserError(
                            "ends too early", where=self.file, hint="it is truncated; copy it again"
                        )
                    done += count
        return tensor


def split_experts(name: str, whole: TensorSlice, names: TensorNames) -> dict[str, TensorSlice]:
    """Return a tensor of a file under its name; a fused one as those of each expert.

    names: of the class.
    """
    found = _FUSED.match(name)
    if found is None:
        return {name: whole}
    prefix, kind = found[1], found[2]
    if kind == "gate.weight":
        return {f"{prefix}{names.stored('mlp.router')}.weight": whole}
    if len(whole.shape) != 3:
        return {name: whole}
    out: dict[str, TensorSlice] = {}
    for number in range(whole.shape[0]):
        expert = whole.part(number, whole.shape[0])
        parts = ("gate_proj", "up_proj") if kind == "experts.gate_up_proj" else ("down_proj",)
        for index, part in enumerate(parts):
            one = expert if len(parts) == 1 else expert.part(index, 2)
            out[f"{prefix}{names.stored(f'mlp.experts.{number}.{part}')}.weight"] = one
    return out
