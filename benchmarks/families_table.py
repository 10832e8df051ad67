"""Tables of benchmarks/families.py in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

EXPECTED: dict[tuple[str, str], float] = {
    ("training 512", "transformers"): 1.3,
    ("training 8192", "transformers"): 2.0,
    ("training 512", "litgpt"): 1.1,
    ("training 8192", "litgpt"): 1.1,
    ("decoding 1x512", "transformers"): 1.5,
    ("decoding 8x2048", "transformers"): 3.0,
    ("decoding 1x512", "llama_cpp"): 1.0,
    ("decoding 8x2048", "llama_server"): 1.2,
}
"""Goals set before the measurement: the peer's time over ours."""
NAMES = {"llama_cpp": "llama.cpp", "llama_server": "llama.cpp's server", "ours": "Koine"}
COMPARED = [
    "model",
    "case",
    "dtype",
    "peer",
    "ours, tokens/s",
    "peer, tokens/s",
    "ratio (spread)",
    "expected",
]


def table(result: dict[str, Any]) -> str:
    """Return one Markdown table a part, with the machine and the versions above them."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{machine['processor']}, {machine['threads']} threads. {versions}.", ""]
    if result["quick"]:
        lines += ["Tiny models: the figures mean nothing.", ""]
    rows = result["rows"]
    for part, title, share in (
        ("training", "Training step", "share of the matmul ceiling, ours / peer"),
        ("decoding", "Decoding", "share of the memory rate, ours / peer"),
    ):
        chosen = {key: row for key, row in rows.items() if key.startswith(part)}
        if chosen:
            body = (line for key, row in chosen.items() for line in compared_rows(key, row))
            lines += [f"## {title}", "", *markdown([*COMPARED, share, "peak memory, ours / peer"], body), ""]
    loading = {key: row for key, row in rows.items() if key.startswith("loading")}
    if loading:
        head = ["model", "side", "file", "import", "load", "first logits after", "peak over file", "limit"]
        body = (line for key, row in loading.items() for line in loading_rows(key, row))
        lines += ["## Loading", "", *markdown(head, body), ""]
    upcycling = {key: row for key, row in rows.items() if key.startswith("upcycling")}
    if upcycling:
        head = ["model", "seconds", "over a copy of the branches", "over a copy of the result", "peak memory"]
        body = (upcycling_row(key, row) for key, row in upcycling.items())
        lines += ["## Upcycling", "", *markdown(head, body), ""]
    return "\n".join(lines)


def markdown(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def compared_rows(key: str, row: dict[str, Any]) -> Iterable[list[str]]:
    """Yield a line for each peer of a case."""
    part, model, case, dtype = key.split()
    rates, ways = row.get("tokens_per_second", {}), row.get("way") or row.get("configuration") or {}
    for peer in (name for name in row["tried"] if name != "ours"):
        if peer not in rates:
            reason = next((one["failed"] for one in row["tried"][peer] if "failed" in one), "not tried")
            yield [model, case, dtype, NAMES.get(peer, peer), "", f"failed: {reason[:80]}", "", "", "", ""]
    if "ours" not in rates:
        reason = next((one["failed"] for one in row["tried"]["ours"] if "failed" in one), "not tried")
        yield [model, case, dtype, "", f"failed: {reason[:80]}", "", "", "", "", ""]
        return
    for peer, (median, low, high) in row["ratio"].items():
        expected = EXPECTED.get((f"{part} {case}", peer))
        share, memory = row["share_of_ceiling"], row["peak_memory_bytes"]
        yield [
            model,
            case,
            dtype,
            NAMES.get(peer, peer),
            with_way(rates["ours"], ways.get("ours")),
            with_way(rates[peer], ways.get(peer)),
            f"**{median:.2f}** ({low:.2f}–{high:.2f})",
            "" if expected is None else f"{expected}",
            f"{share['ours']:.0%} / {share[peer]:.0%}",
            f"{memory['ours'] / 1e6:,.0f} / {memory[peer] / 1e6:,.0f} MB",
        ]


def with_way(rate: float, way: str | None) -> str:
    """Return tokens a second and how the side ran."""
    return f"{rate:,.0f} ({way})" if way else f"{rate:,.0f}"


def loading_rows(key: str, row: dict[str, Any]) -> Iterable[list[str]]:
    """Yield a line for each side."""
    model, size = key.split()[1], f"{row['file_bytes'] / 1e6:,.0f} MB"
    for name, side in row["sides"].items():
        start = [model, NAMES.get(name, name), size]
        if "failed" in side:
            yield [*start, f"failed: {side['failed'][:80]}", "", "", "", ""]
            continue
        limit = "1.15" if name == "ours" else ""
        seconds = [side["import_seconds"], side["seconds"], side["first_logits_seconds"]]
        yield [*start, *(f"{one:.2f} s" for one in seconds), f"{side['peak_over_file']:.2f}", limit]


def upcycling_row(key: str, row: dict[str, Any]) -> list[str]:
    """Return the line of a model."""
    model, ours = key.split()[1], row["sides"]["ours"]
    if "failed" in ours:
        return [model, f"failed: {ours['failed'][:80]}", "", "", ""]
    ratios = [
        f"**{median:.2f}** ({low:.2f}–{high:.2f})"
        for median, low, high in (row["time_over_copy"][name] for name in ("copy_inputs", "copy_output"))
    ]
    return [model, f"{ours['seconds']:.1f} s", *ratios, f"{ours['peak_growth_bytes'] / 1e6:,.0f} MB"]
