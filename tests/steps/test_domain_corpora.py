"""Documents of a domain: spread over the whole of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from koine.steps.domain_corpora import documents_of


@pytest.mark.parametrize(
    ("count", "limit", "numbers"),
    [(3, 5, [0, 1, 2]), (4, 4, [0, 1, 2, 3]), (10, 4, [0, 2, 5, 7]), (5, 1, [0])],
)
def test_they_come_evenly_from_the_beginning_to_the_end(
    tmp_path: Path, count: int, limit: int, numbers: list[int]
) -> None:
    lines = [json.dumps({"id": str(number), "text": f"text {number}"}) for number in range(count)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert documents_of(tmp_path, "train", limit) == [f"text {number}" for number in numbers]
