"""Make and list small folders for the tests of files."""

from __future__ import annotations

from pathlib import Path


def names(folder: Path) -> list[str]:
    """Everything below a folder, hidden too, links not followed."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def tree(folder: Path, *files: str) -> None:
    """Write files that hold their own names."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
