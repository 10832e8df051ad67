"""Decoding of benchmarks/families.py: ours beside transformers' generate, llama.cpp, and its server."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generation import SIDE, common_prefix, memory_rate
from peers.install import ENVIRONMENTS, python_of
from peers.side import Side
from peers.turns import compare_sides, take_turns

SERVER = ENVIRONMENTS / "llama_cpp" / "bin" / "llama-server"
TURN_SECONDS = 1.5
"""The slowest side's time for a turn, within the bounds below."""
FEWEST_STEPS, MOST_STEPS = 4, 32
TRIAL_STEPS = 6


@dataclass(frozen=True)
class Way:
    """One way to run a side."""

    side: str
    name: str
    arguments: tuple[str, ...] = ()


def measure_decoding(
    weights: Path, batch: int, context: int, dtype: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Try each side's ways, then let the best ones take turns of equally many decode steps."""
    row: dict[str, Any] = {"batch": batch, "context": context, "dtype": dtype, "tried": {}}
    best: dict[str, Way] = {}
    slowest = 0.0
    for side, ways in ways_of(weights, batch, dtype, options).items():
        found = [(way, try_way(way, batch, context, options)) for way in ways]
        row["tried"][side] = [{"way": way.name, **result} for way, result in found]
        working = [(way, result["seconds"]) for way, result in found if "failed" not in result]
        if working:
            best[side], seconds = min(working, key=lambda pair: pair[1])
            slowest = max(slowest, seconds)
    if not best:
        return row
    if batch > 1 and "llama_cpp" in best and SERVER.exists():
        vocabulary = json.loads((weights / "config.json").read_text())["vocab_size"]
        arguments = (*best["llama_cpp"].arguments, "--vocabulary", str(vocabulary))
        best["llama_server"] = Way("llama_server", best["llama_cpp"].name, arguments)
    steps = int(min(MOST_STEPS, max(FEWEST_STEPS, TURN_SECONDS / slowest)))
    row |= alternate(best, batch, context, steps, options)
    row["way"] = {side: way.name for side, way in best.items()}
    row["tokens_per_second"] = {side: batch / seconds for side, seconds in row["seconds"].items()}
    read = bytes_a_step(weights, batch, context, dtype)
    row["share_of_ceiling"] = {
        side: read / seconds / row["ceiling"][side] for side, seconds in row["seconds"].items()
    }
    return row


def ways_of(weights: Path, batch: int, dtype: str, options: argparse.Namespace) -> dict[str, list[Way]]:
    """Return the ways to try, by side. llama.cpp's 16 bits are bfloat16 or float16, whichever is faster."""
    common = ("--weights", str(weights), "--dtype", dtype)
    transformers = [
        Way("transformers", "dynamic cache", common),
        Way("transformers", "static cache", (*common, "--cache", "static")),
    ]
    if options.compile and not options.quick and shutil.which("g++"):
        compiled = (*common, "--cache", "static", "--compile")
        transformers.append(Way("transformers", "static cache, compiled", compiled))
    found = {"ours": [Way("ours", "", common)], "transformers": transformers}
    if (ENVIRONMENTS / "llama_cpp").exists():
        found["llama_cpp"] = [
            Way(
                "llama_cpp",
                f"{kind}, flash attention {flash}",
                (*common, "--gguf", f"{weights}.{kind}.gguf", "--flash", flash),
            )
            for kind in (("float32",) if dtype == "float32" else ("bfloat16", "float16"))
            for flash in ("on", "off")
        ]
    return found


def start_way(way: Way, options: argparse.Namespace) -> Side:
    """Start the process of a side."""
    environment = "llama_cpp" if way.side == "llama_server" else way.side
    python = sys.executable if way.side == "ours" else str(python_of(environment))
    return Side([python, str(SIDE), way.side, *way.arguments, "--threads", str(options.threads)])


def try_way(way: Way, batch: int, context: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the seconds of a decode step, the best of a few; or say why not."""
    result: dict[str, Any]
    try:
        side = start_way(way, options)
    except RuntimeError as error:
        return {"failed": str(error)}
    try:
        side.ask("prepare", batch=batch, context=context, room=8 * TRIAL_STEPS)
        side.ask("decode", steps=TRIAL_STEPS)
        seconds = min(side.ask("decode", steps=TRIAL_STEPS)["seconds"] for _ in range(3)) / TRIAL_STEPS
        result = {"seconds": seconds, "tokens_per_second": batch / seconds}
    except (RuntimeError, BrokenPipeError) as error:
        result = {"failed": str(error)}
    finally:
        side.close()
    print(f"  {way.side} {way.name}: {result}", file=sys.stderr, flush=True)
    return result


def alternate(
    best: dict[str, Way], batch: int, context: int, steps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Let the sides take turns of `steps` decode steps, and compare their greedy tokens."""
    sides: dict[str, Side] = {}
    row: dict[str, Any] = {"steps": steps, "prefill": {}, "peak_memory_bytes": {}, "same_tokens": {}}
    try:
        for name, way in best.items():
            sides[name] = start_way(way, options)
            room = steps * (options.rounds + 2)
            row["prefill"][name] = sides[name].ask("prepare", batch=batch, context=context, room=room)
            sides[name].ask("decode", steps=steps)

        def work(name: str) -> float:
            return float(sides[name].ask("decode", steps=steps)["seconds"]) / steps

        rounds = take_turns(
            {name: lambda name=name: work(name) for name in sides},  # type: ignore[misc]
            options.rounds,
            memory_rate,
        )
        ends = {name: side.ask("end") for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.close()
    row |= compare_sides(rounds)
    for name, end in ends.items():
        row["peak_memory_bytes"][name] = end["peak_memory_bytes"]
        if name != "ours" and "ours" in ends:
            # Of the first row: of a peer that copies long rows, the others have other prompts than ours. Where
            # two logits are equal up to rounding, either token is greedy.
            ours, theirs = ends["ours"]["tokens"][0], end["tokens"][0]
            row["same_tokens"][name] = [common_prefix(ours, theirs), min(len(ours), len(theirs))]
    return row


def bytes_a_step(weights: Path, batch: int, context: int, dtype: str) -> float:
    """Return what a decode step must read: every weight once (a tied embedding as the head), and the KV cache."""
    config = json.loads((weights / "config.json").read_text())
    stored = sum(path.stat().st_size for path in weights.glob("*.safetensors"))
    each = 4 if dtype == "float32" else 2
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    cache = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * batch * context
    # The checkpoint is in bfloat16.
    return float(stored // 2 * each + cache * each)
