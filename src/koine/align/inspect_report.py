"""Blocks of the report of an inspection, and the columns of its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from koine.align.inspect_pairs import TOTAL, Inspection

COLUMNS = {
    "language": "language",
    "groups": "groups",
    "tokens": "tokens",
    "duplicates": "repeated",
    "contradictions": "contradicted",
    "shared_prompts": "in held-out",
    "cut": "cut",
    "left_out": "left out",
    "other_language": "other language",
    "longer_wins": "longer wins",
    "accuracy": "accuracy",
    "accuracy_means": "by means",
    "ches": "CHES",
}
"""Fields of a language's row, and their headings."""


def table(inspection: Inspection) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows, one a language and their total where there are several.

    Columns without any figure are left out.
    """
    rows = [{"language": code, **counts.to_json()} for code, counts in sorted(inspection.languages.items())]
    if len(rows) > 1:
        rows.append({"language": TOTAL, **inspection.total.to_json()})
    for row in rows:
        if not row["answers_identified"]:
            row["other_language"] = None
    names = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    return [COLUMNS[name] for name in names], [[_shown(row, name) for name in names] for row in rows]


def _shown(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return ""
    if name == "other_language":
        return f"{value:,} of {row['answers_identified']:,}"
    if isinstance(value, float):
        return f"{value:.3f}" if name != "ches" else f"{value:.2f}"
    return value if isinstance(value, str) else f"{value:,}"


def displacing_rows(inspection: Inspection) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the pairs likeliest to push the chosen answer's likelihood down."""
    columns = ["id", "language", "CHES", "prompt", "chosen", "rejected"]
    return columns, [
        [
            pair["id"],
            pair["language"],
            f"{pair['ches']:.2f}",
            *(_short(pair[name]) for name in ("prompt", "chosen", "rejected")),
        ]
        for pair in inspection.displacing
    ]


def _short(text: str, length: int = 48) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def report_blocks(inspection: Inspection) -> Sequence[dict[str, Any]]:
    """Return the blocks of the report."""
    columns, rows = table(inspection)
    blocks: list[dict[str, Any]] = [
        {"kind": "table", "title": "Groups by language", "columns": columns, "rows": rows}
    ]
    if inspection.displacing:
        columns, rows = displacing_rows(inspection)
        blocks.append(
            {
                "kind": "table",
                "title": "Pairs likeliest to push the chosen answer's likelihood down",
                "columns": columns,
                "rows": rows,
            }
        )
    return blocks
