"""One verdict a hypothesis, by the rules that EXPECTED.md set before the first run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common.domains import DomainRuns
from experiments.common.hypotheses import (
    above,
    below,
    combine_verdicts,
    differences,
    hypothesis,
    verdict_blocks,
)
from koine.files import write_json
from koine.plan import step
from koine.steps import estimates

LOSS = 0.025
"""Relative loss that counts as small."""
TIE = 0.01
"""Bits per byte by which a complex method may be better without counting as a gain."""

Values = list[float]


def verdicts(
    found: DomainRuns,
    domains: Sequence[str],
    clusters: Mapping[str, Sequence[str]],
    shared: Sequence[str],
    sizes: Sequence[str],
) -> dict[str, Any]:
    """Judge CA2 to CA4 and AE3.

    clusters: languages by cluster, without the shared ones. sizes: names of the small and the large models.
    """
    own = {domain: found.bits(f"expert-{domain}", [domain]) for domain in domains}
    merged = {domain: found.bits("linear", [domain]) for domain in domains}
    touched = {domain: found.bits("touched-up", [domain]) for domain in domains}
    ca2 = {
        "relative loss": [
            statistics.mean(merged[domain][seed] / own[domain][seed] - 1.0 for domain in domains)
            for seed in found.seeds
        ]
    }
    linear = found.bits("linear", domains)
    pair = ("code", "maths")
    ca3 = {
        **{
            f"linear less {arm}": differences(linear, found.bits(arm, domains))
            for arm in ("task-arithmetic", "ties", "dare-ties", "model-stock")
        },
        "linear less slerp, of two": differences(
            found.bits("linear-pair", pair), found.bits("slerp-pair", pair)
        ),
    }
    ca4 = {
        "share of domains": [
            statistics.mean(float(touched[domain][seed] <= own[domain][seed]) for domain in domains)
            for seed in found.seeds
        ],
        "merge less touched-up, bits per byte": differences(linear, found.bits("touched-up", domains)),
    }
    return {
        "CA2": hypothesis(
            below(ca2["relative loss"], LOSS),
            ca2,
            "-1.8 % mean, most within 2.5 %",
            "a linear soup keeps what its experts know",
        ),
        "CA3": hypothesis(
            combine_verdicts(below(values, TIE) for values in ca3.values()),
            ca3,
            "no significant gain",
            "complex methods gain nothing",
        ),
        "CA4": hypothesis(
            above(ca4["share of domains"], 0.5),
            ca4,
            "many metrics at 100 % or more",
            "a few steps at a low rate bring back what was lost",
        ),
        "AE3": cluster_verdict(found, clusters, shared, sizes),
    }


def cluster_verdict(
    found: DomainRuns, clusters: Mapping[str, Sequence[str]], shared: Sequence[str], sizes: Sequence[str]
) -> dict[str, Any]:
    """Judge AE3: models of clusters of languages against their merge, at two sizes."""
    languages = [*shared, *(code for members in clusters.values() for code in members)]
    gains = {}
    single = {}
    for size in sizes:
        each = [found.bits(f"{size}-{name}", languages) for name in clusters]
        separate = [statistics.mean(values) for values in zip(*each, strict=True)]
        merged_clusters = found.bits(f"{size}-clusters", languages)
        gains[size] = differences(separate, merged_clusters)
        single[size] = differences(found.bits(f"{size}-languages", languages), merged_clusters)
    small, large = sizes
    ae3 = {
        **{f"clusters apart less merged, {size}": values for size, values in gains.items()},
        **{f"merge of languages less merge of clusters, {size}": values for size, values in single.items()},
        f"gain at {large} less gain at {small}": differences(gains[large], gains[small]),
    }
    return hypothesis(
        combine_verdicts(map(above, ae3.values())),
        ae3,
        "+5.1 points; three times at 32B",
        "clusters with shared languages merge well, the better the larger",
    )


@step(version="1", estimate=estimates.comparison)
def judge(
    evaluations: dict[str, Path],
    *,
    scale: str,
    seeds: int,
    domains: tuple[str, ...],
    clusters: tuple[tuple[str, ...], ...],
    shared: tuple[str, ...],
    sizes: tuple[str, ...],
    out: Path,
) -> None:
    """Write results.json (every seed, one verdict a hypothesis) and the report.

    clusters: of each the name, then the languages.
    """
    found = DomainRuns.read(evaluations, seeds)
    hypotheses = verdicts(found, domains, {name: members for name, *members in clusters}, shared, sizes)
    write_json(
        out / "results.json",
        {
            "experiment": "merging",
            "scale": scale,
            "seeds": list(range(seeds)),
            "hypotheses": hypotheses,
            "runs": found.evaluations,
        },
    )
    write_json(out / "report.json", {"title": "Merging: verdicts", "blocks": verdict_blocks(hypotheses)})
