"""Time of `koine tokenizer measure` for 5 tokenizers on 40 languages of 1 MB each.

    python benchmarks/tokenizer_measure.py --data PATH... --out benchmarks/results/tokenizer_measure.json

The tokenizers are three of ours (8k, 32k, 128k), one in tiktoken's format and one of SentencePiece, so that
every loader is timed.
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

LANGUAGES = 40
BYTES = 1_000_000


def collect(paths: Iterable[Path], out: Path) -> dict[str, list[str]]:
    """Write one megabyte of each of the 40 languages with most text to `out`; shorter texts repeat."""
    from koine.data import read_records

    texts: dict[str, list[str]] = {}
    for path in paths:
        for record in read_records(path, split="all", max_bad_share=1.0):
            texts.setdefault(record["language"], []).append(record["text"])
    sizes = {code: sum(len(text.encode("utf-8")) for text in part) for code, part in texts.items()}
    chosen = sorted((code for code in texts if code != "und"), key=lambda code: -sizes[code])[:LANGUAGES]
    with out.open("w", encoding="utf-8") as file:
        for code in chosen:
            written = 0
            for text in cycle(texts[code]):
                file.write(json.dumps({"text": text, "language": code}, ensure_ascii=False) + "\n")
                written += len(text.encode("utf-8"))
                if written >= BYTES:
                    break
    return {code: texts[code] for code in chosen}


def build(texts: dict[str, list[str]], folder: Path) -> list[Path]:
    """Build five tokenizers of three kinds."""
    import sentencepiece

    from koine.tokenizer import train_tokenizer

    found = []
    for size in (8_000, 32_000, 128_000):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trained = train_tokenizer(
                {code: (lambda part=part: part) for code, part in texts.items()},  # type: ignore[misc]
                vocab_size=size,
                min_frequency=2,
            )
        trained.save(folder / f"ours-{size // 1000}k")
        found.append(folder / f"ours-{size // 1000}k")
    ranks = [data for index in range(trained.vocab_size) if (data := trained.token_bytes(index))]
    path = folder / "as_o200k.tiktoken"
    path.write_text(
        "\n".join(f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)),
        encoding="utf-8",
    )
    found.append(path)
    sample = folder / "sample.txt"
    lines = [line for part in texts.values() for text in part[:20] for line in text.splitlines()]
    sample.write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(sample),
        model_prefix=str(folder / "sentencepiece"),
        vocab_size=8_000,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.999,
        minloglevel=2,
    )
    return [*found, folder / "sentencepiece.model"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        tokenizers = build(collect(options.data, text), folder)
        measures = folder / "measures.json"
        start = time.perf_counter()
        subprocess.run(
            [
                *(sys.executable, "-m", "koine", "tokenizer", "measure", *map(str, tokenizers)),
                *("--data", str(text), "--out", str(measures), "--report", str(folder / "page.html")),
            ],
            check=True,
            capture_output=True,
        )
        seconds = time.perf_counter() - start
        found = json.loads(measures.read_text(encoding="utf-8"))
    result: dict[str, Any] = {
        "name": "tokenizer_measure",
        "languages": LANGUAGES,
        "bytes": text_bytes(found),
        "seconds": seconds,
        "megabytes_per_second": {
            Path(path).name: rows["overall"]["megabytes_per_second"] for path, rows in found.items()
        },
    }
    if options.out:
        from koine.files import write_json

        write_json(options.out, result)
    print(json.dumps(result))


def text_bytes(found: dict[str, Any]) -> int:
    """Return the bytes of text that each tokenizer encoded."""
    return int(next(iter(found.values()))["overall"]["bytes"])


if __name__ == "__main__":
    main()
