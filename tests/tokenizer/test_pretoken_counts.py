"""Merges learnt from counts of pre-tokens are those learnt from the text; limits hold."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from koine.tokenizer.pretoken_counts import (
    LARGEST_PAIR_COUNT,
    PretokenCounts,
    count_pretokens,
    feeding_scale,
    repeated,
)
from koine.tokenizer.pretokenize import pre_tokenizer
from koine.tokenizer.training import _empty_backend, learn_from_table
from tests.tokenizer.conftest import TEXTS


def words() -> list[str]:
    choice = random.Random(0)
    stems = ["river", "sea", "Fluss", "Meer", "नदी", "समुद्र", "川", "海", "12", "3.5", "NASA's"]
    return [" ".join(choice.choices(stems, k=9)) + ".\n" for _ in range(2000)]


def merges(backend: Any) -> list[Any]:
    return json.loads(backend.to_str())["model"]["merges"]


@pytest.mark.parametrize("chunk_bytes", [1_000, 10**9])
def test_merges_equal_those_of_the_library(chunk_bytes: int) -> None:
    from tokenizers import AddedToken, pre_tokenizers, trainers

    from koine.tokenizer import SPECIAL_TOKENS

    texts = [*words(), *TEXTS["hi"], *TEXTS["ja"]]
    direct = _empty_backend()
    direct.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=450,
            min_frequency=5,
            show_progress=False,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    ours = _empty_backend()
    table = count_pretokens(
        ((text, 1) for text in texts),
        normalizer=ours.normalizer,
        pre_tokenizer=ours.pre_tokenizer,
        chunk_bytes=chunk_bytes,
    )
    assert learn_from_table(ours, table, vocab_size=450, min_frequency=5, show_progress=False) == 1.0
    assert merges(ours) == merges(direct)
    assert ours.get_vocab() == direct.get_vocab()


def test_a_text_counts_once_per_draw() -> None:
    backend = _empty_backend()
    once = count_pretokens([("a b b", 1)], normalizer=backend.normalizer, pre_tokenizer=backend.pre_tokenizer)
    thrice = count_pretokens(
        [("a b b", 3)], normalizer=backend.normalizer, pre_tokenizer=backend.pre_tokenizer
    )
    assert once.counts == {"a": 1, "Ġb": 2}
    assert thrice.counts == {"a": 3, "Ġb": 6}
    assert (once.occurrences, thrice.occurrences) == (3, 9)


def test_the_rarest_are_dropped_from_a_full_table_and_counted() -> None:
    table = PretokenCounts()
    table.add({f"w{i}": 1 for i in range(90)} | {"often": 50}, 1, most=100)
    assert (table.dropped, len(table.counts)) == (0, 91)
    table.add({f"v{i}": 1 for i in range(20)} | {"often": 50}, 1, most=100)
    assert table.counts == {"often": 100}
    assert (table.dropped, table.dropped_below, table.occurrences) == (110, 1, 210)


def test_a_long_text_is_scaled_down_and_no_pair_overflows() -> None:
    table = PretokenCounts(counts={"ab": 3_000_000_000, "c" * 1000: 10_000_000}, occurrences=3_010_000_000)
    scale = feeding_scale(table, most=10**12)
    pairs = 3_000_000_000 + 999 * 10_000_000
    assert scale == pytest.approx(LARGEST_PAIR_COUNT / pairs)
    assert feeding_scale(table, most=1_000_000) == pytest.approx(1_000_000 / 3_010_000_000)
    small = PretokenCounts(counts={"ab": 30}, occurrences=30)
    assert feeding_scale(small) == 1.0


def test_scaled_counts_keep_their_proportions_and_rare_ones_their_weight() -> None:
    counts = {f"w{i}": 1 for i in range(4000)} | {"often": 100_000}
    table = PretokenCounts(counts=counts, occurrences=104_000)
    fed = Counter(word for part in repeated(table, 0.25) for word in part.split(" "))
    assert fed["often"] == pytest.approx(25_000, abs=1)
    assert sum(fed[f"w{i}"] for i in range(4000)) == pytest.approx(1000, rel=0.1)
    assert fed == Counter(word for part in repeated(table, 0.25) for word in part.split(" "))


def test_pre_tokens_hold_no_space() -> None:
    """`repeated` separates them by spaces."""
    pieces = pre_tokenizer().pre_tokenize_str("a  b\t\n c　d e")
    assert all(" " not in piece for piece, _ in pieces)


def test_scales_of_long_text() -> None:
    """The smallest of: no scale, the most occurrences, and 2^31 - 1 pairs."""
    table = PretokenCounts({"ab": 60, "c": 40}, occurrences=100)
    assert feeding_scale(table) == 1.0
    assert feeding_scale(table, most=25) == 0.25
    pairs = PretokenCounts({"abcde": 2**31}, occurrences=1)
    assert feeding_scale(pairs) == pytest.approx(1 / 4)
    # rare words keep their weight together: a thousand of one occurrence each at a tenth are about a hundred
    rare = PretokenCounts({f"w{number}": 1 for number in range(1000)}, occurrences=1000)
    assert sum(len(text.split()) for text in repeated(rare, 0.1)) == pytest.approx(100, abs=30)


def test_rare_pretokens_are_dropped_by_doubling_thresholds() -> None:
    table = PretokenCounts()
    table.add({f"w{count}": count for count in range(1, 9)}, 1, most=5)
    # more than 5 entries: those up to 1, then up to 2, then up to 4 leave (3 would do)
    assert table.counts == {"w5": 5, "w6": 6, "w7": 7, "w8": 8}
    assert (table.dropped, table.dropped_below, table.occurrences) == (10, 4, 36)
