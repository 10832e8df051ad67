"""Read `pytorch_model.bin` files: tensors only, mapped into memory, no code of theirs is run.

`torch.load(weights_only=True)` reads the pickle with an unpickler that knows tensors and plain containers.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koine.errors import UserError, first_line
from koine.files import read_json
from koine.model.formats.opening import one_line
from koine.model.formats.weight_files import PICKLED, PICKLED_INDEX

_COPY = "it is truncated or damaged; copy it again"


def load_pickled(folder: Path, files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the tensors of one or several files, mapped where the format allows it.

    Raises `UserError` for a file that holds code or more than tensors, is damaged, or does not agree with
    the index.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _load(file).items():
            if name in found:
                raise UserError(
                    f"{name} stands in two files",
                    where=folder,
                    hint="the folder holds the shards of two models",
                )
            found[name] = tensor
    if not (folder / PICKLED).is_file():
        _check_index(folder, files, found)
    if not found:
        raise UserError("holds no tensor", where=files[0], hint=_COPY)
    return found


def _check_index(folder: Path, files: Sequence[Path], found: Mapping[str, Tensor]) -> None:
    """Compare the shards with the index: every tensor is where it says, and no shard is left over."""
    index = folder / PICKLED_INDEX
    shards = read_json(index)["weight_map"]
    lost, more = sorted(shards.keys() - found.keys()), sorted(found.keys() - shards.keys())
    if lost:
        raise UserError(
            f"names {lost[0]}, which no shard holds", where=index, hint="copy the whole folder again"
        )
    if more:
        raise UserError(
            f"does not name {more[0]}, which a shard holds", where=index, hint="copy the whole folder again"
        )
    beside = {path for path in folder.glob("pytorch_model-*.bin") if path.is_file()} - set(files)
    if beside:
        raise UserError(
            f"does not name the shard {min(beside).name}",
            where=index,
            hint="remove it, or copy the folder again",
        )


def _load(file: Path) -> dict[str, Tensor]:
    try:
        value = _opened(file)
    except pickle.UnpicklingError as error:
        raise _refused(file, error) from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        AssertionError,
    ) as error:
        raise UserError(
            f"no whole file of PyTorch weights ({one_line(error)})", where=file, hint=_COPY
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"holds a {type(value).__name__}, no dictionary of tensors",
            where=file,
            hint="give a model's weights",
        )
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"holds {name!r}: {type(tensor).__name__}"[:200],
                where=file,
                hint="only dictionaries of tensors by name are imported",
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(
                f"{name} is a tensor of a kind that safetensors does not hold",
                where=file,
                hint="convert it first",
            )
    return dict(value)


def _opened(file: Path) -> Any:
    """Load a file, mapped; files of before PyTorch 1.6 are read into memory."""
    with file.open("rb") as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"
    if is_zip and not zipfile.is_zipfile(file):
        raise EOFError("the archive has no end")
    return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)


def _refused(file: Path, error: pickle.UnpicklingError) -> UserError:
    """Return the error for a pickle that the restricted reader refuses: it holds code, or it is damaged."""
    text = str(error)
    if re.search("Unsupported global|Trying to |Can only (?:create|build)", text):
        named = re.search(r"(?:GLOBAL|class|instantiate|call) ([A-Za-z_][\w.]*)", text)
        what = f" ({named[1]})" if named else ""
        return UserError(
            f"holds Python code{what}, which is never run",
            where=file,
            hint="do not trust this file; ask for the model as safetensors",
        )
    return UserError(f"no whole file of PyTorch weights ({first_line(error)[:200]})", where=file, hint=_COPY)
