"""Accuracy of `koine.language_id.identify`, by language: the sample world and translated sentences.

    python benchmarks/language_id.py --pack ../shared/data

It prints the table of docs/reference/languages.md. Questions and documents are the sample world's, with its
24 languages as candidates; NTREX (news) and Tatoeba (short sentences) are of the development data pack, without
candidates.
"""

from __future__ import annotations

import argparse
import json
import lzma
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from koine.data.sample import QUESTION_LANGUAGES, write_sample
from koine.errors import UserError
from koine.language_id import identifiable, identify
from koine.languages import language


def accuracy(texts: Iterable[tuple[str, str]], candidates: Collection[str] | None) -> dict[str, float]:
    """Return the share of (code, text) that is identified rightly, by language."""
    count: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for code, text in texts:
        count[code] += 1
        right[code] += identify(text, candidates).code == code
    return {code: right[code] / count[code] for code in count}


def sample_texts(world: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Yield documents, or the first turn of questions, of a sample world."""
    for path in sorted(world.glob(pattern)):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            yield record["language"], record.get("text") or record["messages"][0]["content"]


def parallel_texts(path: Path, limit: int) -> Iterator[tuple[str, str]]:
    """Yield up to `limit` sentences of each identifiable language of a file of the development data pack."""
    known, count = set(identifiable()), Counter[str]()
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            for name, text in (
                record["text"] if "text" in record else {record["lang"]: record["other"]}
            ).items():
                try:
                    code = language(name).code
                except UserError:
                    continue
                if code in known and count[code] < limit:
                    count[code] += 1
                    yield code, text


def main() -> None:
    """Print the table as Markdown, then the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pack", type=Path, default=Path("../shared/data"))
    parser.add_argument("--limit", type=int, default=200, help="sentences a language of NTREX and Tatoeba")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        write_sample(
            QUESTION_LANGUAGES, world, documents_per_language=100, questions_per_language=200, code_bytes=0
        )
        columns = {
            "sample documents": accuracy(sample_texts(world, "documents/*.jsonl"), QUESTION_LANGUAGES),
            "sample questions": accuracy(sample_texts(world, "questions/*/*.jsonl"), QUESTION_LANGUAGES),
        }
    for title, name in (("NTREX", "ntrex"), ("Tatoeba", "tatoeba_eng")):
        columns[title] = accuracy(
            parallel_texts(arguments.pack / "parallel" / f"{name}.jsonl.xz", arguments.limit), None
        )
    print(f"| language | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for code in sorted({code for column in columns.values() for code in column}):
        cells = (f"{100 * column[code]:.0f}" if code in column else "" for column in columns.values())
        print(f"| {code} | {' | '.join(cells)} |")
    means = (f"{100 * sum(column.values()) / len(column):.1f}" for column in columns.values())
    print(f"| mean | {' | '.join(means)} |")


if __name__ == "__main__":
    main()
