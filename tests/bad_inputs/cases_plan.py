"""Bad inputs around plans: names, settings, folders, executors."""

from __future__ import annotations

from . import worlds
from .case import Case

PLAN = """\
from pathlib import Path

from koine.plan import Plan, step


@step(version="1")
def write(*, words: int, out: Path) -> None:
    if words < 0:
        raise ValueError("no such thing as a negative word")
    (out / "text.txt").write_text("word " * words)


def small(plan: Plan, *, words: int = 3) -> None:
    plan.step(write, name="text", words=words)
"""
WITH_PLAN = worlds.written("plans.py", PLAN)

CASES = (
    Case(
        mistake="a plan that does not exist",
        command="run quickstrat",
        says="unknown recipe 'quickstrat'; did you mean 'quickstart'?",
    ),
    Case(
        mistake="a file of plans that is not there",
        command="run plans.py:small",
        says="plans.py: no such plan file",
    ),
    Case(
        mistake="a file of plans without that function",
        command="run plans.py:smal",
        prepare=WITH_PLAN,
        says="plans.py:smal: no plan function 'smal'; did you mean 'small'?",
    ),
    Case(
        mistake="a file of plans that is not Python",
        command="run plans.py:small",
        prepare=worlds.written("plans.py", "def small(plan:\n"),
        says="plans.py:1: not valid Python ('(' was never closed); fix the plan file",
    ),
    Case(
        mistake="a setting with a typo",
        command="run plans.py:small --set wrods=4",
        prepare=WITH_PLAN,
        says="--set: unknown key 'wrods'; did you mean 'words'?",
    ),
    Case(
        mistake="a cluster of languages with a typo",
        command="run quickstart --set primary_cluster=europan",
        says="primary_cluster is 'europan'; did you mean 'european'?",
    ),
    Case(
        mistake="a setting of a recipe out of its bounds",
        command="run quickstart --set pretrain_steps=0",
        says="pretrain_steps is 0; it must be at least 1",
    ),
    Case(
        mistake="a setting without a value",
        command="run plans.py:small --set words",
        prepare=WITH_PLAN,
        says="--set: 'words' is not key=value",
    ),
    Case(
        mistake="a setting of the wrong kind",
        command="run plans.py:small --set words=many",
        prepare=WITH_PLAN,
        says="--set words: 'many' does not fit; expected: integer",
    ),
    Case(
        mistake="a closing without the inputs that its function takes",
        command="run plans.py:small",
        prepare=worlds.written(
            "plans.py", PLAN + "    plan.closing(show)\n\n\ndef show(run, text):\n    return str(text)\n"
        ),
        says="plan.closing: show: missing a required argument: 'text'; give it the run, and the inputs by name",
    ),
    Case(
        mistake="a step with a parameter called purpose",
        command="run plans.py:small",
        prepare=worlds.written("plans.py", PLAN.replace("words: int, out", "purpose: str, out")),
        says="write: a step's parameter cannot be called 'purpose', which is one of plan.step; call it otherwise",
    ),
    Case(
        mistake="an executor that does not exist",
        command="run plans.py:small --executor slurm",
        prepare=WITH_PLAN,
        says="--executor: unknown executor 'slurm'; known: local, ray",
    ),
    Case(
        mistake="Ray without the extra cluster",
        command="run plans.py:small --executor ray",
        prepare=WITH_PLAN,
        during=worlds.without_package("ray"),
        simulated="the package is hidden",
        says="to run a plan on a Ray cluster, the package 'ray' is needed and not installed; … -m pip install 'koine-lm[cluster]'",
    ),
    Case(
        mistake="adopting what is not there",
        command="adopt missing --run mine --name text",
        says="missing: no such folder",
    ),
    Case(
        mistake="the lineage of a folder that is no artifact",
        command="lineage tokenizer",
        prepare=worlds.having("tokenizer"),
        says="tokenizer: holds no artifact.json; only what a command of Koine made, or `koine adopt` registered, has a lineage",
    ),
    Case(
        mistake="a report of a run that is not there",
        command="report runs/missing",
        says="runs/missing: no such run folder; build one with koine run PLAN",
    ),
)
