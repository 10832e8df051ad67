"""Steps, plans and their execution."""

from koine.plan.parameters import Parameter
from koine.plan.plan import Artifact, Plan
from koine.plan.step import Estimate, PlannedInput, step

__all__ = ["Artifact", "Estimate", "Parameter", "Plan", "PlannedInput", "step"]
