"""Our training step on long sequences beside transformers' Cohere2 (same weights) and our all-full twin.

    python benchmarks/peers/install.py transformers
    python benchmarks/long_context_step.py --out benchmarks/results/long_context_step.json

At each length every side is tried in each of its configurations (transformers: each attention back end with a
backward pass on this machine). Then the best ones take turns, each between two matmuls of the block's own
shape. `time_over_flops` is the growth of our time per token from the shortest length over that of the counted
operations: at most 1 where the attention kernels are as good as the plain matmuls. A side is left out, and
the result says so, where its step would take longer than `--most-seconds` (estimated from the length before),
or the system kills it for lack of memory. The last line printed is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass, field, replace
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
    """Return the configurations in which a side is tried."""
    if name == "transformers":
        return [
            Configuration(name, dtype, compiled=False, keep_freed_memory=True, attention=attention)
            for dtype in ("bfloat16", "float32")
            for attention in ("sdpa", "eager")
        ]
    return [Configuration("ours", dtype, compiled=False) for dtype in ("bfloat16", "float32")]


def seconds_of(configuration: Configuration, weights: Path, length: int, threads: int) -> dict[str, Any]:
    """Measure seconds and peak memory of the second step in its own process, or why it failed."""
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


@dataclass
class Samples:
    """Measures of each side: seconds of steps, matmul rates beside them, peak memory."""

    shape: tuple[int, int, int]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    ceilings: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def measure(self, name: str, process: Process) -> None:
        """Time one step of a side between two matmuls."""
        before = matmul_rate(self.shape, torch.bfloat16)
        self.seconds.setdefault(name, []).append(process.ask("step")["seconds"])
        after = matmul_rate(self.shape, torch.bfloat16)
        self.ceilings.setdefault(name, []).append(max(before, after))
        self.memory[name] = process.ask("memory")["value"]


def turns(
    sides: dict[str, tuple[Configuration, Path]],
    length: int,
    config: ModelConfig,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Measure the seconds of a step of each side, in turns.

    At the longest length no two sides fit into memory together. Each then has its own process, whose first
    step counts; a side that the system kills for lack of memory is left out.
    """
    batch, time_ = TOKENS[length]
    samples = Samples((min(batch * time_, 4096), config.hidden_size, sum(config.projection_sizes)))
    if length == LENGTHS[-1]:
        for _ in range(options.long_rounds):
            for name, (configuration, weights) in sides.items():
                if name in samples.left_out:
                    continue
                process = Process(configuration, weights, length, options.threads)
                try:
                    samples.measure(name, process)
                except RuntimeError as error:
                    samples.left_out[name] = str(error)
                finally:
                    process.close()
                seconds, why = samples.seconds.get(name, []), samples.left_out.get(name, "")
                print(f"  {name} {length}: {seconds} {why}", flush=True)
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
                    samples.measure(name, process)
        finally:
            for process in processes.values():
                process.close()
    return summarise(sides, samples, length, config)


def summarise(
    sides: dict[str, tuple[Configuration, Path]], samples: Samples, length: int, config: ModelConfig
) -> dict[str, Any]:
    """Return the row of a length: rates, shares of the matmul rate, and ratios to ours."""
    batch, time_ = TOKENS[length]
    tokens = batch * time_
    row: dict[str, Any] = {"length": length, "tokens": tokens, "left_out": samples.left_out}
    for name, (configuration, _) in sides.items():
        if name in samples.left_out:
            continue
        twin = all_full(config) if name == "all_full" else config
        flops = tokens * training_flops_per_token(twin, time_)
        each = samples.seconds[name]
        seconds = statistics.median(each)
        row[name] = {
            "configuration": str(configuration),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "flops": flops,
            "share_of_bfloat16_ceiling": statistics.median(
                flops / one / ceiling for one, ceiling in zip(each, samples.ceilings[name], strict=True)
            ),
            "peak_memory_bytes": samples.memory[name],
        }
        if name != "ours":
            ratios = sorted(peer / own for own, peer in zip(samples.seconds["ours"], each, strict=True))
            row[f"ratio_{name}"] = statistics.median(ratios)
            row[f"ratio_{name}_spread"] = [ratios[0], ratios[-1]]
    return row


def best_configuration(
    name: str, shorter: dict[str, Any], weights: Path, length: int, options: argparse.Namespace
) -> tuple[Configuration, list[dict[str, Any]]]:
    """Return the fastest configuration of a side, and what was tried.

    shorter: results at the length before; at the longest length only their best configuration runs again.
    """
    known = shorter.get(name, {}).get("configuration")
    choices = [c for c in candidates(name) if length < LENGTHS[-1] or str(c) == known] or candidates(name)
    if len(choices) == 1:
        return choices[0], []
    found = [(c, seconds_of(c, weights, length, options.threads)) for c in choices]
    for _, one in found:
        print(f"  {name} {length}: {one}", flush=True)
    working = [(c, one) for c, one in found if "seconds" in one]
    best = min(working, key=lambda pair: pair[1]["seconds"])[0] if working else choices[0]
    return best, [one for _, one in found]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
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
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
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
                best, tried[name] = best_configuration(name, shorter, weights[name], length, options)
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
