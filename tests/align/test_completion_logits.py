"""Log-likelihoods of completions, alone and in batches, against torch's cross-entropy and transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from koine.align import completion_logits
from koine.align.completion_logits import Continuation, mean_log_likelihoods

from . import policies


def alone(model: object, one: Continuation) -> float:
    """The definition: one row, no padding, all logits at once."""
    tokens = torch.tensor([[*one.prompt, *one.completion]])
    logits = model.logits(model(tokens[:, :-1]))[0]  # type: ignore[attr-defined, operator]
    count = len(one.completion)
    return -F.cross_entropy(logits[-count:].float(), tokens[0, -count:]).item()


@pytest.mark.parametrize("most_tokens", [16, 64, 4096])
@pytest.mark.parametrize("most_logits", [400, 4_000_000])
def test_batches_and_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, most_tokens: int, most_logits: int
) -> None:
    monkeypatch.setattr(completion_logits, "MOST_TOKENS", most_tokens)
    monkeypatch.setattr(completion_logits, "MOST_LOGITS", most_logits)
    model = policies.policy()
    continuations = [one for pair in policies.pairs() for one in pair.continuations]
    with torch.no_grad():
        found = mean_log_likelihoods(model, continuations)
        assert found == pytest.approx([alone(model, one) for one in continuations], abs=1e-5)
    assert max(found) - min(found) > 0.1


def test_a_class_of_transformers_has_the_loss_of_its_own_forward_pass() -> None:
    model = policies.llama()
    continuations = [one for pair in policies.pairs() for one in pair.continuations]
    wanted = []
    with torch.no_grad():
        for prompt, completion in continuations:
            ids = torch.tensor([[*prompt, *completion]])
            labels = torch.tensor([[-100] * len(prompt) + list(completion)])
            wanted.append(-model.inner(input_ids=ids, labels=labels).loss.item())
        assert mean_log_likelihoods(model, continuations) == pytest.approx(wanted, abs=1e-5)
