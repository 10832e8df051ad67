"""One verdict a hypothesis, by the rules that EXPECTED.md set before the first run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common.domains import DomainRuns
from experiments.common.hypotheses import above, combine_verdicts, differences, hypothesis, verdict_blocks
from koine.files import write_json
from koine.plan import step
from koine.steps import estimates

NEW = "code"
Values = list[float]


def verdicts(found: DomainRuns, budgets: Sequence[int]) -> dict[str, Any]:
    """Judge NX1 to NX4; budgets: steps of the extension."""
    known = {arm: found.bits(arm, without=(NEW,)) for arm in ("nexus", "linear", "nexus-low", "linear-low")}
    nx1 = {"linear less Nexus": differences(known["linear"], known["nexus"])}
    nx2 = {
        f"linear less Nexus on code after {steps} steps": differences(
            found.bits(f"linear-{steps}", [NEW]), found.bits(f"nexus-{steps}", [NEW])
        )
        for steps in budgets
    }
    lost = differences(known["linear-low"], known["linear"])
    nx3 = {
        "what linear loses": lost,
        "how much more than Nexus": differences(lost, differences(known["nexus-low"], known["nexus"])),
    }
    nx4 = {"average less seed": differences(found.bits("average"), found.bits("seed"))}
    return {
        "NX1": hypothesis(
            above(nx1["linear less Nexus"]),
            nx1,
            "+3.2 %, +1.6 % relative",
            "Nexus better than a linear router",
        ),
        "NX2": hypothesis(
            combine_verdicts(map(above, nx2.values())),
            nx2,
            "+18.4 / 6.2 / 18.8 % relative",
            "a router that is not reset learns the new domain sooner",
        ),
        "NX3": hypothesis(
            combine_verdicts(map(above, nx3.values())),
            nx3,
            "about 2 % against about 0",
            "only the linear router needs the balance loss",
        ),
        "NX4": hypothesis(
            above(nx4["average less seed"]),
            nx4,
            "35.5 < 36.4; 43.3 < 47.1",
            "an average of experts is worse than their seed",
        ),
    }


@step(version="1", estimate=estimates.comparison)
def judge(
    evaluations: dict[str, Path], *, scale: str, seeds: int, budgets: tuple[int, ...], out: Path
) -> None:
    """Write results.json (every seed, one verdict a hypothesis) and the report."""
    found = DomainRuns.read(evaluations, seeds)
    hypotheses = verdicts(found, budgets)
    own = {
        f"{kind}, {steps} steps": found.share(f"{kind}-{steps}", NEW, NEW)
        for kind in ("nexus", "linear")
        for steps in (0, *budgets)
    }
    write_json(
        out / "results.json",
        {
            "experiment": "nexus",
            "scale": scale,
            "seeds": list(range(seeds)),
            "hypotheses": hypotheses,
            "share_of_new_tokens_to_the_new_expert": own,
            "runs": found.evaluations,
        },
    )
    write_json(
        out / "report.json",
        {
            "title": "Nexus: verdicts",
            "blocks": [
                *verdict_blocks(hypotheses),
                {
                    "kind": "table",
                    "title": "Share of the new domain's tokens that goes to its expert",
                    "columns": ["", "mean over seeds"],
                    "rows": [[name, round(statistics.mean(values), 3)] for name, values in own.items()],
                },
            ],
        },
    )
