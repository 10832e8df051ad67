"""Format the numbers, times and names of a report."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from koine.plan.report.blocks import Block, is_number

NUMERIC_TEXT = re.compile(r"[+\u2212-]?\d[\d.,\u202f]*([ \u00a0]?%)?( \([^)]*\))?")
LABELS = {
    "loss": "loss, nats per token",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens/s",
    "gradient_norm": "gradient norm",
    "matmul_rate_share": "share of the matmul rate",
    "ceiling_share": "share of the matmul rate",
    "units": "tokens with a loss in a batch",
}


def table(block: Block) -> dict[str, Any]:
    """Return columns with alignment, and cells as text; a column's numbers have equally many decimals."""
    columns = list(zip(*block["rows"], strict=True)) or [() for _ in block["columns"]]
    cells = [column_cells(column) for column in columns]
    return {
        "columns": [
            {"name": name, "number": bool(column) and all(is_numeric(cell) for cell in column)}
            for name, column in zip(block["columns"], columns, strict=True)
        ],
        "rows": [list(row) for row in zip(*cells, strict=True)],
    }


def is_numeric(cell: Any) -> bool:
    """Return whether a cell is right-aligned: a number, text such as `12 % (10–14)`, or an empty cell."""
    if isinstance(cell, str):
        return cell in ("", "–") or NUMERIC_TEXT.fullmatch(cell) is not None
    return not isinstance(cell, bool)


def column_cells(column: Sequence[Any]) -> list[str]:
    fractions = [cell for cell in column if isinstance(cell, float) and is_number(cell)]
    decimals = max((decimals_of(value) for value in fractions), default=0)
    return [
        "–" if cell is None
        else f"{cell:,.{decimals}f}" if isinstance(cell, float) and is_number(cell) and decimals <= 4
        else number_text(cell) if not isinstance(cell, str)
        else cell
        for cell in column
    ]  # fmt: skip


def decimals_of(value: float) -> int:
    """Return the decimals that four significant digits need; more than 4 means an exponent."""
    text = f"{value:.4g}"
    return 9 if "e" in text else len(text.partition(".")[2])


def number_text(value: Any) -> str:
    """Return a number as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"
    return "–" if value is None else str(value)


def metric_label(metric: str) -> str:
    """Return a metric's name for an axis."""
    if metric in LABELS:
        return LABELS[metric]
    words = metric.removeprefix("evaluation/")
    for known in ("bits_per_byte", "bits per byte"):
        rest = words.removeprefix(known).strip("_/ ")
        if words.startswith(known):
            return "bits per byte" + (f", {rest.replace('_', ' ')}" if rest else "")
    return words.replace("_", " ")


def flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested objects under dotted names; a list is one leaf."""
    if isinstance(value, dict):
        return [
            leaf
            for key, item in value.items()
            for leaf in flat(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list):
        plain = all(item is None or isinstance(item, str | int | float) for item in value)
        value = (
            ", ".join(number_text(item) for item in value) or "–"
            if plain
            else json.dumps(value, ensure_ascii=False)
        )
    return [(prefix, value)] if prefix else []


def duration(seconds: float) -> str:
    """Return seconds as text: `< 0.1 s`, `0.4 s`, `12 s`, `3 min 05 s`, `2 h 14 min`."""
    if seconds < 0.05:
        return "< 0.1 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02} min" if hours else f"{minutes} min {rest:02} s"


def size(count: float) -> str:
    """Return bytes as text, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
