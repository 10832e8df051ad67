"""Windows over long documents, and the model's mode after scoring."""

from __future__ import annotations

import pytest

from koine.evaluate.log_likelihood import negative_log_likelihoods, windows
from tests.evaluate.conftest import Uniform


@pytest.mark.parametrize("max_length", [2, 5, 8, 100])
@pytest.mark.parametrize("size", [1, 5, 6, 9, 23, 100])
def test_windows_predict_each_token_once_with_half_a_window_of_context(size: int, max_length: int) -> None:
    tokens = list(range(1000, 1000 + size + 1))
    predicted = []
    for window in windows(0, tokens, max_length):
        assert len(window.tokens) - 1 <= max_length
        predicted += window.tokens[-window.scored :]
        context = len(window.tokens) - window.scored
        assert window.tokens[0] == 1000 or context >= max_length // 2
    assert predicted == tokens[1:]


def test_the_training_mode_is_restored() -> None:
    model = Uniform(400).train()
    negative_log_likelihoods(model, [[1, 2, 3]], batch_size=1, max_length=8, device="cpu")
    assert model.training
