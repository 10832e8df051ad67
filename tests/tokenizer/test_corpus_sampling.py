"""Sampling of text by language, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from koine.errors import KoineWarning
from koine.tokenizer.corpus_sampling import draw, quotas


def test_error_diffusion_by_hand() -> None:
    """The published sequence of PCG64 for this seed and language, worked out by hand."""
    import hashlib

    rate, lengths = 0.4, [3, 10, 4, 8, 5, 9, 2, 7, 6, 1] * 20
    digest = hashlib.blake2b(b"5/de", digest_size=8).digest()
    thresholds = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big"))).random(1024).tolist()
    credit, want = 0.0, []
    for length in lengths:
        credit += rate * length
        taken = credit > thresholds.pop() * length
        credit -= length * taken
        want.append(int(taken))
    corpus = {"de": lambda: ["x" * length for length in lengths]}
    total = sum(lengths)
    pairs = list(draw(corpus, sizes={"de": total}, quota={"de": rate * total}, seed=5))
    assert [len(text) for text, _ in pairs] == [
        length for length, taken in zip(lengths, want, strict=True) if taken
    ]
    # error diffusion: within one text of the quota, where independent draws would be off by several
    assert sum(len(text) for text, _ in pairs) == pytest.approx(rate * total, abs=max(lengths))


def test_a_language_is_drawn_beyond_its_text_up_to_the_limit() -> None:
    with pytest.warns(KoineWarning, match="read more than once"):
        drawn = quotas({"de": 100, "fr": 100}, {"de": 0.9, "fr": 0.1}, sample_bytes=400, max_repeats=3)
    assert drawn == {"de": 300, "fr": pytest.approx(40)}
