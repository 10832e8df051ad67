"""Committed results of bam, nexus and merging: their tables are in the docs, their verdicts follow."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from experiments import register
from experiments.common.domains import DomainRuns
from experiments.common.hypotheses import verdict_markdown

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "experiments"
TABLES = {"bam": ("arm_table",), "nexus": ("arm_table",), "merging": ("domain_table", "language_table")}
HAVE_RESULTS = [name for name in TABLES if (EXPERIMENTS / name / "results" / "laptop.json").exists()]


def results_of(name: str) -> Any:
    return json.loads((EXPERIMENTS / name / "results" / "laptop.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", HAVE_RESULTS)
def test_the_manual_has_their_tables(name: str) -> None:
    page = (ROOT / "docs" / "explanation" / "combining.md").read_text(encoding="utf-8")
    results, plots = results_of(name), import_module(f"experiments.{name}.plots")
    assert verdict_markdown(results["hypotheses"]) in page
    for table in TABLES[name]:
        assert getattr(plots, table)(results) in page


@pytest.mark.parametrize("name", HAVE_RESULTS)
def test_the_verdicts_follow_from_the_runs(name: str) -> None:
    results = results_of(name)
    judge = import_module(f"experiments.{name}.judge")
    assert len(results["seeds"]) >= 3
    found = DomainRuns(results["runs"], range(len(results["seeds"])))
    if name == "bam":
        again = judge.verdicts(found, results["latency"])
    elif name == "nexus":
        budgets = sorted(
            {
                int(arm.split("-")[1].partition("/")[0])
                for arm in results["runs"]
                if arm[:6] == "nexus-" and arm[6] != "l"
            }
        )
        again = judge.verdicts(found, [steps for steps in budgets if steps])
    else:
        plan = import_module(f"experiments.{name}.plan")
        again = judge.verdicts(found, plan.DOMAINS, plan.CLUSTERS, plan.SHARED, ("small", "large"))
    assert {key: one["verdict"] for key, one in results["hypotheses"].items()} == {
        key: one["verdict"] for key, one in again.items()
    }


def test_the_register_is_in_the_manual() -> None:
    page = (ROOT / "docs" / "explanation" / "papers.md").read_text(encoding="utf-8")
    assert register.table() in page
    assert register.reviews() in page
