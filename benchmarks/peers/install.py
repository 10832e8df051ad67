"""Create the environment `.venv-peers/NAME` of a peer: `python benchmarks/peers/install.py NAME`."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent.parent / ".venv-peers"


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment; exits with the command to run where it is not installed."""
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        sys.exit(f"the peer {name} is not installed; run: python benchmarks/peers/install.py {name}")
    return python


def install(name: str) -> None:
    """Make the environment anew; torch goes first and by its exact version, so that nothing replaces it."""
    wanted = [line for line in (HERE / f"{name}.txt").read_text().splitlines() if line and line[0] != "#"]
    target = ENVIRONMENTS / name
    venv.create(target, with_pip=True, clear=True)
    pip = [str(target / "bin" / "pip"), "install", "--quiet"]
    torch = [line for line in wanted if line.startswith("torch==")]
    for packages in ([torch] if torch else []) + [wanted]:
        subprocess.run([*pip, *packages], check=True)


if __name__ == "__main__":
    for peer in sys.argv[1:] or [path.stem for path in HERE.glob("*.txt")]:
        install(peer)
        print(f"{peer}: {python_of(peer)}")
