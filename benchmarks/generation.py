"""Prefill and decode: ours beside `transformers.generate` and, at batch 1, llama.cpp, with the same weights.

    python benchmarks/peers/install.py transformers llama_cpp
    python benchmarks/generation.py --out benchmarks/results/generation.json

For each batch and context every side prefills the prompts. Then the sides take turns of a few decode steps,
and the rate of memory is measured beside each turn: decode reads all weights for each token, so memory bounds
it. The greedy tokens of the sides are compared. The last line printed is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from koine.files import read_json, write_json
from koine.hardware import processor_name
from koine.model import Decoder, preset, save_model
from koine.model.counting import all_full, cache_bytes, count_parameters
from koine.tokenizer import train_tokenizer
from koine.tokenizer.special import SMALLEST_VOCABULARY

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers.install import ENVIRONMENTS, python_of
from peers.side import Side

SIDE = Path(__file__).resolve().parent / "generation_side.py"
CASES: tuple[tuple[int, int], ...] = (
    (1, 512),
    (8, 512),
    (32, 512),
    (1, 8192),
    (8, 8192),
    (32, 8192),
    (1, 32_768),
    (8, 32_768),
)
"""(batch, context). 32 prompts of 32,768 tokens are for larger machines: on two cores `transformers` needs
about an hour to prefill them."""


def start_side(side: str, options: list[str]) -> Side:
    """Start the process of a side."""
    python = sys.executable if side == "ours" else str(python_of(side))
    return Side([python, str(SIDE), side, *options])


def memory_rate(size: int = 2**26) -> float:
    """Measure bytes read a second by a matrix-vector product larger than any cache; the best of a few."""
    a, b = torch.randn(size // 4 // 4096, 4096), torch.randn(4096)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mv(a, b)
        best = min(best, time.perf_counter() - start)
    return size / best


def common_prefix(first: list[int], second: list[int]) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def steps_for(seconds: float) -> int:
    """Return the decode steps of a turn: about a second, at least two."""
    return int(min(64, max(2, 1.0 / seconds)))


def compare(
    batch: int, context: int, names: list[str], common: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Measure one case: prefill on every side, then turns of decoding."""
    sides = {name: start_side(name, common) for name in names}
    row: dict[str, Any] = {"batch": batch, "context": context}
    samples: dict[str, list[float]] = {name: [] for name in names}
    memory_rates: list[float] = []
    try:
        for name, side in sides.items():
            read = side.ask("prepare", batch=batch, context=context)
            first = side.ask("decode", steps=2)
            row[name] = {**read, "steps": steps_for(first["seconds"] / 2)}
            if read["prefill_seconds"] is not None:
                row[name]["prefill_tokens_per_second"] = batch * context / read["prefill_seconds"]
        for _ in range(options.rounds):
            for name, side in sides.items():
                memory_rates.append(memory_rate())
                steps = row[name]["steps"]
                samples[name].append(side.ask("decode", steps=steps)["seconds"] / steps)
        for name, side in sides.items():
            end = side.ask("end")
            row[name] |= {
                "decode_tokens_per_second": batch / statistics.median(samples[name]),
                "peak_memory_bytes": end["peak_memory_bytes"],
                "cache_bytes": end["cache"]["held"],
                "cache_reserved_bytes": end["cache"]["reserved"],
                "cache_lengths": end["cache"]["lengths"],
            }
            row[name]["tokens"] = end["tokens"]
    finally:
        for side in sides.values():
            side.close()
    for name in names[1:]:
        ratios = sorted(p / o for o, p in zip(samples["ours"], samples[name], strict=True))
        row[f"ratio_{name}"] = statistics.median(ratios)
        row[f"ratio_{name}_spread"] = [ratios[0], ratios[-1]]
        # Copies of one row are compared by that row.
        rows = 1 if row[name]["prefill_seconds"] is None else batch
        pairs = zip(row["ours"]["tokens"][:rows], row[name]["tokens"][:rows], strict=True)
        # Where two logits are equal up to rounding, either token is greedy: length of the common prefix, and
        # of the shorter row.
        row[f"same_tokens_{name}"] = [[common_prefix(a, b), min(len(a), len(b))] for a, b in pairs]
    for name in names:
        del row[name]["tokens"]
    row["memory_rate_bytes_per_second"] = statistics.median(memory_rates)
    return row


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="koine-8m")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", help="BATCHxCONTEXT, such as 8x8192")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # A wide initialisation keeps the two best logits apart, so that rounding does not choose the greedy
    # token.
    config = replace(preset(options.preset), initializer_range=0.1)
    cases = CASES
    if options.cases:
        cases = tuple((int(b), int(c)) for b, c in (case.split("x") for case in options.cases))
    result: dict[str, Any] = {
        "name": "generation",
        "model": options.preset,
        "parameters": count_parameters(config).total,
        "machine": {
            "processor": processor_name(),
            "threads": options.threads,
            "python": platform.python_version(),
        },
        "torch": torch.__version__,
        "results": {},
    }
    if options.out and options.out.exists():
        before = read_json(options.out)
        if before["machine"] == result["machine"] and before["torch"] == result["torch"]:
            result["results"] = before["results"]
    with tempfile.TemporaryDirectory() as folder:
        # llama.cpp opens no model without a tokenizer; any tokenizer will do.
        tokenizer = Path(folder) / "tokenizer"
        train_tokenizer(
            {"en": lambda: ["some text"] * 99},
            vocab_size=SMALLEST_VOCABULARY + 3,
            scheme="natural",
            english_share=None,
        ).save(tokenizer)
        for dtype in options.dtypes:
            weights, gguf = Path(folder) / dtype, Path(folder) / f"{dtype}.gguf"
            save_model(Decoder(config), weights, tokenizer=tokenizer, dtype=getattr(torch, dtype))
            with_llama = (ENVIRONMENTS / "llama_cpp").exists()
            if with_llama:
                from koine.model.formats.gguf import export_gguf

                export_gguf(weights, gguf, dtype=dtype)
            for batch, context in cases:
                names = ["ours", "transformers"]
                if batch == 1 and with_llama:
                    names.append("llama_cpp")
                common = ["--weights", str(weights), "--dtype", dtype, "--threads", str(options.threads)]
                row = compare(batch, context, names, [*common, "--gguf", str(gguf)], options)
                bytes_each = 4 if dtype == "float32" else 2
                lengths = row["ours"].pop("cache_lengths")
                row["cache_bytes_formula"] = sum(cache_bytes(config, one, bytes_each) for one in lengths)
                row["cache_share_of_all_full"] = row["cache_bytes_formula"] / sum(
                    cache_bytes(all_full(config), one, bytes_each) for one in lengths
                )
                read = count_parameters(config).total * bytes_each + row["ours"]["cache_bytes"]
                rate = row["ours"]["decode_tokens_per_second"] / batch * read
                row["ours_share_of_memory_rate"] = rate / row["memory_rate_bytes_per_second"]
                result["results"][f"{dtype} {batch}x{context}"] = row
                print(json.dumps(row), flush=True)
                if options.out:
                    write_json(options.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
