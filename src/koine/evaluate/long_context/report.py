"""Report blocks of the long-context suite's results (see `koine.plan.report.blocks`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Result = Mapping[str, Any]
Block = dict[str, Any]
_MANY_LAYERS = 16
ENTROPIES = {
    "entropy_of_rows": "mean of the rows' entropies",
    "entropy_of_mean_row": "entropy of the mean row",
}


def sections(result: Result) -> list[tuple[str, list[Block]]]:
    """Return titled sections of report blocks."""
    found = [
        ("Needle in a haystack: depth by length", grid_blocks(result)),
        ("By length", length_blocks(result)),
        ("Loss per position", position_blocks(result)),
        ("Attention when answering", attention_blocks(result)),
        ("Examples", example_blocks(result)),
    ]
    return [(title, blocks) for title, blocks in found if blocks]


def facts(result: Result) -> list[tuple[str, str]]:
    """Return names and values for the head of the page."""
    settings = result["settings"]
    hay = settings["haystack"]
    return [
        ("Lengths", ", ".join(f"{length:,}" for length in settings["lengths"])),
        ("Depths", ", ".join(f"{depth:g} %" for depth in settings["depths"])),
        ("Language", settings["language"]),
        ("Haystack", f"{hay['source']} ({hay['tokens']:,} tokens)"),
        ("Seed", str(settings["seed"])),
    ]


def grid_blocks(result: Result) -> list[Block]:
    """Return two heat maps a task: score, and log-probability, which ranks small models better."""
    blocks = []
    for task, grid in result["grid"].items():
        for name, label in (
            ("score", "share of the answer found"),
            ("logprob", "log-probability of the right answer, nats a token"),
        ):
            blocks.append(
                {
                    "kind": "heatmap",
                    "title": f"{task}: {label}",
                    "label": label if name == "score" else "nats a token",
                    "rows": [f"{depth:g} %" for depth in grid["depths"]],
                    "columns": [f"{length:,}" for length in grid["lengths"]],
                    "values": grid[name],
                }
            )
    return blocks


def length_blocks(result: Result) -> list[Block]:
    """Return curves by length, and the table of all tasks."""
    tasks = result["tasks"]
    if not tasks:
        return []
    blocks: list[Block] = []
    if len(result["settings"]["lengths"]) > 1:
        groups = result["groups"]
        if groups:
            blocks.append(
                _curves(
                    "Score by length",
                    "share of the answers found",
                    {group: list(values.items()) for group, values in groups.items()},
                )
            )
        blocks.append(
            _curves(
                "Log-probability of the right answers by length",
                "nats a token",
                {
                    task: points
                    for task, lengths in tasks.items()
                    if (
                        points := [
                            (length, one["logprob"]) for length, one in lengths.items() if one["samples"]
                        ]
                    )
                },
            )
        )
    blocks.append(
        {
            "kind": "table",
            "title": "All tasks",
            "caption": "score: share of the expected strings in the greedy output; "
            "exact: every token of the right answer is the argmax; "
            "log-probability: of the right answer, nats a token.",
            "columns": list(TASK_COLUMNS),
            "rows": task_rows(result),
        }
    )
    return blocks


TASK_COLUMNS = ("task", "length", "score", "95 % interval", "exact", "log-probability", "prompts")


def task_rows(result: Result) -> list[list[str]]:
    """Return a row for each task and length that was run."""
    return [
        [
            task,
            f"{int(length):,}",
            f"{entry['value']:.1%}",
            "–" if entry["interval"] is None else " – ".join(f"{end:.1%}" for end in entry["interval"]),
            f"{entry['exact']:.1%}",
            f"{entry['logprob']:.3f}",
            str(entry["samples"]),
        ]
        for task, lengths in result["tasks"].items()
        for length, entry in lengths.items()
        if entry["samples"]
    ]


def _curves(title: str, label: str, series: Mapping[str, list[tuple[str, float]]]) -> Block:
    return {
        "kind": "lines",
        "title": title,
        "x_label": "tokens",
        "y_label": label,
        "log_x": True,
        "series": [
            {"name": name, "x": [int(x) for x, _ in points], "y": [y for _, y in points]}
            for name, points in series.items()
        ],
    }


def position_blocks(result: Result) -> list[Block]:
    """Return curves of nats per token and bits per byte by position."""
    positions = result.get("positions")
    if positions is None:
        return []
    bins = positions["bins"]
    middles = [(one["start"] + one["end"]) / 2 for one in bins]
    joined = "short texts, joined" if positions["joined"] else "texts of at least this length"
    nats: dict[str, Any] = {"name": "", "x": middles, "y": [one["nats_per_token"] for one in bins]}
    if all(one["interval"] is not None for one in bins):
        nats["lower"], nats["upper"] = ([one["interval"][end] for one in bins] for end in (0, 1))
    bits = {"name": "", "x": middles, "y": [one["bits_per_byte"] for one in bins]}
    axes = {"kind": "lines", "x_label": "position (tokens)", "log_x": True}
    return [
        {
            **axes,
            "title": f"Loss by position ({positions['documents']} documents: {joined})",
            "y_label": "nats per token",
            "series": [nats],
        },
        {**axes, "title": "Bits per byte by position", "y_label": "bits per byte", "series": [bits]},
    ]


def attention_blocks(result: Result) -> list[Block]:
    """Return masses and entropies: by kind of layer and length, and by layer at the longest length."""
    attention = result.get("attention")
    if not attention:
        return []
    longest = max(attention, key=int)
    at = f"{int(longest):,} tokens"
    layers, kinds = attention[longest]["layers"], attention[longest]["kinds"]
    segments = list(layers[0]["mass"])
    names = [f"{number} · {layer['kind']}" for number, layer in enumerate(layers, 1)]
    masses = [[layer["mass"][segment] for segment in segments] for layer in layers]
    by_layer = f"Attention mass by layer, {at}"
    blocks: list[Block] = [
        {
            "kind": "table",
            "title": "Mean over heads, layers, rows and prompts",
            "caption": "Rows are the tokens of question and answer; the needle is at 50 %. "
            "Shares of the attention; entropies in bits.",
            "columns": ["length", "layers", *segments, *ENTROPIES.values()],
            "rows": attention_rows(result),
        },
        _bars(
            f"Attention mass by kind of layer, {at}",
            "share",
            list(kinds),
            {segment: [entry["mass"][segment] for entry in kinds.values()] for segment in segments},
        ),
    ]
    if len(layers) > _MANY_LAYERS:
        blocks.append(
            {
                "kind": "heatmap",
                "title": by_layer,
                "label": "share",
                "rows": names,
                "columns": segments,
                "values": masses,
            }
        )
    else:
        columns = {segment: [row[index] for row in masses] for index, segment in enumerate(segments)}
        blocks.append(_bars(by_layer, "share", names, columns))
    entropies = {label: [layer[name] for layer in layers] for name, label in ENTROPIES.items()}
    blocks.append(_bars(f"Attention entropy by layer, {at}", "bits", names, entropies))
    if len(attention) > 1:
        needle = {
            kind: [(length, entry["kinds"][kind]["mass"]["needle"]) for length, entry in attention.items()]
            for kind in kinds
        }
        blocks.append(_curves("Attention on the needle by length", "share", needle))
    return blocks


def _bars(title: str, label: str, categories: list[str], series: Mapping[str, list[float]]) -> Block:
    return {
        "kind": "bars",
        "title": title,
        "x_label": "",
        "y_label": label,
        "categories": categories,
        "series": [{"name": name, "values": values} for name, values in series.items()],
    }


def attention_rows(result: Result) -> list[list[str]]:
    """Return a row for each length and kind of layer, and for all layers."""
    rows = []
    for length, entry in result["attention"].items():
        kinds = {f"{kind} ({one['layers']})": one for kind, one in entry["kinds"].items()}
        for name, one in {**kinds, "all": entry["overall"]}.items():
            rows.append(
                [
                    f"{int(length):,}",
                    name,
                    *(f"{share:.4f}" for share in one["mass"].values()),
                    *(f"{one[entropy]:.2f}" for entropy in ENTROPIES),
                ]
            )
    return rows


def example_blocks(result: Result) -> list[Block]:
    """Return one prompt of each task, without its haystack."""
    samples = [
        {
            "title": f"{one['task']}, {one['length']:,} tokens, score {one['score']:.0%}",
            "text": "\n".join(
                [
                    *(f"… {needle} …" for needle in one["needles"]),
                    one["question"],
                    f"→ expected: {', '.join(one['expected'])}",
                    f"→ written: {one['written'].strip()}",
                ]
            ),
        }
        for one in result["examples"]
    ]
    return [{"kind": "samples", "samples": samples}] if samples else []
