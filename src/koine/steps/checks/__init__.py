"""Checks of the steps' arguments before anything runs.

Each stands beside a step as `@step(check=...)`: it gets the step's arguments with a `PlannedInput` for each
input, raises `UserError` for what cannot work, warns with `KoineWarning` of what may surprise, and returns
the facts that the checks of later steps build on.
"""

from koine.steps.checks.alignments import (
    alignment,
    group_tokens,
    inspected_groups,
    reference,
    trained_online,
    watched,
)
from koine.steps.checks.combinations import combined, copied, grown, merged
from koine.steps.checks.corpora import domain_text, own_corpus, sample, text_corpus
from koine.steps.checks.profiles import profile_model, profile_sample, profile_speed, profile_text
from koine.steps.checks.rewards import reward_training
from koine.steps.checks.trainings import (
    domain_tokens,
    evaluated_model,
    evaluation,
    moved,
    other_attention,
    shared_tokenizer,
    tokenizer,
    tokens,
    training,
)

__all__ = [
    "alignment",
    "combined",
    "copied",
    "domain_text",
    "domain_tokens",
    "evaluated_model",
    "evaluation",
    "group_tokens",
    "grown",
    "inspected_groups",
    "merged",
    "moved",
    "other_attention",
    "own_corpus",
    "profile_model",
    "profile_sample",
    "profile_speed",
    "profile_text",
    "reference",
    "reward_training",
    "sample",
    "shared_tokenizer",
    "text_corpus",
    "tokenizer",
    "tokens",
    "trained_online",
    "training",
    "watched",
]
