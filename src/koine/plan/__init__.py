"""Steps, plans and their execution."""

from koine.plan.finished_run import FinishedRun
from koine.plan.parameters import Parameter
from koine.plan.plan import Artifact, Plan
from koine.plan.step import Estimate, PlannedInput, step

__all__ = ["Artifact", "Estimate", "FinishedRun", "Parameter", "Plan", "PlannedInput", "step"]
