"""The user's own text sorted into a corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from koine.steps.corpora import own_corpus
from koine.steps.corpus_files import read_lines, write_own_corpus


def test_line_separators_inside_a_text_do_not_split_records(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("chats", "message"), [(True, "Chats are yours."), (False, "The text holds no chats")]
)
def test_the_report_states_the_source_of_the_chats(chats: bool, message: str, tmp_path: Path) -> None:
    # Chats in exactly the languages for which the sample world has questions, too.
    rows: list[dict[str, Any]] = [
        {"id": f"{code}{number}", "text": f"a text of some length {number}", "language": code}
        for code in ("en", "hi")
        for number in range(40)
    ]
    if chats:
        talk = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
        rows += [
            {"id": f"c{code}", "messages": talk, "language": code, "split": "train"} for code in ("en", "hi")
        ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    out.mkdir()
    own_corpus(
        tmp_path / "text.jsonl", fields=(), primary_cluster="european", primary_languages=(), languages=(),
        max_bytes_per_language=10**6, heldout_bytes_per_language=10**5, heldout_share=0.2,
        min_bytes_per_language=10, max_bad_share=0.0, questions_per_language=2, seed=0, out=out,
    )  # fmt: skip
    assert message in json.loads((out / "report.json").read_text())["blocks"][0]["text"]


def test_documents_are_held_out_even_if_all_are_marked_for_training(tmp_path: Path) -> None:
    from koine.steps.corpus_files import read_lines, write_own_corpus

    records = [
        {"text": f"Satz {number}", "language": "de", "id": str(number), "split": "train"}
        for number in range(200)
    ] + [
        {"text": "one", "language": "en", "id": "a", "split": "train"},
        {"text": "two", "language": "en", "id": "b"},
    ]
    shares = write_own_corpus(
        records, tmp_path, max_bytes=10**6, heldout_bytes=10**6, heldout_share=0.05, min_bytes=1
    )
    kept, held = (
        list(read_lines(tmp_path / part / "de.jsonl")) for part in ("documents", "documents-heldout")
    )
    assert {row["id"] for row in kept} | {row["id"] for row in held} == {str(number) for number in range(200)}
    assert not {row["id"] for row in kept} & {row["id"] for row in held}
    assert (len(kept), len(held)) == (shares["de"].documents, shares["de"].heldout_documents)
    assert 2 <= len(held) <= 25
    assert (shares["en"].documents, shares["en"].heldout_documents) == (1, 1)
