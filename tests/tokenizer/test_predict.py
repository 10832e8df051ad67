"""Predicted adaptation costs, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from koine.errors import UserError
from koine.tokenizer import Tokenizer
from koine.tokenizer.predict import predict_costs, ranks, spearman

from .letters import Letters


def test_cost_ranks_sequence_length_and_unseen_letters() -> None:
    """Mean rank of tokens per byte (ascending) and of letter overlap (descending)."""
    tokenizer = Letters("abcdefgh", dear="dh")
    texts = {"en": ["aabbcc"], "nl": ["aabc"], "fi": ["aadd"], "hu": ["efeh"]}
    found = {one.language: one for one in predict_costs(tokenizer, texts, primary=["en"])}
    assert {code: one.tokens_per_byte for code, one in found.items()} == {"nl": 1.0, "fi": 2.0, "hu": 1.5}
    assert {code: one.script_overlap for code, one in found.items()} == {"nl": 1.0, "fi": 0.5, "hu": 0.0}
    # ranks of the rate 0, 1, 1/2; of the overlap, least first: nl 0, fi 1/2, hu 1
    assert {code: one.cost for code, one in found.items()} == {"nl": 0.0, "fi": 0.75, "hu": 0.75}
    # with equal lengths only the letters count
    same = predict_costs(Letters("abcdefgh"), texts, primary=["en"])
    assert [(one.language, one.cost) for one in same] == [("hu", 0.75), ("fi", 0.5), ("nl", 0.25)]


def test_a_very_rare_letter_counts_as_unseen() -> None:
    texts = {"en": ["a" * 300_000 + "e"], "hu": ["e"], "fi": ["a"]}
    found = {one.language: one for one in predict_costs(Letters("abcdefgh"), texts, primary=["en"])}
    assert (found["hu"].script_overlap, found["fi"].script_overlap) == (0.0, 1.0)
    texts["en"] = ["a" * 30_000 + "e"]
    found = {one.language: one for one in predict_costs(Letters("abcdefgh"), texts, primary=["en"])}
    assert found["hu"].script_overlap == 1.0


def test_ranks_and_spearman_by_hand() -> None:
    assert ranks({"a": 3.0, "b": 1.0, "c": 3.0}) == {"b": 0.0, "a": 0.75, "c": 0.75}
    up = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    assert spearman(up, {key: value**3 for key, value in up.items()}) == pytest.approx(1.0)
    assert spearman(up, {key: -value for key, value in up.items()}) == pytest.approx(-1.0)
    # 1 - 6 * sum d^2 / (n (n^2 - 1)) with d = 1, 1, 0, 0
    assert spearman(up, {"a": 2.0, "b": 1.0, "c": 3.0, "d": 4.0}) == pytest.approx(1 - 6 * 2 / 60)


def test_an_unknown_script_is_expected_to_be_expensive(small: Tokenizer) -> None:
    texts = {
        "en": ["The territory is far from the sea, says the map."] * 3,
        "de": ["Das Gebiet liegt nicht weit."] * 3,
        "nl": ["Het gebied ligt niet ver."] * 3,
        "ka": ["ტერიტორია შორს არ არის."] * 3,
    }
    found = predict_costs(small, texts, primary=["en", "de"])
    assert [one.language for one in found] == ["ka", "nl"]
    assert found[0].script_overlap == 0.0
    assert found[1].script_overlap == pytest.approx(0.85, abs=0.001)  # v and some others are missing
    with pytest.raises(UserError, match="no language beside"):
        predict_costs(small, texts, primary=list(texts))
