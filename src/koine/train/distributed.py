"""Several processes: their ranks, sums over them, and FSDP. The model knows nothing of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from koine.errors import UserError, first_line
from koine.hardware import check_device, chosen_device
from koine.model.language_model import LanguageModel


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a training."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.world_size > 1

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all ranks, in place."""
        if self.is_distributed:
            dist.all_reduce(values)
        return values

    def sum_number(self, value: float) -> float:
        """Return the sum of a number over all ranks, in float64."""
        return self.sum_numbers({"value": value})["value"]

    def sum_numbers(self, values: dict[str, float]) -> dict[str, float]:
        """Return the sums over all ranks, in float64; every rank gives the same names in the same order."""
        if not self.is_distributed or not values:
            return values
        sums = self.sum(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, sums.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank."""
        return self.sum_number(float(flag)) > 0

    def of_main(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the main rank's figures on every rank, so that all decide the same from them."""
        if not self.is_distributed:
            return figures
        shared = [figures]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.is_distributed:
            dist.barrier()


def _env_integer(variable: str, default: int, *, low: int) -> int:
    """Return an integer that `torchrun` sets in the environment; raises `UserError` for other text."""
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or not low <= int(text[:10]) < 10**9:
        raise UserError(
            f"'{text}' is no integer of {low} or more",
            where=f"the environment variable {variable}",
            hint="unset it to train in one process, or start with torchrun",
        )
    return int(text)


def _check_launch(rank: int, world_size: int) -> None:
    """Raise `UserError` where the environment speaks of several processes and lacks another variable."""
    hint = "unset WORLD_SIZE to train in one process, or start with torchrun"
    for variable in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(variable, "").strip():
            raise UserError(
                f"WORLD_SIZE is {world_size} and {variable} is not set", where="the environment", hint=hint
            )
    _env_integer("MASTER_PORT", 0, low=1)
    if rank >= world_size:
        raise UserError(
            f"RANK is {rank}, and WORLD_SIZE only {world_size}", where="the environment", hint=hint
        )


@contextmanager
def join_ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, by its environment variables; without them, one process.

    Raises `UserError` for a device that this machine does not have.
    """
    world_size = _env_integer("WORLD_SIZE", 1, low=1)
    rank = _env_integer("RANK", 0, low=0)
    local = _env_integer("LOCAL_RANK", 0, low=0)
    if world_size > 1:
        _check_launch(rank, world_size)
    device = chosen_device(device)
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
        _init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))
        if started:
            # A rank that leaves while another still communicates with it makes that one fail.
            dist.barrier()
    finally:
        if started:
            dist.destroy_process_group()


def _init_process_group(backend: str) -> None:
    """Join the process group; raises `UserError` if the other processes do not answer."""
    try:
        dist.init_process_group(backend)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the processes of this training cannot meet at {address} ({first_line(error)})",
            hint="start all of them with torchrun, or unset WORLD_SIZE to train in one process",
        ) from error


def apply_fsdp(model: LanguageModel, ranks: Ranks, dtype: torch.dtype) -> None:
    """Apply FSDP2 in place: float32 shards, computation in `dtype`.

    Each block is a unit, and the rest (embedding, norm, head) another one. Gradients are reduced in float32
    and are the mean over ranks. The rest stays gathered between forward and backward, because the loss reads
    the output matrix outside the model's forward. Raises `UserError` for a model without blocks.
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
