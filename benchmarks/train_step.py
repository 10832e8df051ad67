"""Our training step beside transformers' Cohere2ForCausalLM (same weights) and litgpt's Llama of equal size.

    python benchmarks/peers/install.py transformers litgpt
    python benchmarks/train_step.py --out benchmarks/results/train_step.json

Both use AdamW and the same precision. Each side is first tried in each of its configurations (float32,
bfloat16; eager, compiled), and its best one is compared. Then the two sides take turns of a few steps. A
matmul of the block's own shape is timed before and after each turn, and turns beside a slow one are dropped.
The last line printed is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from koine.files import read_json, write_json
from koine.hardware import processor_name
from koine.model import Decoder, ModelConfig, preset, save_model
from koine.model.counting import count_parameters, training_flops_per_token

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers.install import python_of
from peers.side import Side

SIDE = Path(__file__).resolve().parent / "train_step_side.py"
TOKENS = {512: (8, 512), 2048: (2, 2048), 8192: (1, 8192), 32_768: (1, 32_768)}
"""Rows and their length; 32,768 belongs to benchmarks/long_context_step.py."""
SLOW_PROBE = 0.8
"""A step is dropped where the matmul beside it ran below this share of the median probe."""


@dataclass(frozen=True)
class Configuration:
    """One way to run a side."""

    side: str
    dtype: str
    compiled: bool
    keep_freed_memory: bool = False
    attention: str = "sdpa"
    """The attention back end of a peer."""

    def __str__(self) -> str:
        kept = ", allocator as ours" if self.keep_freed_memory else ""
        backend = "" if self.attention == "sdpa" else f", attention {self.attention}"
        return f"{self.dtype} {'compiled' if self.compiled else 'eager'}{kept}{backend}"


class Quiet:
    """Detects a quiet machine: a matmul runs near the fastest rate of the run."""

    def __init__(self, shape: tuple[int, int, int], fastest: float = 0.0) -> None:
        self.shape, self.fastest = shape, fastest

    def now(self) -> bool:
        rate = matmul_rate(self.shape, torch.bfloat16)
        self.fastest = max(self.fastest, rate)
        return rate >= SLOW_PROBE * self.fastest

    def wait(self, seconds: float) -> bool:
        until = time.perf_counter() + seconds
        while not self.now():
            if time.perf_counter() > until:
                return False
            time.sleep(0.5)
        return True


class Process(Side):
    """Process of a side, ready to step."""

    def __init__(self, configuration: Configuration, weights: Path, length: int, threads: int) -> None:
        batch, time_ = TOKENS[length]
        self.tokens = batch * time_
        python = sys.executable
        if configuration.side != "ours":
            python = str(python_of(configuration.side))
        command = [
            python,
            str(SIDE),
            configuration.side,
            "--weights",
            str(weights),
            "--dtype",
            configuration.dtype,
        ]
        command += ["--batch", str(batch), "--length", str(time_), "--threads", str(threads)]
        command += ["--attention", configuration.attention]
        command += ["--compile"] if configuration.compiled else []
        # Our training loop sets this itself; here the step alone is measured, so it is set from outside.
        if configuration.keep_freed_memory or configuration.side == "ours":
            command += ["--keep-freed-memory"]
        super().__init__(command)


def matmul_rate(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    repeats: int = 6,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Measure FLOP/s of `[m, k] @ [k, n]`, the best of a few."""
    m, k, n = shape
    a, b = torch.randn(m, k).to(device, dtype), torch.randn(k, n).to(device, dtype)
    out = torch.empty(m, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        torch.mm(a, b, out=out)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return 2 * m * k * n / best


def configurations(side: str, quick: bool, dtypes: list[str]) -> list[Configuration]:
    found = [Configuration(side, dtype, compiled) for dtype in dtypes for compiled in (False, True)]
    if side != "ours":
        # Ours has the allocator setting of our training; a peer is tried with and without it.
        found += [Configuration(c.side, c.dtype, c.compiled, True) for c in found]
    return [c for c in found if not c.compiled] if quick else found


def trial(
    configuration: Configuration, weights: Path, length: int, threads: int, quiet: Quiet, patience: float
) -> dict[str, Any]:
    """Measure seconds of a step in this configuration, the best of a few, and the first loss.

    It waits for a quiet machine: otherwise another process's load could choose the configuration.
    """
    try:
        side = Process(configuration, weights, length, threads)
    except RuntimeError as error:
        return {"configuration": str(configuration), "failed": str(error)}
    try:
        loss = side.ask("loss")["value"]
        side.ask("step")
        timings = []
        for _ in range(4):
            before = quiet.wait(patience / 4)
            timings.append((side.ask("step")["seconds"], before and quiet.now()))
        undisturbed = [seconds for seconds, alone in timings if alone]
        seconds = min(undisturbed or [seconds for seconds, _ in timings])
        memory = side.ask("memory")
        side.close()
    except RuntimeError as error:
        return {"configuration": str(configuration), "failed": str(error)}
    return {
        "configuration": str(configuration),
        "seconds": seconds,
        "undisturbed_steps": len(undisturbed),
        "tokens_per_second": side.tokens / seconds,
        "first_loss": loss,
        "peak_memory_bytes": memory["value"],
        "memory_before_first_step_bytes": memory["baseline"],
    }


def best_of(
    side: str, weights: Path, length: int, options: argparse.Namespace, quiet: Quiet
) -> tuple[Configuration, list[Any]]:
    tried = []
    for configuration in configurations(side, options.quick, options.dtypes):
        result = trial(configuration, weights, length, options.threads, quiet, options.patience)
        print(f"  {side} {length}: {result}", flush=True)
        tried.append((configuration, result))
    working = [(c, r) for c, r in tried if "seconds" in r]
    return min(working, key=lambda pair: pair[1]["seconds"])[0], [r for _, r in tried]


def alternate(
    ours: Configuration,
    theirs: Configuration,
    weights: Path,
    length: int,
    config: ModelConfig,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Measure turns of a few consecutive steps, with a matmul timed before and after each turn."""
    batch, time_ = TOKENS[length]
    shape = (min(batch * time_, 4096), config.hidden_size, sum(config.projection_sizes))
    sides = {
        "ours": Process(ours, weights, length, options.threads),
        "peer": Process(theirs, weights, length, options.threads),
    }
    for side in sides.values():
        for _ in range(2):
            side.ask("step")
    samples: list[dict[str, float]] = []
    for _ in range(options.rounds):
        sample = {}
        for name, side in sides.items():
            before = matmul_rate(shape, torch.bfloat16)
            # Not timed: its caches are full of the other side's data, which never happens in training.
            side.ask("step")
            sample[name] = statistics.mean(side.ask("step")["seconds"] for _ in range(options.turn))
            after = matmul_rate(shape, torch.bfloat16)
            sample[f"{name}_probe"] = min(before, after)
            sample[f"{name}_ceiling"] = max(before, after)
        samples.append(sample)
    for side in sides.values():
        side.close()
    probes = [s[f"{name}_probe"] for s in samples for name in sides]
    probe = statistics.median(probes)
    good = [s for s in samples if all(s[f"{name}_probe"] >= SLOW_PROBE * probe for name in sides)]
    # On a machine that is never quiet every turn has a slow probe; then all are kept, and `slow` is above
    # zero.
    kept = good if len(good) >= 3 else samples
    ratios = sorted(s["peer"] / s["ours"] for s in kept)
    tokens = batch * time_
    flops = training_flops_per_token(config, time_) * tokens
    # The machine's speed changes from minute to minute: a turn's ceiling is the faster of the probes right
    # before and after it. The fastest probe of the whole run is reported too.
    fastest = max(s[f"{name}_ceiling"] for s in samples for name in sides)
    share = {name: statistics.median(flops / s[name] / s[f"{name}_ceiling"] for s in kept) for name in sides}
    seconds = {name: statistics.median(s[name] for s in kept) for name in sides}
    return {
        "ours": str(ours),
        "peer": str(theirs),
        "ours_tokens_per_second": tokens / seconds["ours"],
        "peer_tokens_per_second": tokens / seconds["peer"],
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
        "samples": len(samples),
        "kept": len(kept),
        "slow": len(samples) - len(good),
        "bfloat16_ceiling_flops": statistics.median(s[f"{name}_ceiling"] for s in kept for name in sides),
        "bfloat16_fastest_probe_flops": fastest,
        "float32_ceiling_flops": matmul_rate(shape, torch.float32),
        "ours_share_of_bfloat16_ceiling": share["ours"],
        "peer_share_of_bfloat16_ceiling": share["peer"],
        "ours_share_of_fastest_probe": flops / seconds["ours"] / fastest,
    }


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], choices=sorted(TOKENS))
    parser.add_argument("--peers", nargs="+", default=["transformers", "litgpt"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turn", type=int, default=3, help="steps that a side makes before the other's turn")
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds to wait for a quiet machine, a configuration"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"]
    )
    parser.add_argument("--quick", action="store_true", help="eager configurations only")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = preset("koine-8m")
    result: dict[str, Any] = {
        "name": "train_step",
        "model": "koine-8m",
        "parameters": count_parameters(config).total,
        "window": 256,
        "machine": {
            "processor": processor_name(),
            "threads": options.threads,
            "python": platform.python_version(),
        },
        "torch": torch.__version__,
        "results": {},
        "tried": {},
    }
    if options.out and options.out.exists():
        # Lengths may be measured one call at a time.
        before = read_json(options.out)
        if before["machine"] == result["machine"] and before["torch"] == result["torch"]:
            result["results"], result["tried"] = before["results"], before["tried"]
    quiet = Quiet((4096, config.hidden_size, sum(config.projection_sizes)))
    for _ in range(20):
        quiet.now()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder)
        save_model(Decoder(config), weights)
        for length in options.lengths:
            ours, tried = best_of("ours", weights, length, options, quiet)
            result["tried"][f"ours {length}"] = tried
            for peer in options.peers:
                if peer == "litgpt" and length != 512:
                    continue
                theirs, tried_theirs = best_of(peer, weights, length, options, quiet)
                result["tried"][f"{peer} {length}"] = tried_theirs
                if peer == "transformers":
                    check_same_loss(tried, tried_theirs)
                row = alternate(ours, theirs, weights, length, config, options)
                memory = {str(ours): tried, str(theirs): tried_theirs}
                row["ours_peak_memory_bytes"] = _memory(
                    memory[str(ours)] if str(ours) != str(theirs) else tried, ours
                )
                row["peer_peak_memory_bytes"] = _memory(tried_theirs, theirs)
                # A disturbed search may have missed a side's best configuration; the ratio then proves
                # nothing.
                row["search_undisturbed"] = all(
                    r.get("undisturbed_steps", 0) > 0 for r in [*tried, *tried_theirs]
                )
                row["dtypes"] = options.dtypes
                row["memory_ratio"] = row["ours_peak_memory_bytes"] / row["peer_peak_memory_bytes"]
                result["results"][f"{peer} {length}"] = row
                print(json.dumps({f"{peer} {length}": row}, indent=2), flush=True)
                if options.out:
                    write_json(options.out, result)
    print(json.dumps({k: v for k, v in result.items() if k != "tried"}))


def _memory(tried: list[Any], configuration: Configuration) -> float:
    return float(next(r["peak_memory_bytes"] for r in tried if r["configuration"] == str(configuration)))


def check_same_loss(ours: list[Any], theirs: list[Any]) -> None:
    """Check that both sides have the same loss: to 1e-4 in float32, else to 2e-3 in bfloat16."""
    for name, tolerance in (("float32 eager", 1e-4), ("bfloat16 eager", 2e-3)):
        losses = [r["first_loss"] for side in (ours, theirs) for r in side if r["configuration"] == name]
        if len(losses) == 2:
            if abs(losses[0] - losses[1]) > tolerance:
                raise RuntimeError(f"the two sides do not compute the same loss: {losses}")
            return
    raise RuntimeError("no configuration ran on both sides, so their losses cannot be compared")


if __name__ == "__main__":
    main()
