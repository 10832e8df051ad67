"""Nexus: verdicts on made-up measures."""

from __future__ import annotations

from experiments.nexus.judge import verdicts
from tests.experiments.made_up_runs import Bits, made_up_runs

NEXUS: Bits = {
    "seed": {"general": 2.0, "code": 3.0},
    "average": {"general": 2.2, "code": 3.2},
    "nexus": {"general": 1.80, "code": 3.0},
    "linear": {"general": 1.85, "code": 3.0},
    "nexus-low": {"general": 1.80, "code": 3.0},
    "linear-low": {"general": 1.95, "code": 3.0},
    "nexus-20": {"general": 1.9, "code": 2.0},
    "linear-20": {"general": 1.9, "code": 2.3},
}


def test_verdicts() -> None:
    found = verdicts(made_up_runs(NEXUS), (20,))
    assert {one["verdict"] for one in found.values()} == {"reproduced"}
    reverse: Bits = NEXUS | {
        "nexus": NEXUS["linear"],
        "linear": NEXUS["nexus"],
        "nexus-20": NEXUS["linear-20"],
        "linear-20": NEXUS["nexus-20"],
        "linear-low": NEXUS["nexus-low"],
        "average": NEXUS["seed"] | {"general": 1.5},
    }
    found = verdicts(made_up_runs(reverse), (20,))
    assert [found[name]["verdict"] for name in ("NX1", "NX2", "NX4")] == ["not reproduced"] * 3
    assert found["NX3"]["verdict"] != "reproduced"
