"""Our merge against mergekit: whole commands, start-up included.

    python benchmarks/peers/install.py mergekit
    python benchmarks/merge.py --out benchmarks/results/merge.json

Inputs are four checkpoints of 135 to 200 million parameters in bfloat16: random branches of one random base,
of Cohere2, the only architecture of ours that mergekit supports. They are written once. For each method both
commands run in turn, each in a fresh process into a fresh folder. The peak resident memory of each is read
from the system. The upper bound of speed is the time to read the inputs and write as many bytes as the result
has.
Before the first round both results are compared, tensor by tensor. mergekit merges in the models' dtype,
bfloat16, which is its fastest; ours in float32. The last line printed is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from koine.files import write_json
from koine.hardware import processor_name
from koine.model import Decoder, ModelConfig, hybrid_layers, save_model
from koine.model.counting import count_parameters

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers.install import python_of

NAMES = ("a", "b", "c", "d")
METHODS = ("linear", "slerp", "task-arithmetic", "ties", "dare-linear")
"""Each is compared in value where it draws nothing at random."""
ROUNDING = 2**-6
"""Largest difference by rounding, for entries of size 1: mergekit rounds to bfloat16 at every step."""

TIED = 0.05
"""Share of TIES' entries that may differ by more: those at the threshold, equal in size in bfloat16."""


def config_of(millions: int) -> ModelConfig:
    """Return a model configuration of the size of SmolLM-135M, or of 200 million parameters."""
    hidden, layers = (576, 30) if millions <= 135 else (768, 26)
    return ModelConfig(
        vocab_size=49_152,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_heads=hidden // 64,
        num_kv_heads=hidden // 192,
        head_dim=64,
        layers=hybrid_layers(layers, window=4096),
    )


def write_models(folder: Path, config: ModelConfig) -> None:
    """Write a base and four branches of it, without the tokenizers that mergekit would copy."""
    torch.manual_seed(0)
    base = Decoder(config)
    save_model(base, folder / "base", dtype=torch.bfloat16)
    for name in NAMES:
        branch = Decoder(config)
        with torch.no_grad():
            for ours, theirs in zip(branch.parameters(), base.parameters(), strict=True):
                ours.copy_(theirs + 0.2 * theirs.std() * torch.randn_like(theirs))
        save_model(branch, folder / name, dtype=torch.bfloat16)
        del branch


def models_of(method: str) -> tuple[str, ...]:
    """Return the models that a method merges."""
    return NAMES[:2] if method == "slerp" else NAMES


def our_command(method: str, folder: Path, out: Path) -> list[str]:
    """Return our command, as a user types it."""
    command = [
        sys.executable,
        "-m",
        "koine",
        "merge",
        method,
        *(str(folder / name) for name in models_of(method)),
    ]
    if method == "slerp":
        command += ["--t", "0.5"]
    elif method == "linear":
        command += ["--weights", "0.25,0.25,0.25,0.25"]
    else:
        command += ["--weights", "0.25,0.25,0.25,0.25", "--base", str(folder / "base")]
    if method in ("ties", "dare-linear"):
        command += ["--density", "0.5"]
    return [*command, "--out", str(out)]


def their_command(method: str, folder: Path, out: Path) -> list[str]:
    """Return mergekit's command for the same merge."""
    models: list[dict[str, Any]] = [{"model": str(folder / name)} for name in models_of(method)]
    content: dict[str, Any] = {
        "merge_method": method.replace("-", "_"),
        "models": models,
        "dtype": "bfloat16",
    }
    if method == "slerp":
        content |= {"base_model": str(folder / "a"), "parameters": {"t": 0.5}}
    else:
        for one in models:
            one["parameters"] = {"weight": 0.25}
        if method != "linear":
            content["base_model"] = str(folder / "base")
        if method in ("ties", "dare-linear"):
            content["parameters"] = {"density": 0.5, "normalize": method == "ties"}
    (folder / f"{method}.yml").write_text(json.dumps(content))
    program = python_of("mergekit").parent / "mergekit-yaml"
    return [str(program), str(folder / f"{method}.yml"), str(out), "--no-copy-tokenizer", "--quiet"]


LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]))
"""
"""A small program that starts a command and measures it.

On Linux the peak resident memory of a process survives exec, and with it the size of the process that started
it. This benchmark has compared models, so it must not start the command itself.
"""


def run(command: list[str], out: Path) -> tuple[float, int]:
    """Run a command; return its seconds and peak resident bytes."""
    shutil.rmtree(out, ignore_errors=True)
    # Flush what the last command wrote before this one starts.
    os.sync()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, largest, code = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return seconds, largest * (1 if sys.platform == "darwin" else 1024)


def differences(first: Path, second: Path) -> tuple[float, float]:
    """Compare two results over all tensors.

    Returns:
        The largest difference relative to a tensor's largest entry, and the share of entries that differ by
        more than the rounding of an entry of their own size.
    """
    from safetensors import safe_open

    worst, differ, count = 0.0, 0, 0
    with safe_open(first / "model.safetensors", "pt") as ours:
        for file in second.glob("*.safetensors"):
            with safe_open(file, "pt") as theirs:
                for name in theirs.keys():  # noqa: SIM118 (not a mapping)
                    a, b = ours.get_tensor(name).float(), theirs.get_tensor(name).float()
                    apart, size = (a - b).abs(), torch.maximum(a.abs(), b.abs())
                    worst = max(worst, float(apart.max() / b.abs().max()))
                    differ += int((apart > ROUNDING * size + ROUNDING * b.std()).sum())
                    count += a.numel()
    return worst, differ / count


def copy_seconds(folder: Path, method: str, out: Path) -> float:
    """Measure the seconds to read the inputs and write as many bytes as one model has."""
    names = models_of(method) + (() if method in ("linear", "slerp") else ("base",))
    start = time.perf_counter()
    data = b""
    for name in names:
        data = (folder / name / "model.safetensors").read_bytes()
    out.mkdir(exist_ok=True)
    with (out / "copy").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def compare(method: str, ours: Path, theirs: Path) -> tuple[float | None, float | None]:
    """Check that both results are equal but for rounding; return both figures of `differences`."""
    if method == "dare-linear":
        return None, None
    difference, share = differences(ours, theirs)
    # mergekit's TIES breaks ties at random: of entries of equal size in bfloat16 it keeps some. So only the
    # share of entries that differ is bounded. The tests compare all values, in float32.
    if method == "ties":
        assert share <= TIED, f"{share:.1%} of the entries of ties differ"
    else:
        assert difference <= ROUNDING, f"{method} differs by {difference}"
    return difference, share


def measure(method: str, folder: Path, rounds: int, *, allowed: int) -> dict[str, Any]:
    """Run both sides in turn; return times, ratio, memory and differences.

    Args:
        method: The merge method.
        folder: Of the models.
        rounds: Runs of each side.
        allowed: Bytes of memory that ours may take, where mergekit takes more.
    """
    outs = {"ours": folder / "ours", "mergekit": folder / "theirs"}
    commands = {
        "ours": our_command(method, folder, outs["ours"]),
        "mergekit": their_command(method, folder, outs["mergekit"]),
    }
    for side, command in commands.items():
        run(command, outs[side])
    difference, share = compare(method, outs["ours"], outs["mergekit"])
    seconds: dict[str, list[float]] = {side: [] for side in commands}
    memory: dict[str, int] = dict.fromkeys(commands, 0)
    ceilings = []
    for _ in range(rounds):
        for side, command in commands.items():
            one, peak = run(command, outs[side])
            seconds[side].append(one)
            memory[side] = max(memory[side], peak)
        ceilings.append(copy_seconds(folder, method, folder / "copied"))
    ratios = sorted(a / b for a, b in zip(seconds["mergekit"], seconds["ours"], strict=True))
    limit = min(memory["mergekit"], allowed)
    return {
        "seconds": {side: statistics.median(values) for side, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
        "peak_memory_bytes": memory,
        "copy_seconds": statistics.median(ceilings),
        "share_of_ceiling": statistics.median(ceilings) / statistics.median(seconds["ours"]),
        "memory_allowed_bytes": limit,
        "memory_within": memory["ours"] <= limit,
        "largest_difference": difference,
        "share_of_entries_that_differ": share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=int, default=135, choices=(135, 200))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = config_of(options.millions)
    result: dict[str, Any] = {
        "name": "merge",
        "parameters": count_parameters(config).total,
        "models": len(NAMES),
        "machine": {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        },
        "torch": torch.__version__,
        "results": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder, config)
        result["checkpoint_bytes"] = (folder / "a" / "model.safetensors").stat().st_size
        for method in options.methods:
            row = measure(method, folder, options.rounds, allowed=2 * result["checkpoint_bytes"])
            result["results"][method] = row
            print(method, json.dumps(row), flush=True)
    if options.out:
        write_json(options.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
