"""Tensors of a model to write: dtype and shape of each are known, the content is computed when it is written.

Memory then holds a few tensors, whatever the number of branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from koine.combine.moe.branches import Branch


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write; `compute` returns it, and may return a wider or narrower dtype."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]


class PlannedTensors(Mapping[str, Tensor]):
    """Planned tensors by our stored names; each lookup computes one."""

    def __init__(self, planned: Mapping[str, PlannedTensor]) -> None:
        self.planned = planned

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of each."""
        return {name: (one.dtype, one.shape) for name, one in self.planned.items()}

    def __getitem__(self, name: str) -> Tensor:
        one = self.planned[name]
        return one.compute().to(one.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.planned)

    def __len__(self) -> int:
        return len(self.planned)


def widest_dtype(name: str, members: Sequence[Branch]) -> torch.dtype:
    """Return the dtype that holds a tensor of every member without rounding."""
    dtype = members[0].weights.dtype(name)
    for member in members[1:]:
        dtype = torch.promote_types(dtype, member.weights.dtype(name))
    return dtype


def copied(branch: Branch, name: str, dtype: torch.dtype) -> PlannedTensor:
    """Plan a copy of a branch's tensor."""
    return PlannedTensor(dtype, branch.weights.shape(name), lambda: branch.tensor(name))


def averaged(members: Sequence[Branch], name: str, dtype: torch.dtype) -> PlannedTensor:
    """Plan the mean of the members' tensors; they are read one after the other."""
    shape = members[0].weights.shape(name)
    return PlannedTensor(dtype, shape, lambda: mean((one.tensor(name) for one in members), dtype))


def given(tensor: Tensor) -> PlannedTensor:
    """Plan a tensor that is in memory."""
    return PlannedTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def mean(tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the average in `dtype`, computed in float32 or float64."""
    total, count = None, 0
    for tensor in tensors:
        upcast = torch.promote_types(torch.promote_types(tensor.dtype, dtype), torch.float32)
        # Adding a narrower tensor widens it entry by entry: no copy.
        total = tensor.to(upcast, copy=True) if total is None else total.add_(tensor)
        count += 1
    assert total is not None
    return total.div_(count).to(dtype)
