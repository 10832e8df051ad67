"""Tensor types of GGUF files: sizes, and their values through the `gguf` library's own dequantisation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from koine.errors import UserError
from koine.extras import import_extra

EXACT: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that store a number each, and torch's dtype for them."""

TYPES: Final = (
    *EXACT, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip


def gguf_library() -> Any:
    """Import the `gguf` package. Raises `UserError` with the command that installs it."""
    return import_extra("gguf", extra="gguf", purpose="read a GGUF file")


@dataclass(frozen=True)
class TensorType:
    """A type: its name in ggml, numbers in a block, and bytes of a block."""

    name: str
    block: int
    block_bytes: int

    def values(self, data: NDArray[np.uint8]) -> Tensor:
        """Return the numbers of rows of bytes, [rows, numbers of a row]: as stored, or dequantised to float32."""
        if self.name in EXACT:
            return torch.from_numpy(data).view(EXACT[self.name])
        gguf = gguf_library()
        return torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[self.name]))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of `values`."""
        return EXACT.get(self.name, torch.float32)


def tensor_type(type_id: int, name: str, where: Path) -> TensorType:
    """Return the type with ggml's number `type_id`. Raises `UserError` for others than `TYPES`."""
    gguf = gguf_library()
    known = {int(kind): kind for kind in gguf.GGMLQuantizationType}
    kind = known.get(type_id)
    if kind is None or kind.name not in TYPES:
        raise UserError(
            f"{name} is of the type {type_id if kind is None else kind.name}",
            where=where,
            hint=f"these are read: {', '.join(TYPES)}",
        )
    return TensorType(kind.name, *gguf.GGML_QUANT_SIZES[kind])
