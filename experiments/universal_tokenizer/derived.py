"""Values that docs/explanation/universal-tokenizer.md states beside the verdicts; no verdict depends on them.

python -m experiments.universal_tokenizer.derived experiments/universal_tokenizer/results/laptop.json
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from experiments.common.hypotheses import interval
from koine.files import read_json

PRIMARY_SHARE = 0.2
"""Share of primary languages in the tokens of continued pretraining, as in plan.py."""
FORGETTING = (
    ("continued", "universal"),
    ("continued", "universal-5"),
    ("continued", "cluster"),
    ("chats", "universal"),
    ("chats", "cluster"),
)


def value(results: dict[str, Any], run: str, seed: int, codes: list[str], *, first: bool = False) -> float:
    """Return the mean bits per byte over languages at the last evaluation of a run, or at the first."""
    tracked = results["runs"][f"{run}/{seed}"]
    place = (min if first else max)(tracked, key=int)
    return float(statistics.mean(tracked[place][code] for code in codes))


def chats_gap(results: dict[str, Any], *, first: bool) -> list[float]:
    """Return UT3's Universal minus Cluster by seed, before the first step or after the last."""
    codes = results["languages"]["chats"]
    return [
        value(results, "chats/universal", seed, codes, first=first)
        - value(results, "chats/cluster", seed, codes, first=first)
        for seed in results["seeds"]
    ]


def five_percent_cost(results: dict[str, Any]) -> list[float]:
    """Return UT2 for the 5 % arm, by seed (three, not five): primary languages, minus Cluster."""
    codes = results["languages"]["primary"]
    return [
        value(results, "pretrained/universal-5", seed, codes)
        - value(results, "pretrained/cluster", seed, codes)
        for seed in results["seeds"]
    ]


def text_of_a_step(results: dict[str, Any]) -> dict[str, float]:
    """Return the text in a step of continued pretraining, Universal over Cluster: expanded, and all.

    The primary part is estimated from held-out bytes per token, in equal parts.
    """
    tokens, codes = results["bytes_per_token"], results["languages"]["primary"]
    expanded = results["training_bytes_per_token"]
    every = {
        kind: (1 - PRIMARY_SHARE) * expanded[kind]
        + PRIMARY_SHARE * statistics.mean(tokens[kind][code] for code in codes)
        for kind in ("universal", "cluster")
    }
    return {
        "expanded": expanded["universal"] / expanded["cluster"],
        "all": every["universal"] / every["cluster"],
    }


def better_languages(results: dict[str, Any]) -> dict[str, int]:
    """Return the number of languages that bucketed weights improve (UT8), by reading of the bucket's mass."""
    codes = results["languages"]["primary"] + results["languages"]["expanded"]

    def mean(arm: str, code: str) -> float:
        return statistics.mean(value(results, f"continued/{arm}", seed, [code]) for seed in results["seeds"])

    return {
        mass: sum(mean(arm, code) < mean("uniform", code) for code in codes)
        for mass, arm in (("uniform", "universal"), ("data", "data-mass"))
    }


def forgetting(results: dict[str, Any]) -> str:
    """Losses of the primary languages during adaptation as a Markdown table.

    Also in docs/explanation/universal-tokenizer.md.
    """
    codes = results["languages"]["primary"]
    names = {"universal": "Universal, 0 %", "universal-5": "Universal, 5 %", "cluster": "Cluster"}
    kinds = {"continued": "continued pretraining, 20 % primary text", "chats": "fine-tuning on chats alone"}
    lines = [
        "| adaptation | arm | before | after | change (95 % interval) |",
        "|---|---|---|---|---|",
    ]
    for kind, arm in FORGETTING:
        before, after = (
            [value(results, f"{kind}/{arm}", seed, codes, first=first) for seed in results["seeds"]]
            for first in (True, False)
        )
        change = [late - early for early, late in zip(before, after, strict=True)]
        low, high = interval(change)
        lines.append(
            f"| {kinds[kind]} | {names[arm]} | {statistics.mean(before):.3f} | {statistics.mean(after):.3f} "
            f"| {statistics.mean(change):+.3f} ({low:+.3f} to {high:+.3f}) |"
        )
    return "\n".join(lines) + "\n"


def statements(results: dict[str, Any]) -> dict[str, str]:
    """Return the phrases of docs/explanation/universal-tokenizer.md that have a derived number."""

    def spread(values: list[float]) -> str:
        low, high = interval(values)
        return f"{statistics.mean(values):+.3f} ({low:+.3f} to {high:+.3f})"

    per_step = results["hypotheses"]["UT5"]["measured"]
    step, better = text_of_a_step(results), better_languages(results)
    return {
        "gap before": f"before any step {spread(chats_gap(results, first=True))}, "
        f"after the last {spread(chats_gap(results, first=False))}",
        "five": spread(five_percent_cost(results)),
        "step": f"{step['expanded']:.2f} times as much expanded text and, with the primary fifth, "
        f"{step['all']:.2f} times as much text in all",
        "bytes": f"{1 / results['hypotheses']['UT5']['per_byte']['measured']:.2f} of the expanded bytes "
        f"and {step['all'] / per_step:.2f} of all bytes",
        "better": f"{better['uniform']} of 26 languages under one reading of the bucket's mass "
        f"and {better['data']} of 26 under the other",
    }


def main() -> None:
    results = read_json(Path(sys.argv[1]))
    for name, text in statements(results).items():
        print(f"{name}: {text}")
    print(forgetting(results))


if __name__ == "__main__":
    main()
