"""Print measures of tokenizers as tables in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koine.terminal import plain_console


def show_measures(result: dict[str, dict[str, Any]]) -> None:
    """Print the means over languages, then bytes per token of each language; a column per tokenizer.

    Tokenizers that do not fit the terminal's width go into further tables.
    """
    from rich.table import Table

    from koine.tokenizer.comparison import is_group, table

    console = plain_console()
    names = short_names(list(result))
    columns, rows = table(result)
    by_measure = list(zip(columns[1:], *(row[1:] for row in rows), strict=True))
    codes = [code for code in next(iter(result.values())) if not is_group(code)]
    with_parity = any("parity" in rows_of[code] for rows_of in result.values() for code in codes)

    def cell(name: str, code: str) -> str:
        parity = result[name][code].get("parity")
        return f"{result[name][code]['bytes_per_token']:.2f}" + ("" if parity is None else f" ({parity:.2f})")

    widest = max((len(name) for name in columns), default=0)
    column = min(24, max(12, *map(len, names.values())))
    most = max(1, (console.width - widest - 5) // (column + 3))
    for start in range(0, len(result), most):
        shown = list(result)[start : start + most]
        overall = Table()
        overall.add_column("measure", no_wrap=True)
        by_language = Table()
        by_language.add_column("language")
        for name in shown:
            for one in (overall, by_language):
                one.add_column(names[name], justify="right", overflow="fold", max_width=column)
        for measure_name, *values in by_measure:
            overall.add_row(measure_name, *values[start : start + most])
        for code in codes:
            by_language.add_row(code, *(cell(name, code) for name in shown))
        # As lines: a table breaks its title at its own width.
        console.print("means over languages")
        console.print(overall)
        console.print("bytes per token" + (" (parity with English)" if with_parity else ""))
        console.print(by_language)


def short_names(paths: list[str]) -> dict[str, str]:
    """Return the shortest endings of paths that are all different."""
    longest = max(len(Path(path).parts) for path in paths)
    for count in range(1, longest + 1):
        names = {path: str(Path(*Path(path).parts[-count:])) for path in paths}
        if len(set(names.values())) == len(paths):
            break
    return names
