"""Loading and upcycling of benchmarks/families.py: seconds and peak memory, one process a measurement.

Run as a program it makes one measurement, in the environment of its side:

    python benchmarks/families_storage.py load ours MODEL TINY
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY_LIMIT = 1.15
"""Most of the weight file's size that loading may take."""


def status_bytes(name: str) -> int:
    """Return a figure of this process's memory, such as `VmRSS`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Do the work; return its result, its seconds, and by how much resident memory rose at its peak.

    Pages of mapped files count too, where they were read.
    """
    # Sets the peak to the present size, so that imports do not hide it.
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    value = work()
    seconds = time.perf_counter() - start
    return value, {
        "seconds": seconds,
        "peak_growth_bytes": status_bytes("VmHWM") - before,
        "before_bytes": before,
    }


def load_ours(path: Path) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Return functions that load a model with Koine and compute logits with it."""
    import torch

    from koine.model import load_causal_lm

    tokens = torch.arange(10, 18)[None]
    return lambda: load_causal_lm(path), lambda model: model.logits(model(tokens))


def load_transformers(path: Path) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The same with transformers, in the stored dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", local_files_only=True, trust_remote_code=False
        ).eval()

    tokens = torch.arange(10, 18)[None]
    return load, lambda model: model(tokens).logits


def measure_load(side: str, path: Path, tiny: Path) -> dict[str, Any]:
    """Measure imports, loading, and the first logits, which read every weight.

    A tiny model of the same class is loaded first, so that what a side imports then counts as import.
    """
    open_side = {"ours": load_ours, "transformers": load_transformers}[side]
    import_start = time.perf_counter()
    import torch

    with torch.inference_mode():
        load, logits = open_side(tiny)
        logits(load())
        import_seconds = time.perf_counter() - import_start
        load, logits = open_side(path)
        model, result = measured(load)

        # The peak is not reset: weights that were only mapped are read now.
        start = time.perf_counter()
        logits(model)
    return {
        "import_seconds": import_seconds,
        **result,
        "first_logits_seconds": time.perf_counter() - start,
        "peak_growth_bytes": status_bytes("VmHWM") - result["before_bytes"],
        "loading_growth_bytes": result["peak_growth_bytes"],
    }


def measure_upcycle(seed: Path, branches: Path, out: Path) -> dict[str, Any]:
    """Measure a branch-train-mix of a seed and the models of a folder."""
    from koine.combine.moe.upcycle import upcycle_btx

    experts = {path.name: path for path in sorted(branches.iterdir())}

    def work() -> None:
        upcycle_btx(seed, experts, out)
        for path in out.glob("*.safetensors"):
            wait_for_disk(path)

    return measured(work)[1]


def wait_for_disk(path: Path) -> None:
    """Wait until a written file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def run_once(python: str, *arguments: str) -> dict[str, Any]:
    """Make one measurement in a process of its own; where it fails, the result says why."""
    # Flush what the last measurement wrote before this one starts.
    os.sync()
    command = [python, str(Path(__file__).resolve()), *arguments]
    start = time.perf_counter()
    done = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"command_seconds": time.perf_counter() - start}


def medians(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of every figure; of sizes the largest. A failure is returned as it is."""
    for one in results:
        if "failed" in one:
            return one
    return {
        name: max(one[name] for one in results)
        if name.endswith("_bytes")
        else statistics.median(one[name] for one in results)
        for name in results[0]
    }


def spread(numerators: list[dict[str, Any]], denominators: list[dict[str, Any]]) -> list[float]:
    """Return the median, the smallest and the largest ratio of seconds, round by round."""
    pairs = zip(numerators, denominators, strict=True)
    ratios = sorted(a["seconds"] / b["seconds"] for a, b in pairs)
    return [statistics.median(ratios), ratios[0], ratios[-1]]


def measure_loading(weights: Path, tiny: Path, pythons: dict[str, str], rounds: int) -> dict[str, Any]:
    """Load a model by turns on every side; the file is in the page cache."""
    size = sum(path.stat().st_size for path in weights.glob("*.safetensors"))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for number in range(rounds + 1):
        for name, python in pythons.items():
            result = run_once(python, "load", name, str(weights), str(tiny))
            if number:
                results[name].append(result)
    row: dict[str, Any] = {
        "file_bytes": size,
        "sides": {name: medians(found) for name, found in results.items()},
    }
    for side in row["sides"].values():
        if "failed" not in side:
            side["peak_over_file"] = side["peak_growth_bytes"] / size
            side["within_limit"] = side["peak_over_file"] <= MEMORY_LIMIT
    if not any("failed" in one for found in results.values() for one in found):
        row["ratio"] = spread(results["transformers"], results["ours"])
    return row


def copy_files(files: list[Path], folder: Path) -> dict[str, Any]:
    """Copy files with `cp` and wait until they are on the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()
    start = time.perf_counter()
    for number, file in enumerate(files):
        copied = folder / str(number)
        subprocess.run(["cp", str(file), str(copied)], check=True)
        wait_for_disk(copied)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return {"seconds": seconds, "bytes": sum(file.stat().st_size for file in files)}


def measure_upcycling(seed: Path, branches: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Upcycle by turns with a copy of what it reads, and one of what it writes."""
    inputs = sorted(branches.glob("*/*.safetensors"))
    out = folder / "upcycled"
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "copy_inputs": [], "copy_output": []}
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        result = run_once(sys.executable, "upcycle", str(seed), str(branches), str(out))
        if "failed" in result:
            return {"sides": {"ours": result}}
        results["ours"].append(result)
        results["copy_inputs"].append(copy_files(inputs, folder / "copied"))
        results["copy_output"].append(copy_files(sorted(out.glob("*.safetensors")), folder / "copied"))
    shutil.rmtree(out)
    return {
        "branches": len(inputs),
        "branch_bytes": inputs[0].stat().st_size,
        "sides": {name: medians(found) for name, found in results.items()},
        "time_over_copy": {
            name: spread(results["ours"], results[name]) for name in ("copy_inputs", "copy_output")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="do", required=True)
    load = commands.add_parser("load")
    load.add_argument("side", choices=["ours", "transformers"])
    load.add_argument("model", type=Path)
    load.add_argument("tiny", type=Path)
    upcycle = commands.add_parser("upcycle")
    for name in ("seed", "branches", "out"):
        upcycle.add_argument(name, type=Path)
    options = parser.parse_args()
    if options.do == "load":
        result = measure_load(options.side, options.model, options.tiny)
    else:
        result = measure_upcycle(options.seed, options.branches, options.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
