"""Hints that name the nearest known words."""

from __future__ import annotations

from koine.errors import did_you_mean


def test_an_empty_word_is_shown_in_the_list_of_known_ones() -> None:
    assert did_you_mean("xyz", ["alpaca", "", "text"]) == "known: (empty), alpaca, text"
    assert did_you_mean("alpacca", ["alpaca", "", "text"]) == "did you mean 'alpaca'?"
