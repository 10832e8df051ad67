"""A full disk: a file system of a few hundred kilobytes, where the system lets us mount one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .case import listing


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a file system; the same is simulated in the table of bad inputs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_the_sample_world_on_a_full_disk_leaves_nothing(small_disk: Path) -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "koine",
            "data",
            "sample",
            "--languages",
            "de,en,ja",
            "--out",
            str(small_disk / "world"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 2, process.stderr
    assert process.stderr.splitlines()[-1] == (
        f"koine: {small_disk}/world: the disk is full; "
        "free some space or choose another place; nothing half-written was kept"
    )
    assert listing(small_disk) == {}
