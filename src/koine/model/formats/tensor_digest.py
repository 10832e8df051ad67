"""Digests of weights by value: equal values have an equal digest, in whatever file or float they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from koine.errors import UserError
from koine.hardware import usable_cores
from koine.model.formats.weight_files import open_safetensors, weight_files

CHUNK_BYTES = 16 * 2**20  # widened and hashed at once; the digest does not depend on it


def tensor_digest(tensor: Tensor) -> str:
    """Return a sha256 over all values; floats narrower than float32 are widened to it first."""
    flat = tensor.detach().contiguous().reshape(-1)
    dtype = torch.float32 if flat.is_floating_point() and flat.element_size() < 4 else flat.dtype
    length = CHUNK_BYTES // dtype.itemsize
    digest = hashlib.sha256(str(dtype).encode())
    for start in range(0, len(flat), length):
        chunk = flat[start : start + length].to("cpu", dtype)
        digest.update(chunk.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def joined_digest(tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> str:
    """Return a sha256 over the name, the shape and the digest of every tensor, sorted by name."""
    whole = hashlib.sha256()
    for name, shape, digest in sorted(tensors):
        whole.update(f"{name}{tuple(shape)}{digest}\n".encode())
    return whole.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return `joined_digest` of tensors in memory, which are hashed in parallel."""
    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        digests = pool.map(tensor_digest, tensors.values())
    return joined_digest(
        (name, tuple(tensor.shape), digest)
        for (name, tensor), digest in zip(tensors.items(), digests, strict=True)
    )


def folder_digest(folder: Path) -> str | None:
    """Return `joined_digest` of a model folder's tensors, read one by one; None for pickled weights."""
    try:
        files = weight_files(folder)
    except UserError:
        # Pickled weights, or none: whoever opens the model reports it.
        return None
    found: list[tuple[str, tuple[int, ...], str]] = []
    for path in files:
        file = open_safetensors(path)
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_tensor(name)
            found.append((name, tuple(tensor.shape), tensor_digest(tensor)))
    return joined_digest(found)
