"""Turn the result of `measure` into report blocks: tables and heat maps of language by tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from koine.tokenizer.measures import Measures

OVERALL = "overall"
GROUP = "cluster:"

# measure -> (title, digits after the point)
SHOWN = {
    "bytes_per_token": ("bytes per token", 2),
    "tokens_per_word": ("tokens per word", 2),
    "tokens_per_sentence": ("tokens per sentence", 1),
    "parity": ("tokens relative to English", 2),
    "gini": ("Gini over languages", 3),
    "renyi_efficiency": ("Rényi efficiency", 3),
    "unknown_share": ("unknown text", 4),
    "partial_character_share": ("partial characters", 4),
    "cost_per_megabyte": ("cost of a megabyte", 3),
    "megabytes_per_second": ("MB/s", 1),
    "vocabulary_size": ("vocabulary", 0),
}


def is_group(name: str) -> bool:
    """Return whether a row stands for several languages."""
    return name == OVERALL or name.startswith(GROUP)


def table(
    result: Mapping[str, Mapping[str, Measures]], row: str = OVERALL
) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows (one per tokenizer) for one group or language.

    A measure that no tokenizer has is left out.
    """
    keys = [key for key in SHOWN if any(key in rows.get(row, {}) for rows in result.values())]
    rows = [
        [name, *(_text(rows.get(row, {}).get(key), SHOWN[key][1]) for key in keys)]
        for name, rows in result.items()
    ]
    return ["tokenizer", *(SHOWN[key][0] for key in keys)], rows


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def blocks(result: Mapping[str, Mapping[str, Measures]]) -> list[dict[str, Any]]:
    """Return the report blocks (see `koine.plan.report.blocks`)."""
    columns, rows = table(result)
    found: list[dict[str, Any]] = [
        {
            "kind": "table",
            "title": "Means over languages",
            "caption": "Every language counts the same.",
            "columns": columns,
            "rows": rows,
        }
    ]
    groups = sorted({name for rows in result.values() for name in rows if name.startswith(GROUP)})
    for group in groups:
        columns, rows = table(result, group)
        found.append({"kind": "table", "title": group.removeprefix(GROUP), "columns": columns, "rows": rows})
    names = list(result)
    languages = sorted({code for rows in result.values() for code in rows if not is_group(code)})
    for key, label in (
        ("bytes_per_token", "bytes per token (more is better)"),
        ("parity", "tokens relative to English (less is better)"),
        ("tokens_per_word", "tokens per word (less is better)"),
    ):
        with_it = [code for code in languages if all(key in result[name].get(code, {}) for name in names)]
        if with_it:
            found.append(
                {
                    "kind": "heatmap",
                    "title": SHOWN[key][0],
                    "label": label,
                    "rows": with_it,
                    "columns": names,
                    "values": [[result[name][code][key] for name in names] for code in with_it],
                }
            )
    scripts = list(dict.fromkeys(script for name in names for script in result[name][OVERALL]["scripts"]))
    found.append(
        {
            "kind": "table",
            "title": "The vocabulary by script",
            "caption": "Tokens, and the share that this text uses. "
            "Zyyy: no letters; bytes: parts of characters.",
            "columns": ["script", *names],
            "rows": [
                [script, *(_use(result[name][OVERALL]["scripts"].get(script)) for name in names)]
                for script in scripts
            ],
        }
    )
    return found


def _use(row: Mapping[str, int] | None) -> str:
    return "" if row is None else f"{row['tokens']:,} ({row['used'] / row['tokens']:.0%})"
