"""Objectives: sums over the targets, equal to torch's cross-entropy, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from koine.errors import UserError
from koine.train import LanguageModelling, SupervisedFineTuning

from .fakes import FakeBatch
from .models import small_model


@pytest.mark.parametrize("objective", [LanguageModelling(), SupervisedFineTuning()])
def test_the_loss_is_the_sum_over_the_targets(objective: Any) -> None:
    torch.manual_seed(0)
    model = small_model()
    tokens, targets = torch.randint(0, 20, (2, 6)), torch.randint(0, 20, (2, 6))
    targets[0, :3] = -100
    batch: Any = FakeBatch(tokens, targets, None)
    loss, metrics = objective(model, batch)
    logits = model.logits(model(tokens)).float()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert metrics == {"units": 9.0}
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_fine_tuning_needs_completions() -> None:
    tokens = torch.zeros(1, 4, dtype=torch.long)
    batch: Any = FakeBatch(tokens, torch.full_like(tokens, -100), None)
    with pytest.raises(UserError, match="no completion token"):
        SupervisedFineTuning()(small_model(), batch)
