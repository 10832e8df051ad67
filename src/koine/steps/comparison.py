"""The steps that compare models: on several domains, and at several context lengths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koine.files import read_json, write_json
from koine.plan import step
from koine.steps import estimates
from koine.steps.corpus_files import write_step_report


@step(version="2", estimate=estimates.comparison, formerly=("koine.recipes.domains:compare_domains",))
def compare_domains(evaluations: dict[str, Path], *, out: Path) -> None:
    """Compare the models' bits per byte, domain by domain; write `results.json` and a report."""
    read = {name: read_json(path / "evaluation.json") for name, path in evaluations.items()}
    domains = list(next(iter(read.values()))["bits_per_byte"])
    rows = [
        [name, *(round(one["bits_per_byte"][domain], 4) for domain in domains), round(one["mean"], 4)]
        for name, one in read.items()
    ]
    write_json(out / "results.json", read)
    best = min(read, key=lambda name: float(read[name]["mean"]))
    first = next(iter(read))
    write_step_report(
        out,
        "Bits per byte and routing",
        [
            {
                "kind": "verdict",
                "title": f"Best over all domains: {best}",
                "text": f"{read[best]['mean']:.4f} bits per byte, the mean over {len(domains)} domains; "
                f"{first}: {read[first]['mean']:.4f}.",
            },
            {
                "kind": "table",
                "title": "Held-out text, domain by domain",
                "columns": ["model", *domains, "mean"],
                "rows": rows,
            },
            {
                "kind": "bars",
                "categories": domains,
                "series": [
                    {"name": name, "values": [one["bits_per_byte"][domain] for domain in domains]}
                    for name, one in read.items()
                ],
                "x_label": "domain",
                "y_label": "bits per byte",
            },
            *last_routing(read),
        ],
    )


def last_routing(read: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a heat map of the last mixture's expert assignments by domain; empty if all models are dense."""
    mixtures = [(name, one["routing"]) for name, one in read.items() if one["routing"]]
    if not mixtures:
        return []
    name, routing = mixtures[-1]
    experts = list(next(iter(routing.values()))["chosen"])
    return [
        {
            "kind": "heatmap",
            "title": f"Tokens by domain and expert: {name}",
            "label": "share",
            "rows": list(routing),
            "columns": experts,
            "values": [[shares["chosen"][expert] for expert in experts] for shares in routing.values()],
        }
    ]


@step(version="2", estimate=estimates.comparison, formerly=("koine.recipes.lengths:compare_lengths",))
def compare_lengths(evaluations: dict[str, Path], *, lengths: tuple[int, ...], out: Path) -> None:
    """Compare bits per byte by stage and context length; write `results.json` and a report.

    The gain of a stage is the bits per byte at the shortest length minus those at the longest.
    """
    read = {stage: read_json(folder / "evaluation.json") for stage, folder in evaluations.items()}
    values = {
        stage: {length: found["lengths"][str(length)]["bits_per_byte"] for length in lengths}
        for stage, found in read.items()
    }
    gain = {stage: row[lengths[0]] - row[lengths[-1]] for stage, row in values.items()}
    any_of = next(iter(read.values()))
    write_json(
        out / "results.json",
        {"bits_per_byte": values, "gain": gain, "documents": any_of["documents"], "evaluations": read},
    )
    last = list(values)[-1]
    write_json(out / "metrics.json", {"gain_of_the_longest": gain[last]})
    names = {stage: f"after {int(stage):,}" if stage.isdecimal() else stage for stage in values}
    blocks: list[dict[str, Any]] = [
        {
            "kind": "text",
            "text": f"{any_of['documents']} held-out documents of {any_of['shortest']:,} to "
            f"{any_of['longest']:,} tokens, each scored completely with the column's context length. "
            "Lengths beyond a document's own change nothing.",
        },
        {
            "kind": "table",
            "title": "Bits per byte by context length",
            "columns": ["model", *(f"{length:,}" for length in lengths), "gain of the longest"],
            "rows": [
                [names[stage], *(round(row[length], 4) for length in lengths), round(gain[stage], 4)]
                for stage, row in values.items()
            ],
        },
        {
            "kind": "bars",
            "title": "Bits per byte by context length",
            "categories": [f"{length:,}" for length in lengths],
            "series": [
                {"name": names[stage], "values": [row[length] for length in lengths]}
                for stage, row in values.items()
            ],
            "x_label": "context length, tokens",
            "y_label": "bits per byte",
        },
    ]
    write_step_report(out, "Context extension", blocks)
