"""Check the blocks of a `report.json`, the part of the report that a step writes itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.errors import UserError, did_you_mean
from koine.files import read_json

# kind -> (keys that must be there, keys that may be there)
KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "text": (frozenset({"text"}), frozenset({"title"})),
    "verdict": (frozenset({"title", "text"}), frozenset()),
    "table": (frozenset({"columns", "rows"}), frozenset({"title", "caption"})),
    "terms": (frozenset({"terms"}), frozenset({"title"})),
    "lines": (frozenset({"series", "x_label", "y_label"}), frozenset({"title", "caption", "log_x", "log_y"})),
    "bars": (frozenset({"categories", "series", "x_label", "y_label"}), frozenset({"title", "caption"})),
    "heatmap": (frozenset({"rows", "columns", "values"}), frozenset({"title", "caption", "label"})),
    "samples": (frozenset({"samples"}), frozenset({"title"})),
}
ROLES = ("system", "user", "assistant", "tool")

Block = Mapping[str, Any]


@dataclass(frozen=True)
class StepReport:
    """Title and blocks of a step's report."""

    title: str
    blocks: tuple[Block, ...]


def read_step_report(path: Path) -> StepReport:
    """Read and check a `report.json`; raises `UserError` naming the block and the key that is wrong."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("blocks"), list):
        raise UserError(
            "not a report", where=path, hint='a report is {"title": ..., "blocks": [{"kind": ...}, ...]}'
        )
    title = content.get("title", "")
    if not isinstance(title, str):
        raise UserError("'title' must be text", where=path)
    for number, block in enumerate(content["blocks"], 1):
        check_block(block, f"{path}: block {number}")
    return StepReport(title, tuple(content["blocks"]))


def check_block(block: Any, where: str) -> None:
    """Raise `UserError` for an unknown kind or key, a missing key, or a value of another type."""
    if not isinstance(block, dict) or not isinstance(block.get("kind"), str):
        raise UserError(
            "a block must be an object with a 'kind'", where=where, hint=f"kinds: {', '.join(KEYS)}"
        )
    kind = block["kind"]
    if kind not in KEYS:
        raise UserError(f"unknown kind of block '{kind}'", where=where, hint=did_you_mean(kind, KEYS))
    needed, optional = KEYS[kind]
    given = set(block) - {"kind"}
    for key in sorted(given - needed - optional):
        raise UserError(
            f"a block of kind '{kind}' has no key '{key}'",
            where=where,
            hint=did_you_mean(key, needed | optional),
        )
    missing = sorted(needed - given)
    if missing:
        raise UserError(
            f"a block of kind '{kind}' lacks {', '.join(repr(key) for key in missing)}",
            where=where,
            hint=f"it needs {', '.join(sorted(needed))}",
        )
    for key in ("title", "text", "caption", "x_label", "y_label", "label"):
        expect(isinstance(block.get(key, ""), str), where, f"'{key}' must be text")
    if kind in CHECKS:
        CHECKS[kind](block, where)


def expect(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise UserError(what, where=where, hint="fix the step that wrote it and run it again")


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; plots show nothing else."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def check_table(block: Block, where: str) -> None:
    columns, rows = block["columns"], block["rows"]
    expect(is_texts(columns) and bool(columns), where, "'columns' must be a list of names")
    expect(isinstance(rows, list), where, "'rows' must be a list")
    for number, row in enumerate(rows, 1):
        expect(
            isinstance(row, list) and len(row) == len(columns),
            where,
            f"row {number} of the table must have {len(columns)} cells",
        )
        for cell in row:
            expect(
                cell is None or isinstance(cell, str | int | float),
                where,
                f"row {number} of the table: a cell must be text, a number or null, got {cell!r}",
            )


def check_terms(block: Block, where: str) -> None:
    terms = block["terms"]
    expect(
        isinstance(terms, list) and all(is_texts(pair) and len(pair) == 2 for pair in terms),
        where,
        "'terms' must be a list of [term, meaning]",
    )


def check_series(block: Block, where: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    series = block["series"]
    expect(isinstance(series, list) and bool(series), where, "'series' must be a list of at least one")
    for number, item in enumerate(series, 1):
        expect(
            isinstance(item, dict) and isinstance(item.get("name"), str) and all(key in item for key in keys),
            where,
            f"series {number} must have name, {', '.join(keys)}",
        )
    return list(series)


def check_lines(block: Block, where: str) -> None:
    for item in check_series(block, where, ("x", "y")):
        name = f"series '{item['name']}'"
        for key in ("x", "y", "lower", "upper"):
            values = item.get(key)
            if values is None and key in ("lower", "upper"):
                continue
            expect(
                isinstance(values, list) and all(value is None or is_number(value) for value in values),
                where,
                f"{name}: '{key}' must be a list of finite numbers (null where there is none)",
            )
            expect(len(item[key]) == len(item["x"]), where, f"{name}: '{key}' is not as long as 'x'")
        expect(all(value is not None for value in item["x"]), where, f"{name}: 'x' holds null")
        for axis, keys in (("x", ("x",)), ("y", ("y", "lower", "upper"))):
            if block.get(f"log_{axis}"):
                values = [value for key in keys for value in item.get(key) or [] if value is not None]
                expect(
                    all(value > 0 for value in values),
                    where,
                    f"{name}: a logarithmic {axis} axis shows positive numbers only",
                )


def check_bars(block: Block, where: str) -> None:
    expect(
        is_texts(block["categories"]) and bool(block["categories"]),
        where,
        "'categories' must be a list of names",
    )
    count = len(block["categories"])
    for item in check_series(block, where, ("values",)):
        name = f"series '{item['name']}'"
        values, intervals = item["values"], item.get("intervals") or [None] * count
        expect(
            isinstance(values, list) and all(value is None or is_number(value) for value in values),
            where,
            f"{name}: 'values' must be finite numbers or null",
        )
        expect(
            isinstance(intervals, list)
            and all(
                pair is None or (isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)))
                for pair in intervals
            ),
            where,
            f"{name}: 'intervals' must be [low, high] or null",
        )
        expect(
            len(values) == count and len(intervals) == count,
            where,
            f"{name}: {count} categories need as many values and intervals",
        )


def check_heatmap(block: Block, where: str) -> None:
    expect(
        is_texts(block["rows"]) and is_texts(block["columns"]),
        where,
        "'rows' and 'columns' must be lists of names",
    )
    shape = (len(block["rows"]), len(block["columns"]))
    expect(all(shape), where, "a heatmap needs a row and a column")
    values = block["values"]
    expect(
        isinstance(values, list)
        and len(values) == shape[0]
        and all(isinstance(row, list) and len(row) == shape[1] for row in values),
        where,
        f"'values' must be {shape[0]} rows of {shape[1]}",
    )
    expect(
        all(value is None or is_number(value) for row in values for value in row),
        where,
        "'values' must be finite numbers or null",
    )


def check_samples(block: Block, where: str) -> None:
    samples = block["samples"]
    expect(isinstance(samples, list), where, "'samples' must be a list")
    for number, sample in enumerate(samples, 1):
        here = f"sample {number}"
        expect(
            isinstance(sample, dict)
            and all(isinstance(sample.get(key, ""), str) for key in ("title", "language", "answer", "note"))
            and isinstance(sample.get("right", False), bool),
            where,
            f"{here} must be an object; title, language, answer and note are text, right is true or false",
        )
        expect(
            isinstance(sample.get("text"), str) != isinstance(sample.get("messages"), list),
            where,
            f"{here} must have either 'text' or 'messages'",
        )
        for message in sample.get("messages") or []:
            expect(
                isinstance(message, dict)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str),
                where,
                f"{here}: a message needs role and content",
            )
            if message["role"] not in ROLES:
                raise UserError(
                    f"{here}: unknown role '{message['role']}'",
                    where=where,
                    hint=did_you_mean(message["role"], ROLES),
                )


CHECKS: dict[str, Callable[[Block, str], None]] = {
    "table": check_table,
    "terms": check_terms,
    "lines": check_lines,
    "bars": check_bars,
    "heatmap": check_heatmap,
    "samples": check_samples,
}
