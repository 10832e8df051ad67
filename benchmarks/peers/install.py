"""Create the environment `.venv-peers/NAME` of a peer: `python benchmarks/peers/install.py NAME`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent.parent / ".venv-peers"
SERVER_FLAGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "ON",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    # The web page would be downloaded.
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}
"""How llama-server is built: for this processor, one program without libraries beside it."""


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
    if name == "llama_cpp":
        [package] = [line for line in wanted if line.startswith("llama-cpp-python==")]
        build_llama_server(target, package)


def build_llama_server(target: Path, package: str) -> None:
    """Build `llama-server` from the source package, which installs the library only. Takes some minutes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pip = [str(target / "bin" / "pip"), "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-binary", ":all:", "--dest", str(folder), package], check=True)
        [archive] = folder.glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        [source] = folder.glob("*/vendor/llama.cpp")
        build = folder / "build"
        flags = [f"-D{flag}={value}" for flag, value in SERVER_FLAGS.items()]
        subprocess.run(["cmake", "-S", str(source), "-B", str(build), *flags], check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "llama-server"], check=True)
        shutil.copy(build / "bin" / "llama-server", target / "bin")


if __name__ == "__main__":
    for peer in sys.argv[1:] or [path.stem for path in HERE.glob("*.txt")]:
        install(peer)
        print(f"{peer}: {python_of(peer)}")
