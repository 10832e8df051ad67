"""Real case of docs/how-to/tokenizer.md: run its commands on the development data pack, and print its table.

    python benchmarks/tokenizer_real_case.py --pack PACK --out benchmarks/results/tokenizer_real_case.json

`--table FILE` only prints the table of a result file; the docs have the same table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CLUSTER = "en,de,fr,it,es,pl,pt,ru,bg,uk,hu,nl"
CODES = f"{CLUSTER},zh,ja,th,vi,id,mn,ky,ar,fa,hi,tr,ta,pa,ur"
TEXTS = ("text/cv.train.jsonl.xz", "text/wiki.train.jsonl.xz")
HELDOUT = "parallel/flores.jsonl.xz"
# name -> (title in the table, languages, more options)
ARMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "bucketed": ("bucketed (universal)", CODES, ()),
    "data-mass": ("bucketed, mass by data", CODES, ("--bucket-mass", "data")),
    "uniform": ("uniform", CODES, ("--scheme", "uniform")),
    "natural": ("natural", CODES, ("--scheme", "natural")),
    "cluster": ("cluster (European only)", CLUSTER, ()),
}
MEASURES = ("bytes_per_token", "parity", "gini", "partial_character_share", "unknown_share")
GROUPS = {
    "cluster:european": "European",
    "cluster:asian": "Asian",
    "cluster:middle-eastern-indic": "Middle-Eastern and Indic",
}


def koine(folder: Path, *words: str) -> list[str]:
    """Run one command of the docs in `folder`; return its notes."""
    done = subprocess.run(
        [sys.executable, "-m", "koine", "tokenizer", *words],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    return [line for line in done.stderr.splitlines() if line.startswith("koine: note:")]


def run(pack: Path) -> dict[str, Any]:
    """Run the commands of the docs; return the numbers of its table."""
    data = [word for text in TEXTS for word in ("--data", str((pack / text).resolve()))]
    notes: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def timed(step: str, *words: str) -> None:
            start = time.perf_counter()
            notes[step] = koine(folder, *words)
            seconds[step] = time.perf_counter() - start
            print(f"{step}: {seconds[step]:.0f} s", flush=True)

        timed("weights", "weights", *data, "--languages", CODES, "--sample-bytes", "20000000")
        for arm, (_, languages, options) in ARMS.items():
            sample = ("--vocab-size", "16384", "--sample-bytes", "20000000")
            timed(arm, "train", *data, "--languages", languages, *sample, *options, "--out", arm)
        records = {
            arm: json.loads((folder / arm / "tokenizer_training.json").read_text(encoding="utf-8"))
            for arm in ARMS
        }
        heldout = ("--data", str((pack / HELDOUT).resolve()), "--languages", CODES)
        timed("measure", "measure", *ARMS, *heldout, "--out", "m.json", "--report", "m.html")
        found = json.loads((folder / "m.json").read_text(encoding="utf-8"))
    return {
        "name": "tokenizer_real_case",
        "languages": CODES.split(","),
        "notes": notes,
        "seconds": seconds,
        "drawn_bytes": {
            arm: {code: one["drawn_bytes"] for code, one in record["languages"].items()}
            for arm, record in records.items()
        },
        "overall": {arm: {key: found[arm]["overall"][key] for key in MEASURES} for arm in ARMS},
        "bytes_per_token_by_cluster": {
            arm: {group: found[arm][group]["bytes_per_token"] for group in GROUPS} for arm in ARMS
        },
        "bytes_per_token": {
            arm: {code: found[arm][code]["bytes_per_token"] for code in CODES.split(",")} for arm in ARMS
        },
    }


def table(result: dict[str, Any]) -> str:
    """Return the table of the docs."""
    first, *others = GROUPS.values()
    lines = [
        "| tokenizer | bytes per token | parity with English | Gini | partial characters "
        f"| bytes per token: {first} | {' | '.join(others)} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, (title, _, _) in ARMS.items():
        row = result["overall"][arm]
        groups = " | ".join(f"{result['bytes_per_token_by_cluster'][arm][group]:.2f}" for group in GROUPS)
        lines.append(
            f"| {title} | {row['bytes_per_token']:.2f} | {row['parity']:.2f} | {row['gini']:.3f} "
            f"| {row['partial_character_share']:.1%} | {groups} |".replace("%", " %")
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pack", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))), end="")
        return
    result = run(options.pack)
    if options.out:
        from koine.files import write_json

        write_json(options.out, result)
    print(table(result), end="")


if __name__ == "__main__":
    main()
