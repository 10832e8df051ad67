"""One verdict a hypothesis, by the rules that EXPECTED.md set before the first run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.common.domains import DomainRuns
from experiments.common.hypotheses import above, combine_verdicts, differences, hypothesis, verdict_blocks
from koine.files import read_json, write_json
from koine.plan import step
from koine.steps import estimates

TIE = 0.01
"""Bits per byte by which top-k routing may be below BTX without counting as a gain."""

Values = list[float]


def verdicts(found: DomainRuns, seconds: Mapping[str, Values]) -> dict[str, Any]:
    """Judge BM1 to BM4; seconds: latency by arm, one value a seed."""
    bm1 = {
        f"BTX less {arm}": differences(found.mean("btx"), found.mean(arm))
        for arm in ("bam", "bam-shared", "bam-flops", "bam-shared-flops", "bam-seconds", "bam-shared-seconds")
    }
    soft = {
        f"{arm} less soft": differences(found.mean(arm), found.mean("bam-shared"))
        for arm in ("shared-top-2", "shared-top-1")
    }
    gain = {
        f"{arm} less BTX": differences(found.mean(arm), found.mean("btx"))
        for arm in ("shared-top-2", "shared-top-1")
    }
    bm3 = {
        "BTX(6, top-3) less BAM": differences(found.mean("btx-6-top-3"), found.mean("bam")),
        "BTX(6, top-1) less BTX": differences(found.mean("btx-6"), found.mean("btx")),
    }

    def ratio(first: str, second: str) -> Values:
        return [math.log(a / b) for a, b in zip(seconds[first], seconds[second], strict=True)]

    bm4 = {
        "log of shared over BTX": ratio("bam-shared", "btx"),
        "log of own over shared": ratio("bam", "bam-shared"),
    }
    return {
        "BM1": hypothesis(
            combine_verdicts(map(above, bm1.values())),
            bm1,
            "perplexity 10.72; DM 9.70 / 10.32, CM 10.00 / 10.46",
            "BAM better with equal data and with equal compute",
        ),
        "BM2": hypothesis(
            combine_verdicts(
                [*map(above, soft.values()), *(above(values, -TIE) for values in gain.values())]
            ),
            {**soft, **gain},
            "10.47 / 10.72 / 10.81; BTX 10.72",
            "soft best, top-k no gain over BTX",
        ),
        "BM3": hypothesis(
            combine_verdicts(map(above, bm3.values())),
            bm3,
            "5.09 against 4.93; 5.71 against 5.39",
            "more feed-forward experts do not make up for attention experts",
        ),
        "BM4": hypothesis(
            combine_verdicts(map(above, bm4.values())),
            bm4,
            "4.81 / 5.96 / 6.17 s",
            "BTX, then shared keys, then own",
        ),
    }


@step(version="1", estimate=estimates.comparison)
def judge(
    evaluations: dict[str, Path],
    latencies: list[Path],
    *,
    scale: str,
    seeds: int,
    out: Path,
) -> None:
    """Write results.json (every seed, one verdict a hypothesis) and the report."""
    found = DomainRuns.read(evaluations, seeds)
    read = [read_json(path / "latency.json") for path in latencies]
    seconds = {arm: [one[arm] for one in read] for arm in read[0]}
    hypotheses = verdicts(found, seconds)
    write_json(
        out / "results.json",
        {
            "experiment": "bam",
            "scale": scale,
            "seeds": list(range(seeds)),
            "hypotheses": hypotheses,
            "latency": seconds,
            "runs": found.evaluations,
        },
    )
    write_json(out / "report.json", {"title": "BAM: verdicts", "blocks": verdict_blocks(hypotheses)})
