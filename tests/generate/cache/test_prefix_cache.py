"""The common beginning of two texts."""

from __future__ import annotations

import pytest

from koine.generate.cache.prefix_cache import common_length
from tests.generate.prompts import prompt_of


@pytest.mark.parametrize("lengths", [(0, 0), (3, 5), (8, 8), (40, 39)])
def test_common_length(lengths: tuple[int, int]) -> None:
    first, second = prompt_of(lengths[0], 1), prompt_of(lengths[1], 1)
    assert common_length(first, second) == min(lengths)
    if min(lengths) > 2:
        second[2] = 1
        assert common_length(first, second) == 2
