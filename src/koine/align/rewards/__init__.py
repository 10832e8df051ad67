"""Rewards of completions: checkable answers, language, form, length, models, unit tests, weighted sums."""

from koine.align.rewards.models import Scorer, check_held_out, models_of
from koine.align.rewards.reward import (
    Answered,
    Reward,
    RewardFailure,
    RewardOutcome,
    RewardSummary,
    check_records,
    score,
)
from koine.align.rewards.spec import REWARDS, RewardSpec, WeightedSum

__all__ = [
    "REWARDS",
    "Answered",
    "Reward",
    "RewardFailure",
    "RewardOutcome",
    "RewardSpec",
    "RewardSummary",
    "Scorer",
    "WeightedSum",
    "check_held_out",
    "check_records",
    "models_of",
    "score",
]
