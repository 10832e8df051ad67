"""The user's own text sorted into a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koine.recipes.corpus import read_lines, write_own_corpus


def test_ends_of_lines_inside_a_text_are_no_ends_of_records(tmp_path: Path) -> None:
    # All records say that they are for training, so that some are held back out of a file already written.
    records: list[dict[str, Any]] = [
        {
            "id": str(number),
            "text": f"one\u2028two\u2029three\x85four\x0bfive\x0csix {number}",
            "language": "de",
            "split": "train",
        }
        for number in range(40)
    ]
    shares = write_own_corpus(
        records, tmp_path, max_bytes=10**6, heldout_bytes=10**6, heldout_share=0.1, min_bytes=1
    )
    kept = list(read_lines(tmp_path / "documents" / "de.jsonl"))
    held = list(read_lines(tmp_path / "documents-heldout" / "de.jsonl"))
    assert 0 < len(held) == shares["de"].heldout_documents < 40
    assert sorted(kept + held, key=lambda one: int(one["id"])) == records
