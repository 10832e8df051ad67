"""Tables of benchmarks/preference_step.py in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from families_table import markdown

EXPECTED = {"dpo natural": 2.5, "dpo half": 1.7, "dpo nothing": 1.3, "reward natural": 1.5}
"""Goals set before the measurement: TRL's time over ours."""
MEMORY_OVER_LANGUAGE_MODELLING = 1.1
"""Goal: our peak memory over that of language modelling on the same rows."""


def table(result: dict[str, Any]) -> str:
    """Return the tables, with the machine and the versions above them."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{machine['processor']}, {machine['threads']} threads. {versions}.", ""]
    if result["quick"]:
        lines += ["A tiny model: the figures mean nothing.", ""]
    speed = ["case", "ours, pairs/s", "TRL, pairs/s", "ratio (spread)", "expected"]
    speed += ["share of the matmul ceiling, ours / TRL", "difference of the first losses"]
    memory = ["case", "ours", "TRL", "language modelling, same rows", "ours over it", "expected"]
    lines += ["## Speed", "", *markdown(speed, speed_rows(result["rows"])), ""]
    lines += ["## Peak memory", "", *markdown(memory, memory_rows(result["rows"])), ""]
    return "\n".join(lines)


def speed_rows(rows: dict[str, Any]) -> Iterable[list[str]]:
    """Yield a line for each case."""
    for case, row in rows.items():
        differences = ", ".join(f"{value:.0e} ({dtype})" for dtype, value in row["loss_difference"].items())
        if "ratio" not in row:
            failed = {
                side: next((one["failed"] for one in found if "failed" in one), "")
                for side, found in row["tried"].items()
            }
            cells = [f"failed: {failed[side][:80]}" for side in ("ours", "trl")]
            yield [case, *cells, "", f"{EXPECTED[case]}", "", differences]
            continue
        median, low, high = row["ratio"]["trl"]
        rates, ways, share = row["pairs_per_second"], row["configuration"], row["share_of_ceiling"]
        yield [
            case,
            f"{rates['ours']:.1f} ({ways['ours']})",
            f"{rates['trl']:.1f} ({ways['trl']})",
            f"**{median:.2f}** ({low:.2f}–{high:.2f})",
            f"{EXPECTED[case]}",
            f"{share['ours']:.0%} / {share['trl']:.0%}",
            differences,
        ]


def memory_rows(rows: dict[str, Any]) -> Iterable[list[str]]:
    """Yield a line for each case that was measured."""
    for case, row in rows.items():
        language = row.get("language_modelling", {}).get("peak_memory_bytes")
        if "ratio" not in row or language is None:
            continue
        peak = row["peak_memory_bytes"]
        yield [
            case,
            *(f"{value / 1e6:,.0f} MB" for value in (peak["ours"], peak["trl"], language)),
            f"{peak['ours'] / language:.2f}",
            f"{MEMORY_OVER_LANGUAGE_MODELLING}",
        ]
