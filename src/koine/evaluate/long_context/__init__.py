"""Long-context evaluation: needles, RULER-class tasks, loss per position, attention mass and entropy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koine.evaluate.long_context.attention import attention_of as attention_of
    from koine.evaluate.long_context.attention import attention_of_prompts as attention_of_prompts
    from koine.evaluate.long_context.positions import loss_by_position as loss_by_position
    from koine.evaluate.long_context.scores import score_prompt as score_prompt
    from koine.evaluate.long_context.suite import evaluate_long_context as evaluate_long_context

_WHERE = {
    "attention_of": "attention",
    "attention_of_prompts": "attention",
    "evaluate_long_context": "suite",
    "loss_by_position": "positions",
    "score_prompt": "scores",
}
__all__ = [
    "attention_of",
    "attention_of_prompts",
    "evaluate_long_context",
    "loss_by_position",
    "score_prompt",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"koine.evaluate.long_context.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'koine.evaluate.long_context' has no attribute '{name}'")
