"""Find the weight files of a model folder, as `transformers` chooses them where there are several."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.files import read_json
from koine.model.formats.safetensors_header import read_header

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def weight_files(folder: Path, *, pickled: bool = False) -> list[Path]:
    """Return the files that hold a folder's weights, sorted by name.

    The first that exists is chosen, as in `transformers`: the file that `transformers_weights` of config.json
    names, `model.safetensors`, the index of shards, then (with `pickled`) `pytorch_model.bin` and its index.

    Raises `UserError` for an adapter, a folder without weights, a damaged index, a shard that is missing or
    outside the folder.
    """
    check_adapter(folder)
    named = _named_by_config(folder)
    choices = [named] if named else [SINGLE, INDEX, *((PICKLED, PICKLED_INDEX) if pickled else ())]
    chosen = next((name for name in choices if (folder / name).is_file()), None)
    if chosen is None:
        others = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
        has = f" (it has {others[0]})" if others and named is None else ""
        raise UserError(
            f"holds no {named or SINGLE}{has}",
            where=folder,
            hint="weights in another format must be converted first",
        )
    names = shard_names(folder / chosen) if chosen.endswith(".index.json") else [chosen]
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"the shard {name} is missing", where=folder, hint="copy the whole folder again")
    return [folder / name for name in names]


def has_only_pickled_weights(folder: Path) -> bool:
    """Return whether a folder's weights are files of `pickle` alone."""
    if _named_by_config(folder) or any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return False
    return any((folder / name).is_file() for name in (PICKLED, PICKLED_INDEX))


def _named_by_config(folder: Path) -> str | None:
    """Return the file that `transformers_weights` of config.json names, if any."""
    if not (folder / "config.json").is_file():
        return None
    value = read_json(folder / "config.json")
    name = value.get("transformers_weights") if isinstance(value, dict) else None
    if name is None:
        return None
    if not isinstance(name, str) or _leaves(name) or not name.endswith((".safetensors", INDEX[5:])):
        raise UserError(
            f"the field 'transformers_weights' is {name!r}",
            where=folder / "config.json",
            hint="it must name a .safetensors file of the folder, or an index of some",
        )
    return name


def shard_names(index: Path) -> list[str]:
    """Return the files that an index names, sorted and without repetition.

    A file of the folder may be a link: who made the link had the right to.
    Raises `UserError` where the index is damaged or names a file outside its folder.
    """
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError("holds no weight_map", where=index, hint="the file is damaged; copy the folder again")
    for name in shards.values():
        if _leaves(name):
            raise UserError(
                f"names a file outside its folder, {name!r}"[:300],
                where=index,
                hint="a model's shards lie beside its index; do not trust this folder",
            )
    if not shards:
        raise UserError(
            "names no tensor at all", where=index, hint="the file is damaged; copy the folder again"
        )
    return sorted(set(shards.values()))


def _leaves(name: str) -> bool:
    """Return whether a name in an index leaves its folder, or is no file name, on any system."""
    if not name or "\0" in name or len(name.encode("utf-8", "replace")) > 255:
        return True
    return any(
        kind(name).is_absolute() or ".." in kind(name).parts or kind(name).drive
        for kind in (PurePosixPath, PureWindowsPath)
    )


def check_adapter(folder: Path) -> None:
    """Raise `UserError` for a PEFT adapter (LoRA), whose changes are not in its weights."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    about = read_json(folder / ADAPTER_CONFIG)
    about = about if isinstance(about, dict) else {}
    base = about.get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    kind = about.get("peft_type")
    kind = kind if isinstance(kind, str) and kind else "PEFT"
    if any((folder / name).exists() for name in (SINGLE, INDEX, PICKLED, PICKLED_INDEX)):
        raise UserError(
            f"holds a {kind} adapter{of} beside whole weights, and nothing says whether they are merged",
            where=folder,
            hint=f"merge it with peft's merge_and_unload, or remove {ADAPTER_CONFIG} if that is done",
        )
    raise UserError(
        f"is a {kind} adapter{of}, not a whole model",
        where=folder,
        hint=f"give it with its base, as BASE+{folder}, or merge it: koine model merge-adapter BASE {folder} "
        "--out MODEL",
    )


def open_safetensors(file: Path) -> Any:
    """Open one safetensors file. Raises `UserError` where it is truncated or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"not a whole safetensors file ({error})",
            where=file,
            hint="it is truncated or damaged; copy or build it again",
        ) from None


def stored_bytes(files: list[Path]) -> dict[torch.dtype, int]:
    """Return the bytes stored in each floating-point dtype, from the headers.

    Empty where a tensor has a dtype of a quantiser. Raises `UserError` for a damaged file.
    """
    import torch

    found: dict[torch.dtype, int] = {}
    for file in files:
        for entry in read_header(file).values():
            if entry.dtype not in FLOATS and entry.dtype.startswith("F"):
                return {}
            if entry.dtype in FLOATS:
                dtype = getattr(torch, FLOATS[entry.dtype])
                found[dtype] = found.get(dtype, 0) + entry.end - entry.begin
    return found


def widest(dtypes: dict[torch.dtype, int]) -> torch.dtype:
    """Return the dtype that holds all of these without rounding; float32 for none."""
    import torch

    result: torch.dtype | None = None
    for dtype in dtypes:
        result = dtype if result is None else torch.promote_types(result, dtype)
    return torch.float32 if result is None else result


def widest_dtype(folder: Path) -> torch.dtype:
    """Return the dtype that holds every stored weight of a folder exactly; float32 for pickled weights."""
    import torch

    files = weight_files(folder, pickled=True)
    if files[0].suffix != ".safetensors":
        return torch.float32
    return widest(stored_bytes(files))
