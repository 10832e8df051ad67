"""Our training step on long sequences beside transformers' Cohere2 (same weights) and beside our own twin of full layers only.

    python benchmarks/peers/install.py transformers
    python benchmarks/long_context_step.py --out benchmarks/results/long_context_step.json

At each length every side is tried in each of its configurations (transformers: with each of its attention back ends that has a backward pass on this
machine), and then the best ones take turns, each between two matmuls of the block's own shape. `time_over_flops` compares the growth of our
time a token from the shortest length on with the growth of the counted operations: at most 1 where the kernels of attention are as good as
the plain matmuls. A side whose step would take longer than `--most-seconds`, judged by its step at the length before, or that the
system ends for want of memory, is left out, and the result says so. The last line printed is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from koine.files import read_json, write_json
from koine.hardware import processor_name
from koine.model import Decoder, ModelConfig, preset, save_model
from koine.model.counting import all_full, count_parameters, training_flops_per_token

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_step import TOKENS, Configuration, Process, matmul_rate

LENGTHS = (2048, 8192, 32_768)


def candidates(name: str) -> list[Configuration]:
    """The configurations that a side is tried in."""
    if name == "transformers":
        return [
            Configuration(name, dtype, compiled=False, keep_freed_memory=True, attention=attention)
            for dtype in ("bfloat16", "float32")
            for attention in ("sdpa", "eager")
        ]
    return [Configuration("ours", dtype, compiled=False) for dtype in ("bfloat16", "float32")]


def seconds_of(configuration: Configuration, weights: Path, length: int, threads: int) -> dict[str, Any]:
    """The second step's seconds in a process of its own, and its peak memory; why it failed, if it did."""
    side = None
    try:
        side = Process(configuration, weights, length, threads)
        side.ask("step")
        seconds = side.ask("step")["seconds"]
        return {
            "configuration": str(configuration),
            "seconds": seconds,
            "peak_memory_bytes": side.ask("memory")["value"],
        }
    except (RuntimeError, BrokenPipeError) as error:
        return {"configuration": str(configuration), "failed": str(error)}
    finally:
        if side is not None:
            side.close()


def turns(
    sides: dict[str, tuple[Configuration, Path]],
    length: int,
    config: ModelConfig,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Seconds of a step of each side, alternating.

    At the longest length no two sides fit into memory together: each is then a process of its own whose first step counts, and a side that
    the system ends for want of memory is left out.
    """
    batch, time_ = TOKENS[length]
    shape = (min(batch * time_, 4096), config.hidden_size, sum(config.projection_sizes))
    samples: dict[str, list[float]] = {name: [] for name in sides}
    ceilings: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, int] = {}
    left_out: dict[str, str] = {}

    def measure(name: str, process: Process) -> None:
        before = matmul_rate(shape, torch.bfloat16)
        samples[name].append(process.ask("step")["seconds"])
        ceilings[name].append(max(before, matmul_rate(shape, torch.bfloat16)))
        memory[name] = process.ask("memory")["value"]

    if length == LENGTHS[-1]:
        for _ in range(options.long_rounds):
            for name, (configuration, weights) in sides.items():
                if name in left_out:
                    continue
                process = Process(configuration, weights, length, options.threads)
                try:
                    measure(name, process)
                except RuntimeError as error:
                    left_out[name] = str(error)
                finally:
                    process.close()
                print(f"  {name} {length}: {samples[name]} {left_out.get(name, '')}", flush=True)
    else:
        processes = {
            name: Process(configuration, weights, length, options.threads)
            for name, (configuration, weights) in sides.items()
        }
        try:
            for process in processes.values():
                process.ask("step")
            for _ in range(options.rounds):
                for name, process in processes.items():
                    measure(name, process)
        finally:
            for process in processes.values():
                process.close()
    sides = {name: side for name, side in sides.items() if name not in left_out}
    tokens = batch * time_
    row: dict[str, Any] = {"length": length, "tokens": tokens, "left_out": left_out}
    flops = {
        name: tokens * training_flops_per_token(all_full(config) if name == "all_full" else config, time_)
        for name in sides
    }
    for name, (configuration, _) in sides.items():
        seconds = statistics.median(samples[name])
        row[name] = {
            "configuration": str(configuration),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "flops": flops[name],
            "share_of_bfloat16_ceiling": statistics.median(
                flops[name] / one / ceiling
                for one, ceiling in zip(samples[name], ceilings[name], strict=True)
            ),
            "peak_memory_bytes": memory[name],
        }
        if name != "ours":
            ratios = sorted(peer / own for own, peer in zip(samples["ours"], samples[name], strict=True))
            row[f"ratio_{name}"] = statistics.median(ratios)
            row[f"ratio_{name}_spread"] = [ratios[0], ratios[-1]]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="koine-8m")
    parser.add_argument("--head-dim", type=int, help="width of a head, in place of the preset's")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long-rounds", type=int, default=1, help="rounds at the longest length")
    parser.add_argument("--most-seconds", type=float, default=240.0, help="longest step that is waited for")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = preset(options.preset)
    if options.head_dim is not None:
        # As many query and key channels in fewer, wider heads.
        config = replace(
            config,
            head_dim=options.head_dim,
            num_heads=config.attention_size // options.head_dim,
            num_kv_heads=max(1, config.kv_size // options.head_dim),
        )
    result: dict[str, Any] = {
        "name": "long_context_step",
        "model": options.preset,
        "parameters": count_parameters(config).total,
        "heads": [config.num_heads, config.num_kv_heads, config.head_dim],
        "window": next(spec.window for spec in config.layers if spec.window is not None),
        "machine": {
            "processor": processor_name(),
            "threads": options.threads,
            "python": platform.python_version(),
        },
        "torch": torch.__version__,
        "results": {},
    }
    if options.out and options.out.exists():
        # Lengths may be measured one call at a time.
        before = read_json(options.out)
        if all(before.get(key) == result[key] for key in ("machine", "torch", "model", "heads")):
            result["results"] = before["results"]
    with tempfile.TemporaryDirectory() as folder:
        weights = {"ours": Path(folder) / "hybrid", "all_full": Path(folder) / "full"}
        weights["transformers"] = weights["ours"]
        save_model(Decoder(config), weights["ours"])
        save_model(Decoder(all_full(config)), weights["all_full"])
        for length in options.lengths:
            shorter = result["results"].get(str(length // 4), {})
            sides, tried, left_out = {}, {}, {}
            for name in ("ours", "transformers", "all_full"):
                expected = 16 * shorter[name]["seconds"] if name in shorter else 0.0
                if name == "transformers" and expected > options.most_seconds:
                    left_out[name] = (
                        f"a step would take about {expected:.0f} s, judged by {length // 4} tokens"
                    )
                    continue
                # At the longest length only what was best before is run again.
                known = shorter.get(name, {}).get("configuration")
                choices = [
                    c for c in candidates(name) if length < LENGTHS[-1] or str(c) == known
                ] or candidates(name)
                found = (
                    [(c, seconds_of(c, weights[name], length, options.threads)) for c in choices]
                    if len(choices) > 1
                    else []
                )
                for _, one in found:
                    print(f"  {name} {length}: {one}", flush=True)
                tried[name] = [one for _, one in found]
                working = [(c, one) for c, one in found if "seconds" in one]
                best = min(working, key=lambda pair: pair[1]["seconds"])[0] if working else choices[0]
                sides[name] = (best, weights[name])
            row = turns(sides, length, config, options)
            row |= {"tried": tried, "left_out": left_out | row["left_out"]}
            result["results"][str(length)] = row
            first = result["results"][str(min(map(int, result["results"])))]
            for name in {"ours", "all_full"} & row.keys():
                per_token = [one[name]["seconds"] / one["tokens"] for one in (row, first)]
                per_flop = [one[name]["flops"] / one["tokens"] for one in (row, first)]
                row[name]["time_over_flops"] = (per_token[0] / per_token[1]) / (per_flop[0] / per_flop[1])
            print(json.dumps(row), flush=True)
            if options.out:
                write_json(options.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
