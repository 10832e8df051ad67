"""Training a byte-level BPE with `koine.tokenizer` and with the `tokenizers` library, on the same text.

    python benchmarks/tokenizer_training.py --data PATH --out benchmarks/results/tokenizer_training.json

Each run has its own process, and so its own peak memory; the sides alternate. Both read the text from one
plain file, a line a document, with natural weights. Below the size at which counts are scaled down, the
merges must be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 32_000


def lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield line.rstrip("\n")


def ours(path: Path) -> str:
    from koine.tokenizer import train_tokenizer

    trained = train_tokenizer(
        {"en": lambda: lines(path)}, vocab_size=VOCABULARY, scheme="natural", english_share=None
    )
    return json.dumps(json.loads(trained._files["tokenizer.json"])["model"]["merges"])


def direct(path: Path) -> str:
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

    from koine.tokenizer import SPECIAL_TOKENS
    from koine.tokenizer.pretokenize import pre_tokenizer

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=5,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(lines(path), trainer)
    return json.dumps(json.loads(backend.to_str())["model"]["merges"])


def run(side: str, path: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--side", side, "--text", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def write_text(paths: list[Path], size: int, out: Path) -> None:
    """Write `size` bytes of documents, repeating the data.

    Each document ends in a word of its own, so that there are always new pre-tokens.
    """
    from koine.data import read_records

    written = 0
    with out.open("w", encoding="utf-8") as file:
        for turn in itertools.count():
            for path in paths:
                for record in read_records(path, split="all", max_bad_share=1.0):
                    text = f"{record['text']} w{turn}x{written % 9973}".replace("\n", " ")
                    file.write(text + "\n")
                    written += len(text.encode("utf-8")) + 1
                    if written >= size:
                        return


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+")
    parser.add_argument("--megabytes", type=int, nargs="*", default=[60, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--alone", type=int, nargs="*", default=[], help="megabytes at which ours runs alone, for its memory"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=["ours", "direct"], help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.side:
        from koine.plan.run.peak_memory import own_peak

        start = time.perf_counter()
        merges = {"ours": ours, "direct": direct}[options.side](options.text)
        seconds = time.perf_counter() - start
        peak = own_peak()
        digest = hashlib.sha256(merges.encode("utf-8")).hexdigest()
        print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak, "merges": digest}))
        return
    result: dict[str, Any] = {
        "name": "tokenizer_training",
        "vocabulary": VOCABULARY,
        "python": platform.python_version(),
        "results": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        for megabytes in options.megabytes:
            write_text(options.data, megabytes * 1_000_000, text)
            found: dict[str, list[dict[str, Any]]] = {"ours": [], "direct": []}
            for _ in range(options.rounds):
                for side, runs in found.items():
                    runs.append(run(side, text))
            ratios = sorted(
                peer["seconds"] / own["seconds"]
                for own, peer in zip(found["ours"], found["direct"], strict=True)
            )
            result["results"][str(megabytes)] = {
                "ours_seconds": statistics.median(one["seconds"] for one in found["ours"]),
                "direct_seconds": statistics.median(one["seconds"] for one in found["direct"]),
                "ratio": statistics.median(ratios),
                "ratio_spread": [ratios[0], ratios[-1]],
                "ours_peak_memory_bytes": max(one["peak_memory_bytes"] for one in found["ours"]),
                "direct_peak_memory_bytes": max(one["peak_memory_bytes"] for one in found["direct"]),
                "same_merges": found["ours"][0]["merges"] == found["direct"][0]["merges"],
            }
            print(json.dumps({str(megabytes): result["results"][str(megabytes)]}), flush=True)
        for megabytes in options.alone:
            write_text(options.data, megabytes * 1_000_000, text)
            own = run("ours", text)
            result["results"][str(megabytes)] = {
                "ours_seconds": own["seconds"],
                "ours_peak_memory_bytes": own["peak_memory_bytes"],
            }
            print(json.dumps({str(megabytes): result["results"][str(megabytes)]}), flush=True)
    if options.out:
        from koine.files import write_json

        write_json(options.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
