"""Models without weights: their names and shapes, for tensors that come from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

RANDOM = (Tensor.normal_, Tensor.uniform_)


class _NoInitialisation(TorchFunctionMode):
    """Leave out random initialisation.

    On the meta device it has no effect but takes most of the time: torch computes it by Python code that first
    imports its compiler (1.5 s).
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Initialisers name their tensor.
        tensor = args[0] if args else (kwargs or {}).get("tensor")
        if func in RANDOM or getattr(func, "__module__", None) == "torch.nn.init":
            return tensor
        return func(*args, **(kwargs or {}))


@contextmanager
def meta_device() -> Iterator[None]:
    """Create modules on the meta device, uninitialised."""
    with torch.device("meta"), _NoInitialisation():
        yield
