"""Our preference and reward steps beside TRL's trainers, on a Cohere2 of 8M parameters with the same weights.

    python benchmarks/peers/install.py trl
    python benchmarks/preference_step.py --preferences PREF --out benchmarks/results/preference_step.json

PREF is a folder with `dpo_demo.jsonl.xz` and `hh_harmless.jsonl.xz`.

| part | compared |
|---|---|
| dpo | a step of DPO with `DPOTrainer`, in all cases |
| reward | a step of a Bradley-Terry reward model with `RewardTrainer`, on natural lengths |

| case | pairs |
|---|---|
| natural | preferences with the lengths that they have, up to 1,024 tokens a pair |
| half | equal lengths; half of the tokens of prompt and completion are the prompt |
| nothing | a prompt of one token: nothing to share |

Both sides train on the same pairs, 16 an optimiser step on average, with AdamW and log-probabilities of the
reference that are computed before. The reference has other weights, so that the first loss compares the sides.
Each side is first tried in each of its configurations. The best ones then take turns of one epoch, with a
matmul timed beside each turn. Language modelling on the same rows shows what a step costs without pairs.
TRL pads on CPU: its `padding_free` falls back to padding in this version. `--quick` runs everything on a tiny
model: it shows that both sides work, and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from koine import __version__
from koine.files import read_json, write_json
from koine.hardware import processor_name
from koine.model import Decoder, ModelConfig, preset, save_model
from koine.model.counting import block_matrix_parameters, count_parameters, visible_pairs

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers.install import python_of
from peers.side import Side
from peers.turns import compare_sides, take_turns
from preference_step_data import CASES, QUICK_VOCABULARY, ROW, prepare_case
from preference_step_side import PAIRS_OF_STEP, SCORE, Configuration
from preference_step_table import table
from train_step import Quiet, matmul_rate

SIDE = Path(__file__).resolve().parent / "preference_step_side.py"
PARTS = {"dpo": CASES, "reward": ("natural",)}
"""Cases of each part."""
DTYPES = ("float32", "bfloat16")
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Relative difference of the first losses of the two sides."""


def start_side(configuration: Configuration, case: Path, options: argparse.Namespace) -> Side:
    """Start the process of a side; raises `RuntimeError` where it ends."""
    python = str(python_of("trl")) if configuration.side == "trl" else sys.executable
    command = [python, str(SIDE), json.dumps(dataclasses.asdict(configuration)), "--case", str(case)]
    command += ["--weights", str(options.weights), "--reference", str(options.reference)]
    return Side([*command, "--threads", str(options.threads)])


def configurations(
    part: str, side: str, case: str, about: dict[str, Any], options: argparse.Namespace
) -> Iterator[Configuration]:
    """Yield the configurations of a side, without torch.compile."""
    for dtype in options.dtypes:
        if side == "trl":
            for pairs in (4,) if options.quick else (2, 4, 8, 16):
                for by_length in (False, True) if case == "natural" else (False,):
                    yield Configuration(side, part, dtype, pairs=pairs, by_length=by_length)
            continue
        row = ROW if case == "natural" else about["longest"]
        whole_step = -(-about["tokens"] * PAIRS_OF_STEP // (about["pairs"] * row)) * 2
        yield Configuration(side, part, dtype, row=row, rows=whole_step)
        yield Configuration(side, part, dtype, row=row, rows=4)
        yield Configuration(side, part, dtype, row=4 * row, rows=4)
        yield Configuration(side, part, dtype, row=row, rows=whole_step, shared=False)


def try_configuration(
    configuration: Configuration, case: Path, quiet: Quiet, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure the seconds of an epoch, the first loss and the peak memory; or say why not."""
    about: dict[str, Any] = {
        "configuration": str(configuration),
        "identity": dataclasses.asdict(configuration),
    }
    try:
        side = start_side(configuration, case, options)
    except RuntimeError as error:
        return about | {"failed": str(error)}
    try:
        first = side.ask("loss")
        about["first_loss"], about["memory_before_bytes"] = first["value"], first["baseline"]
        # Compiled code is made for the lengths that come up.
        side.ask("epoch" if configuration.compiled else "step")
        quiet.wait(options.patience)
        epoch = side.ask("epoch")
        about["seconds"], about["steps"] = epoch["seconds"], epoch["value"]
        about["peak_memory_bytes"] = side.ask("memory")["value"]
    except (RuntimeError, BrokenPipeError) as error:
        about["failed"] = str(error)
    finally:
        side.close()
    print(f"  {configuration.side}: {about}", file=sys.stderr, flush=True)
    return about


def try_side(
    part: str, side: str, case: str, folder: Path, quiet: Quiet, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Try each configuration of a side, and the best one compiled."""
    about = read_json(folder / "case.json")
    tried = [
        try_configuration(one, folder, quiet, options)
        for one in configurations(part, side, case, about, options)
    ]
    best = best_configuration(tried)
    if best is not None and options.compile and not options.quick:
        compiled = dataclasses.replace(Configuration(**best["identity"]), compiled=True)
        tried.append(try_configuration(compiled, folder, quiet, options))
    return tried


def best_configuration(tried: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the fastest configuration that worked, or None."""
    working = [one for one in tried if "failed" not in one]
    return min(working, key=lambda one: float(one["seconds"])) if working else None


def check_same_loss(tried: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Return the relative difference of the first losses in each precision.

    Raises `RuntimeError` where it is above `LOSS_TOLERANCE`, or where a side has no loss.
    """
    differences = {}
    for dtype, tolerance in LOSS_TOLERANCE.items():
        losses = {
            side: [
                one["first_loss"]
                for one in found
                if one["identity"]["dtype"] == dtype and "first_loss" in one
            ]
            for side, found in tried.items()
        }
        if not any(losses.values()):
            continue
        every = [loss for found in losses.values() for loss in found]
        if not all(losses.values()):
            raise RuntimeError(f"a side has no first loss in {dtype}: {losses}")
        differences[dtype] = (max(every) - min(every)) / min(every)
        if differences[dtype] > tolerance:
            raise RuntimeError(f"the sides do not compute the same loss in {dtype}: {losses}")
    return differences


def measure_case(
    part: str, case: str, folder: Path, config: ModelConfig, options: argparse.Namespace
) -> dict[str, Any]:
    """Try each side's configurations, then let the best ones take turns."""
    about = read_json(folder / "case.json")
    shape = (min(4096, about["tokens"]), config.hidden_size, sum(config.projection_sizes))
    quiet = Quiet(shape)
    tried = {side: try_side(part, side, case, folder, quiet, options) for side in ("ours", "trl")}
    row: dict[str, Any] = {
        **{name: value for name, value in about.items() if name not in ("prompts", "completions")},
        "tried": tried,
        "loss_difference": check_same_loss(tried),
    }
    best = {side: found for side, one in tried.items() if (found := best_configuration(one)) is not None}
    if len(best) < len(tried):
        return row
    if part == "dpo":
        ours = Configuration(**best["ours"]["identity"])
        language = dataclasses.replace(ours, objective="lm", shared=True)
        row["language_modelling"] = try_configuration(language, folder, quiet, options)
    row |= alternate(best, folder, shape, options)
    flops = epoch_flops(config, about, with_head=part == "dpo")
    row["pairs_per_second"] = {side: about["pairs"] / seconds for side, seconds in row["seconds"].items()}
    row["share_of_ceiling"] = {
        side: flops / seconds / row["ceiling"][side] for side, seconds in row["seconds"].items()
    }
    row["configuration"] = {side: found["configuration"] for side, found in best.items()}
    row["peak_memory_bytes"] = {side: found["peak_memory_bytes"] for side, found in best.items()}
    return row


def alternate(
    best: dict[str, dict[str, Any]], case: Path, shape: tuple[int, int, int], options: argparse.Namespace
) -> dict[str, Any]:
    """Let the sides take turns of an epoch."""
    running = {
        name: start_side(Configuration(**found["identity"]), case, options) for name, found in best.items()
    }
    dtypes = {found["identity"]["dtype"] for found in best.values()}
    # The ceiling is that of the faster precision in use.
    ceiling = torch.bfloat16 if "bfloat16" in dtypes else torch.float32

    def work(side: Side) -> Callable[[], float]:
        def epoch() -> float:
            # Not timed: its caches are full of the other side's data, which never happens in training.
            side.ask("step")
            return float(side.ask("epoch")["seconds"])

        return epoch

    try:
        for side in running.values():
            side.ask("epoch")
        rounds = take_turns(
            {name: work(side) for name, side in running.items()},
            options.rounds,
            lambda: matmul_rate(shape, ceiling),
        )
    finally:
        for side in running.values():
            side.close()
    return compare_sides(rounds) | {"ceiling_dtype": str(ceiling).removeprefix("torch.")}


def epoch_flops(config: ModelConfig, about: dict[str, Any], *, with_head: bool) -> float:
    """Return the operations that an epoch over the pairs of a case needs, forward and backward."""
    lengths = zip(about["prompts"], about["completions"], strict=True)
    return sum(pair_flops(config, prompt, found, with_head=with_head) for prompt, found in lengths)


def pair_flops(
    config: ModelConfig, prompt: int, completions: Sequence[int], *, with_head: bool = True
) -> float:
    """Return the operations that a pair needs, with its prompt computed once.

    6 a matmul weight and token; the head for tokens of completions only; attention for the positions that a
    token sees in each layer.
    """
    matrices = len(config.layers) * block_matrix_parameters(config)
    head = config.vocab_size * config.hidden_size * with_head
    seen = 0
    for layer in config.layers:
        of_prompt = visible_pairs(prompt, layer.window)
        seen += of_prompt
        seen += sum(visible_pairs(prompt + length, layer.window) - of_prompt for length in completions)
    tokens = prompt + sum(completions)
    return float(6 * matrices * tokens + 6 * head * sum(completions) + 12 * config.attention_size * seen)


def write_models(folder: Path, config: ModelConfig) -> tuple[Path, Path]:
    """Write the model, a reference with other weights and the head of reward models; return the folders."""
    paths = folder / "model", folder / "reference"
    for seed, path in enumerate(paths):
        if not path.exists():
            torch.manual_seed(seed)
            save_model(Decoder(config), path)
    torch.save(torch.randn(1, config.hidden_size) / config.hidden_size**0.5, folder / SCORE)
    return paths


def peer_version() -> str:
    """Return the version of TRL in its environment."""
    code = "import importlib.metadata; print(importlib.metadata.version('trl'))"
    done = subprocess.run([str(python_of("trl")), "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preferences", type=Path, required=True, help="folder of the preference files")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--pairs", type=int, default=128, help="pairs of an epoch, a multiple of 16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patience", type=float, default=15.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quick", action="store_true", help="a tiny model; shows that everything runs")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder that keeps models and pairs for the next call"
    )
    parser.add_argument("--out", type=Path, help="JSON file; cases of an earlier call stay in it")
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.rounds, options.patience = 32, 3, 0.0
    if options.pairs % PAIRS_OF_STEP:
        parser.error(f"--pairs must be a multiple of {PAIRS_OF_STEP}")
    return options


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    config = preset("koine-0.5m", QUICK_VOCABULARY) if options.quick else preset("koine-8m")
    result: dict[str, Any] = {
        "name": "preference_step",
        "quick": options.quick,
        "parameters": count_parameters(config).total,
        "machine": {
            "processor": processor_name(),
            "threads": options.threads,
            "memory_bytes": psutil.virtual_memory().total,
            "python": platform.python_version(),
        },
        "versions": {
            "torch": importlib.metadata.version("torch"),
            "trl": peer_version(),
            "koine": __version__,
        },
        "rows": {},
    }
    if options.out and options.out.exists():
        before = read_json(options.out)
        if all(before.get(name) == result[name] for name in ("quick", "machine", "versions")):
            result["rows"] = before["rows"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.checkpoints or Path(temporary)).resolve() / ("quick" if options.quick else "full")
        folder.mkdir(parents=True, exist_ok=True)
        options.weights, options.reference = write_models(folder, config)
        for part, case in ((part, case) for part in options.parts for case in options.cases):
            if case not in PARTS[part]:
                continue
            pairs = prepare_case(case, options.preferences, folder, pairs=options.pairs, quick=options.quick)
            result["rows"][f"{part} {case}"] = measure_case(part, case, pairs, config, options)
            print(part, case, flush=True)
            if options.out:
                write_json(options.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
