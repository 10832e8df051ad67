"""Initialisation of a new vocabulary's embeddings, against closed forms and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from koine.tokenizer.embedding_init import auxiliary_vectors, initialise_rows, sparsemax
from koine.tokenizer.vocabulary_match import VocabularyMatch


def test_sparsemax_of_two_and_three() -> None:
    """Martins and Astudillo 2016.

    Of (a, b) with a - b < 1: ((1 + a - b) / 2, (1 + b - a) / 2). With a difference of 1 or more: (1, 0).
    """
    scores = torch.tensor([[0.6, 0.2], [1.5, 0.0], [0.0, 0.0], [1.0, 0.0]])
    want = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    torch.testing.assert_close(sparsemax(scores), want)
    # three: the support is the two largest; threshold (0.9 + 0.7 - 1) / 2 = 0.3
    torch.testing.assert_close(sparsemax(torch.tensor([[0.9, 0.7, 0.1]])), torch.tensor([[0.6, 0.4, 0.0]]))


MATCH = VocabularyMatch(shared={0: 1}, pieces={1: (0, 1), 2: (2,)}, dropped=(), new_size=4, old_size=3)
OLD = torch.tensor([[1.0, 0.0], [3.0, 2.0], [8.0, 4.0], [1e6, 1e6]])  # the last row is padding


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("mean", [[3.0, 2.0], [4.0, 2.0], [4.0, 2.0], [4.0, 2.0]]),
        ("subword-mean", [[3.0, 2.0], [2.0, 1.0], [8.0, 4.0], [4.0, 2.0]]),
    ],
)
def test_rows_are_means_of_the_old_ones_without_padding(method: str, rows: list[list[float]]) -> None:
    found = initialise_rows(OLD, MATCH, method=method, generator=torch.Generator())  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(rows))


def test_random_rows_have_the_old_standard_deviation() -> None:
    """Standard deviation of ten thousand draws: within 3 % (six standard errors) of the old rows' own."""
    old = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * 0.02
    match = VocabularyMatch(shared={}, pieces={}, dropped=(), new_size=400, old_size=200)
    new = initialise_rows(old, match, method="random", generator=torch.Generator().manual_seed(1))
    assert float(new.std()) == pytest.approx(float(old.std()), rel=0.03)


def test_focus_combines_similar_tokens() -> None:
    """New token 1 is used exactly as shared token 0, and orthogonally to shared token 2."""
    match = VocabularyMatch(shared={0: 1, 2: 2}, pieces={1: (0,)}, dropped=(), new_size=3, old_size=3)
    vectors = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    new = initialise_rows(OLD, match, method="focus", generator=torch.Generator(), auxiliary=vectors)
    torch.testing.assert_close(new[1], OLD[1])
    # halfway between both: sparsemax of (0.7071, 0.7071) is one half each
    vectors[1] = torch.tensor([1.0, 1.0])
    new = initialise_rows(OLD, match, method="focus", generator=torch.Generator(), auxiliary=vectors)
    torch.testing.assert_close(new[1], (OLD[1] + OLD[2]) / 2)


def test_auxiliary_vectors_are_the_root_of_the_mutual_information() -> None:
    """0 occurs only with 1, and 2 only with 3: PPMI is log 4.

    That is a quarter of all pairs against a sixteenth. Each vector's square is the share of a singular value.
    """
    vectors = auxiliary_vectors([[0, 1], [2, 3]] * 5, 5, size=4, context=1)
    gram = (vectors @ vectors.t()).numpy()
    # the matrix is symmetric with singular values log 4: U S U^T has log 4 on the diagonal and nothing for token 4
    np.testing.assert_allclose(np.diag(gram), [math.log(4)] * 4 + [0.0], atol=1e-4)
