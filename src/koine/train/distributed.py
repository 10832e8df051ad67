"""Several processes: who they are, how the weights are split among them, and their sums. The model knows nothing of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from koine.errors import UserError, first_line
from koine.hardware import check_device
from koine.model.language_model import LanguageModel


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
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


def _number_of(variable: str, default: int, *, least: int) -> int:
    """An integer from an environment variable that `torchrun` sets.

    Raises `UserError` for anything else.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or not least <= int(text[:10]) < 10**9:
        raise UserError(
            f"'{text}' is no number of {least} or more",
            where=f"the environment variable {variable}",
            hint="unset it to train in one process, or start with torchrun",
        )
    return int(text)


def _refuse_half_a_launch(rank: int, world_size: int) -> None:
    """Raise `UserError` where the environment speaks of several processes and does not say how they meet."""
    hint = "unset WORLD_SIZE to train in one process, or start with torchrun"
    for variable in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(variable, "").strip():
            raise UserError(
                f"WORLD_SIZE is {world_size} and {variable} is not set", where="the environment", hint=hint
            )
    _number_of("MASTER_PORT", 0, least=1)
    if rank >= world_size:
        raise UserError(
            f"RANK is {rank}, and WORLD_SIZE only {world_size}", where="the environment", hint=hint
        )


@contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """Join the processes that `torchrun` started (its environment variables say so); alone where there are none.

    Raises `UserError` where the device is not here.
    """
    world_size = _number_of("WORLD_SIZE", 1, least=1)
    rank = _number_of("RANK", 0, least=0)
    local = _number_of("LOCAL_RANK", 0, least=0)
    if world_size > 1:
        _refuse_half_a_launch(rank, world_size)
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
        _meet("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))
        if started:
            # A rank that leaves while another still talks to it takes that one down with it.
            dist.barrier()
    finally:
        if started:
            dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Join the group; raises `UserError` where the others do not answer."""
    try:
        dist.init_process_group(backend)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the processes of this training cannot meet at {address} ({first_line(error)})",
            hint="start all of them with torchrun, or unset WORLD_SIZE to train in one process",
        ) from error


def shard(model: LanguageModel, ranks: Ranks, dtype: torch.dtype) -> None:
    """FSDP2: each block a unit of its own and the rest (embedding, norm, head) another; float32 shards, `dtype` for compute.

    Gradients are reduced in float32 and come out as the mean over ranks. The rest stays gathered between the forward pass and the
    backward pass, because the loss reads the output matrix outside the model's forward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise UserError(
            f"{type(model).__name__} cannot be split over processes", hint="train it with one process"
        )
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    assert isinstance(model, nn.Module)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
