"""The index of a distributed checkpoint (`.metadata`), read without trusting who wrote it.

`torch.distributed.checkpoint` stores its index as a pickle, and reading a pickle runs whatever it names. This
reader allows only the classes of an index and changes none of them. It checks what it has read and builds the
index again from plain numbers: an index can name no file outside its folder and ask for no more memory than
its files have bytes.
"""

from __future__ import annotations

import io
import pickle
import struct
import warnings
from pathlib import Path, PurePath
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from koine.errors import UserError, first_line
from koine.files import write_atomically

INDEX = ".metadata"
MAX_BYTES = 256 * 2**20
"""Size of an index: one of a million tensors is smaller."""

_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (_METADATA, name): getattr(torch_metadata, name)
        for name in (
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    # Path of the folder when it was written: only its text is used.
    **{("pathlib", name): PurePath for name in ("PosixPath", "WindowsPath")},
    **{("pathlib._local", name): PurePath for name in ("PosixPath", "WindowsPath")},
}  # fmt: skip
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def _layout(name: object) -> torch.layout:
    if name != "torch.strided":
        raise pickle.UnpicklingError("a layout that is not strided")
    return torch.strided


class _Unpickler(pickle._Unpickler):
    """An unpickler of the classes of an index, which calls nothing else.

    It is Python's, not C's: its memo is a dict, so that a number in the file cannot reserve memory.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        found = _CLASSES.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")

    def load_build(self) -> None:
        target = cast("Any", self).stack[-2]
        # Changing a class or a function would change it for the whole process.
        if type(target) not in _BUILDABLE:
            raise pickle.UnpicklingError(f"it changes a {type(target).__name__}")
        cast("Any", pickle._Unpickler).load_build(self)

    dispatch[pickle.BUILD[0]] = load_build


_BUILDABLE = {cls for cls in _CLASSES.values() if isinstance(cls, type) and cls is not PurePath}
_MALFORMED = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError,
    ValueError, RuntimeError, ArithmeticError, MemoryError, AssertionError, struct.error,
)  # fmt: skip


class _Reader(FileSystemReader):
    """torch's reader of a checkpoint folder, with an index from `read_index`."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


def load_tensors(folder: Path, index: Metadata, tensors: dict[str, Tensor], *, is_distributed: bool) -> None:
    """Load `tensors` in place from a checkpoint folder; any number of ranks may have written it.

    Args:
        folder: the checkpoint.
        index: its index, from `read_index`.
        tensors: filled in place.
        is_distributed: whether several ranks call this together.

    Raises:
        UserError: a tensor is missing, or its bytes are damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load_distributed(
                cast("dict[str, Any]", tensors),
                storage_reader=_Reader(folder, index),
                no_dist=not is_distributed,
            )
    except CheckpointException as error:
        reasons = [first_line(one) for one, _ in error.failures.values() if isinstance(one, Exception)]
        raise UserError(
            f"its tensors are not those of this training ({' '.join(reasons)[:160]})",
            where=folder,
            hint="choose an earlier checkpoint, or train again",
        ) from None


def read_index(folder: Path) -> Metadata:
    """Return the checked index of a checkpoint folder; raises `UserError` if it is damaged or hostile."""
    path = folder / INDEX
    try:
        if path.stat().st_size > MAX_BYTES:
            raise pickle.UnpicklingError(f"it is larger than {MAX_BYTES} bytes")
        return _checked(_Unpickler(io.BytesIO(path.read_bytes())).load(), folder)
    except FileNotFoundError:
        why = "there is none"
    except _MALFORMED as error:
        why = (
            f"{type(error).__name__}: {error}"
            if not isinstance(error, pickle.UnpicklingError)
            else str(error)
        )
    raise UserError(
        f"its index is not one of a checkpoint ({' '.join(why.split())[:120]})",
        where=path,
        hint="do not use this checkpoint; take one from a source that you trust",
    )


def rewrite_index(folder: Path) -> None:
    """Write the index again without its path and random number, so that equal trainings have equal bytes."""
    write_atomically(folder / INDEX, pickle.dumps(read_index(folder), protocol=4))


def _checked(found: Any, folder: Path) -> Metadata:
    """Return the index built again from values checked one by one; raises one of `_MALFORMED`."""
    if type(found) is not Metadata:
        raise ValueError("no index")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for key, info in cast("dict[Any, Any]", found.storage_data).items():
        if type(key) is not MetadataIndex or type(info) is not _StorageInfo:
            raise ValueError("no index of tensors")
        file, begin, length = info.relative_path, info.offset, info.length
        if type(file) is not str or file not in sizes or type(begin) is not int or type(length) is not int:
            raise ValueError("a tensor lies in no file of this folder")
        if not 0 <= begin <= begin + length <= sizes[file]:
            raise ValueError("a tensor lies outside its file")
        if info.transform_descriptors:
            raise ValueError("a tensor is encoded")
        name, offset = key.fqn, None if key.offset is None else _checked_size(key.offset)
        if type(name) is not str or (key.index is not None and type(key.index) is not int):
            raise ValueError("a tensor has no name")
        storage[MetadataIndex(name, offset, key.index)] = _StorageInfo(file, begin, length)
    tensors: dict[str, Any] = {}
    total = 0
    for name, about in found.state_dict_metadata.items():
        # torch would unpickle anything else than a tensor without restrictions.
        if type(name) is not str or type(about) is not TensorStorageMetadata:
            raise ValueError("it holds something that is no tensor")
        dtype, size = about.properties.dtype, _checked_size(about.size)
        if dtype not in _DTYPES.values():
            raise ValueError("a tensor has no dtype")
        chunks = [
            ChunkStorageMetadata(_checked_size(one.offsets), _checked_size(one.sizes)) for one in about.chunks
        ]
        if sum(one.sizes.numel() for one in chunks) != size.numel():
            raise ValueError(f"{name[:40]} is not whole")
        if any(one.sizes.numel() and MetadataIndex(name, one.offsets) not in storage for one in chunks):
            raise ValueError(f"{name[:40]} lies nowhere")
        total += size.numel() * dtype.itemsize
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)
    if total > sum(sizes.values()):
        raise ValueError(f"{total} bytes of tensors in files of {sum(sizes.values())}")
    names = {name: (name,) for name in tensors}
    return Metadata(tensors, planner_data=names, storage_data=storage, storage_meta=StorageMeta())


def _checked_size(size: Any) -> torch.Size:
    if type(size) is not torch.Size or any(type(one) is not int or not 0 <= one < 2**62 for one in size):
        raise ValueError("a shape is none")
    return torch.Size(tuple(size))
