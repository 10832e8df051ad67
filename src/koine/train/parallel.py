"""Several processes: who they are, how the weights are split among them, and their sums. The model knows nothing of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from koine.errors import UserError
from koine.hardware import check_device

_UNSET = "start several processes with torchrun; for one, unset WORLD_SIZE, RANK and LOCAL_RANK"


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world_size > 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks; alone: `values`."""
        if self.several:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.several:
            dist.barrier()


def _started_by_torchrun() -> tuple[int, int]:
    """The number of processes and this one's number on its machine, by the environment; `UserError` where they make no sense."""
    found = {}
    for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("RANK", 0), ("MASTER_PORT", 1)):
        text = os.environ.get(name, str(default))
        least = 1 if name in ("WORLD_SIZE", "MASTER_PORT") else 0
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
            raise UserError(f"the environment variable {name} is '{text}'", mend=_UNSET)
        found[name] = int(text)
    if found["WORLD_SIZE"] > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(f"WORLD_SIZE is {found['WORLD_SIZE']} and {missing[0]} is not set", mend=_UNSET)
        if found["RANK"] >= found["WORLD_SIZE"]:
            raise UserError(f"RANK is {found['RANK']} of {found['WORLD_SIZE']} processes", mend=_UNSET)
        if found["MASTER_PORT"] > 65_535:
            raise UserError(f"the environment variable MASTER_PORT is '{found['MASTER_PORT']}'", mend=_UNSET)
    return found["WORLD_SIZE"], found["LOCAL_RANK"]


@contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """Join the processes that `torchrun` started (its environment variables say so); alone where there are none.

    Raises `UserError` where the device is not here.
    """
    world_size, local = _started_by_torchrun()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    if device == "cuda":
        device = f"cuda:{local}"
        check_device(device)
        torch.cuda.set_device(local)
    if world_size == 1:
        yield Ranks(0, 1, torch.device(device))
        return
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))
        if started:
            # A rank that leaves while another still talks to it takes that one down with it.
            dist.barrier()
    finally:
        if started:
            dist.destroy_process_group()


def shard(model: nn.Module, ranks: Ranks, dtype: torch.dtype) -> None:
    """FSDP2: each block a unit of its own and the rest (embedding, norm, head) another; float32 shards, `dtype` for compute.

    Gradients are reduced in float32 and come out as the mean over ranks. The rest stays gathered between the forward pass and the
    backward pass, because the loss reads the output matrix outside the model's forward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise UserError(
            f"{type(model).__name__} cannot be split over processes", mend="train it with one process"
        )
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
