"""Write one safetensors file with the library, readable by whom the umask allows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from koine.files import apply_umask


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file.

    The library makes the file readable by its owner only; it gets the permissions of any other new file.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    apply_umask(path)
