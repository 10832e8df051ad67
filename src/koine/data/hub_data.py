"""Data sets of the hub: `OWNER/NAME[@REVISION][:SUBSET or file pattern]`.

A subset is one of the `configs` of the data set's card (README.md), or a folder. Its files are shown as a
folder of links in the user's cache, a folder for each split, which is then read as any local folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path
from typing import Any

from koine.data.decompression import COMPRESSIONS
from koine.data.piped import local_copy
from koine.data.readers import JSON, KINDS
from koine.errors import UserError, did_you_mean
from koine.files import walk
from koine.hub import HubName, hub_name, snapshot

CARD = "README.md"
_DATA = tuple(f"*{kind}{packed}" for kind in (*KINDS, JSON) for packed in ("", *COMPRESSIONS))
_NO_DATA = ("README*", "LICENSE*", "requirements*.txt")
_PATTERN_CHARACTERS = "*?["


@dataclass(frozen=True)
class Subset:
    """Files of a data set: patterns by split; the split "" is for those whose own names say it."""

    name: str
    patterns: Mapping[str, tuple[str, ...]]
    is_default: bool = False


def dataset_folder(path: str | Path) -> Path:
    """Return the local path of data: the path itself, the copy of a pipe, or the folder of a data set.

    Raises `UserError` if there is neither, the hub cannot be reached, or the data set has several subsets and
    none is named.
    """
    name = hub_name(path)
    if name is None:
        return local_copy(path)
    subset = _chosen(name)
    if subset is None:
        folder = snapshot(name, "dataset", _DATA, _NO_DATA)
        if not folder.is_dir():
            raise UserError(
                "the data set on the hub holds no data files", where=name.given, hint="see its page"
            )
        return folder
    patterns = [pattern for several in subset.patterns.values() for pattern in several]
    folder = snapshot(name, "dataset", patterns)
    files = {
        split: [file for file in _below(folder) if any(fnmatch(file, pattern) for pattern in several)]
        for split, several in subset.patterns.items()
    }
    if not any(files.values()):
        raise UserError(
            f"the data set on the hub holds no files '{subset.name}'",
            where=name.given,
            hint="name a subset of its card, a folder, or a file pattern such as 'data/*.parquet'",
        )
    return _linked(name, folder, files)


def _below(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in walk(folder)] if folder.is_dir() else []


def _chosen(name: HubName) -> Subset | None:
    """Return the subset that is named, or the only one or the default of the card; None: all files."""
    part = name.part
    if part is not None and any(character in part for character in _PATTERN_CHARACTERS):
        return Subset(part, {"": (part,)})
    card = snapshot(name, "dataset", (CARD,)) / CARD
    subsets = card_subsets(card) if card.is_file() else []
    if part is not None:
        named = next((one for one in subsets if one.name == part), None)
        return named or Subset(part, {"": (part, f"{part.rstrip('/')}/*")})
    if not subsets:
        return None
    chosen = subsets if len(subsets) == 1 else [one for one in subsets if one.is_default]
    if not chosen:
        names = [one.name for one in subsets]
        raise UserError(
            f"the data set has {len(names)} subsets, and none is its default",
            where=name.given,
            hint=f"name one, as in {name.repository}:{names[0]}; {did_you_mean('', names)}",
        )
    return chosen[0]


def card_subsets(card: Path) -> list[Subset]:
    """Return the subsets that the card of a data set lists with their files.

    Source: `configs` of the metadata, as https://huggingface.co/docs/hub/datasets-manual-configuration says.
    """
    from huggingface_hub.repocard import metadata_load

    about = metadata_load(card)
    listed = about.get("configs") if isinstance(about, dict) else None
    found = []
    for config in listed if isinstance(listed, list) else ():
        if not isinstance(config, dict) or not isinstance(config.get("config_name"), str):
            continue
        patterns = _patterns(config.get("data_files"), config.get("data_dir"))
        if patterns:
            name = config["config_name"]
            found.append(Subset(name, patterns, bool(config.get("default")) or name == "default"))
    return found


def _patterns(data_files: Any, data_dir: Any) -> dict[str, tuple[str, ...]]:
    """Return the patterns by split of `data_files`: a pattern, a list of them, or of splits with theirs."""
    entries = data_files if isinstance(data_files, list) else [] if data_files is None else [data_files]
    above = f"{data_dir.strip('/')}/" if isinstance(data_dir, str) and data_dir.strip("/.") else ""
    found: dict[str, list[str]] = {}
    for entry in entries or (["*"] if above else []):
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("", entry)
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str) and isinstance(split, str):
                pattern = above + path.removeprefix("./").replace("**/*", "*").replace("**", "*")
                found.setdefault(split, []).extend((pattern, f"{pattern.rstrip('/')}/*"))
    return {split: tuple(patterns) for split, patterns in found.items()}


def _linked(name: HubName, folder: Path, files: Mapping[str, Iterable[str]]) -> Path:
    """Return a folder in the user's cache with links to the files, below a folder for each split."""
    links = {
        (Path(split) / file if split else Path(file)): folder / file
        for split, several in files.items()
        for file in several
    }
    digest = blake2b(repr(sorted(links.items())).encode(errors="surrogateescape"), digest_size=6).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "koine" / "hub"
    shown = cache / f"{name.repository.replace('/', '--')}-{digest}"
    for link, target in links.items():
        place = shown / link
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.symlink_to(target)
        except FileExistsError:
            # Of an earlier call: the folder's name says that it leads to the same file.
            continue
    return shown
