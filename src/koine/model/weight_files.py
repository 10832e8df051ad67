"""Which files of a model directory hold its weights: those that `transformers` would open."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from koine.errors import UserError
from koine.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory. Where a whole file and an index lie side by side, the whole file counts, as for `transformers`.

    Raises `UserError` where there are none, one is missing, or an index is damaged or names a file outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        raise UserError(
            f"holds no {SINGLE}", where=folder, mend="weights in another format must be converted first"
        )
    names = shard_names(folder / INDEX)
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"the shard {name} is missing", where=folder, mend="copy the whole folder again")
    return [folder / name for name in names]


def shard_names(index: Path) -> list[str]:
    """The files that an index names, each once, sorted. Raises `UserError` where it is damaged or names a file outside its folder.

    A file of the folder may be a link: whoever made the link had the right to.
    """
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError("holds no weight_map", where=index, mend="the file is damaged; copy the folder again")
    for name in shards.values():
        if _leaves(name):
            raise UserError(
                f"names a file outside its folder, {name!r}"[:300],
                where=index,
                mend="a model's shards lie beside its index; do not trust this folder",
            )
    if not shards:
        raise UserError(
            "names no tensor at all", where=index, mend="the file is damaged; copy the folder again"
        )
    return sorted(set(shards.values()))


def _leaves(name: str) -> bool:
    """Whether a name in an index is no plain name of a file in its folder or below, on any system."""
    if not name or "\0" in name or len(name.encode("utf-8", "replace")) > 255:
        return True
    return any(
        kind(name).is_absolute() or ".." in kind(name).parts or kind(name).drive
        for kind in (PurePosixPath, PureWindowsPath)
    )
