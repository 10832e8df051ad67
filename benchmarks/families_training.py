"""Training steps of benchmarks/families.py: ours beside transformers and litgpt, each in its best configuration."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.install import python_of
from peers.side import Side
from peers.turns import compare_sides, take_turns
from train_step import SIDE, Configuration, Quiet, matmul_rate

SHAPES: dict[str, dict[int, tuple[int, int]]] = {
    "llama-8m": {512: (8, 512), 8192: (1, 8192)},
    "smollm2-135m": {512: (4, 512), 8192: (1, 8192)},
}
"""Rows and their length."""
PEERS = ("transformers", "litgpt")
LONG_STEP = 10.0
"""Seconds; of longer steps one is timed in a trial, else three."""
MEMORY_SHARE = 0.8
"""Sides wait for one another in memory only where they take less than this share of it together."""
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}
"""Relative difference of the first losses, ours and that of transformers."""


def measure_training(
    model: str, weights: Path, length: int, dtype: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Try each side's configurations, then let the best ones take turns."""
    batch, time = (2, 64) if options.quick else SHAPES[model][length]
    config = json.loads((weights / "config.json").read_text())
    shape = (min(batch * time, 4096), config["hidden_size"], 2 * config["intermediate_size"])
    quiet = Quiet(shape)

    def start(configuration: Configuration) -> Side:
        return start_side(configuration, weights, batch, time, options.threads)

    tried = {
        side: [try_configuration(one, start, quiet, options) for one in configurations(side, dtype, options)]
        for side in ("ours", *PEERS)
    }
    row: dict[str, Any] = {"batch": batch, "length": time, "dtype": dtype, "tried": tried}
    fastest = {side: best_configuration(found) for side, found in tried.items()}
    best = {side: found for side, found in fastest.items() if found is not None}
    if not best:
        return row
    check_same_loss(best, dtype)
    row |= alternate(best, start, shape, dtype, options)
    tokens = batch * time
    flops = training_flops(config, batch, time)
    row["tokens_per_second"] = {side: tokens / seconds for side, seconds in row["seconds"].items()}
    row["share_of_ceiling"] = {
        side: flops / seconds / row["ceiling"][side] for side, seconds in row["seconds"].items()
    }
    row["configuration"] = {side: found["configuration"] for side, found in best.items()}
    row["peak_memory_bytes"] = {side: found["peak_memory_bytes"] for side, found in best.items()}
    return row


def configurations(side: str, dtype: str, options: argparse.Namespace) -> list[Configuration]:
    """Eager and compiled. All have the allocator setting of our training, which helps the peers too."""
    ways = (False,) if options.quick or not options.compile else (False, True)
    return [Configuration(side, dtype, compiled, keep_freed_memory=True) for compiled in ways]


def start_side(configuration: Configuration, weights: Path, batch: int, length: int, threads: int) -> Side:
    """Start the process of a side; raises `RuntimeError` where it ends."""
    python = sys.executable if configuration.side == "ours" else str(python_of(configuration.side))
    command = [
        python,
        str(SIDE),
        configuration.side,
        "--weights",
        str(weights),
        "--keep-freed-memory",
        "--tie",
    ]
    command += ["--dtype", configuration.dtype, "--attention", configuration.attention]
    command += ["--batch", str(batch), "--length", str(length), "--threads", str(threads)]
    return Side([*command, "--compile"] if configuration.compiled else command)


def try_configuration(
    configuration: Configuration,
    start: Callable[[Configuration], Side],
    quiet: Quiet,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Measure the seconds of a step, the best of a few, the first loss and the peak memory; or say why not."""
    name = "compiled" if configuration.compiled else "eager"
    about: dict[str, Any] = {"configuration": name, "identity": configuration.__dict__}
    try:
        side = start(configuration)
    except RuntimeError as error:
        return about | {"failed": str(error)}
    try:
        about["first_loss"] = side.ask("loss")["value"]
        warm = side.ask("step")["seconds"]
        timings = []
        for _ in range(1 if warm > LONG_STEP and not configuration.compiled else 3):
            quiet.wait(options.patience)
            timings.append(side.ask("step")["seconds"])
        about["seconds"] = min(timings)
        about["peak_memory_bytes"] = side.ask("memory")["value"]
    except (RuntimeError, BrokenPipeError) as error:
        about["failed"] = str(error)
    finally:
        side.close()
    print(f"  {configuration.side}: {about}", file=sys.stderr, flush=True)
    return about


def best_configuration(tried: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the fastest configuration that worked, or None."""
    working = [one for one in tried if "failed" not in one]
    return min(working, key=lambda one: one["seconds"]) if working else None


def check_same_loss(best: dict[str, Any], dtype: str) -> None:
    """Raise `RuntimeError` where our first loss is not that of transformers, with the same weights."""
    if "ours" not in best or "transformers" not in best:
        return
    ours, theirs = best["ours"]["first_loss"], best["transformers"]["first_loss"]
    if abs(ours - theirs) > LOSS_TOLERANCE[dtype] * abs(theirs):
        raise RuntimeError(f"the two sides do not compute the same loss: {ours} and {theirs}")


def alternate(
    best: dict[str, Any],
    start: Callable[[Configuration], Side],
    shape: tuple[int, int, int],
    dtype: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Let the sides take turns of a few steps; one process at a time where memory holds no more."""
    wanted = {name: Configuration(**found["identity"]) for name, found in best.items()}
    together = sum(found["peak_memory_bytes"] for found in best.values())
    one_at_a_time = together > MEMORY_SHARE * options.memory
    running = {} if one_at_a_time else {name: start(one) for name, one in wanted.items()}

    def work(name: str) -> float:
        side = running.get(name) or start(wanted[name])
        # The first step is not timed: it compiles and allocates, or finds its caches full of another side's
        # data, which never happens in training.
        side.ask("step")
        seconds = statistics.mean(float(side.ask("step")["seconds"]) for _ in range(options.turn))
        if one_at_a_time:
            side.close()
        return seconds

    try:
        for side in running.values():
            side.ask("step")
        rounds = take_turns(
            {name: lambda name=name: work(name) for name in wanted},  # type: ignore[misc]
            options.rounds,
            lambda: matmul_rate(shape, getattr(torch, dtype)),
        )
    finally:
        for side in running.values():
            side.close()
    return compare_sides(rounds) | {"one_at_a_time": one_at_a_time}


def training_flops(config: dict[str, Any], batch: int, length: int) -> float:
    """Return the operations of a step: 6 a matmul weight and token, and causal attention (half of the square)."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    block = config["hidden_size"] * (2 * queries + 2 * keys + 3 * config["intermediate_size"])
    layers = config["num_hidden_layers"]
    weights = layers * block + config["vocab_size"] * config["hidden_size"]
    attention = layers * 6 * length * queries
    return float(batch * length * (6 * weights + attention))
