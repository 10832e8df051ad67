"""Rewards for form, length and language."""

from __future__ import annotations

from typing import Any

import pytest

from koine.align.rewards.form import Form, Length
from koine.align.rewards.language import Language
from koine.align.rewards.reward import RewardFailure
from koine.align.rewards.text import measure
from koine.errors import UserError


@pytest.mark.parametrize(
    ("form", "completion", "value"),
    [
        (Form(pattern="[A-D]"), " B\n", 1.0),
        (Form(pattern="[A-D]"), "B or C", 0.0),
        (Form(json=True), '{"a": [1]}', 1.0),
        (Form(json=True), '{"a": NaN}', 0.0),
        (Form(json=True), "[" * 100_000, 0.0),
        (Form(json=True, most=1), '{"a": "b c"}', 0.5),
        (Form(least=2, most=3), "two words", 1.0),
        (Form(least=2, most=3), "one", 0.0),
        (Form(most=2, unit="lines"), "a\nb\nc", 0.0),
        (Form(most=5, unit="characters"), "東京です", 1.0),
    ],
)
def test_form(form: Form, completion: str, value: float) -> None:
    assert form([], completion, {}) == value


def test_form_of_the_record_replaces_the_settings() -> None:
    form = Form(most=2)
    assert form([], "three words here", {"form": {"most": 3}}) == 1.0
    assert form([], "A", {"form": {"pattern": "[A-D]"}}) == 1.0
    assert form([], "A b c", {"form": {"pattern": "[A-D]"}}) == 0.0
    for bad in ({"form": {"longest": 3}}, {"form": 3}, {"form": {"pattern": "("}}):
        with pytest.raises(UserError):
            form.check(bad)
    with pytest.raises(UserError, match="no constraint"):
        Form().check({})


@pytest.mark.parametrize(
    ("words", "value"), [(0, 0.0), (1, 0.5), (2, 1.0), (10, 1.0), (15, 0.5), (20, 0.0), (99, 0.0)]
)
def test_length(words: int, value: float) -> None:
    assert Length(least=2, most=10)([], " ".join(["w"] * words), {}) == pytest.approx(value)


def test_length_with_its_own_zero() -> None:
    length = Length(most=4, zero=5, unit="characters")
    assert [length([], "x" * n, {}) for n in (4, 5)] == [1.0, 0.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Length(most=0),
        lambda: Length(most=2, least=3),
        lambda: Length(most=2, zero=2),
        lambda: Length(most=2, unit="tokens"),
        lambda: Form(least=3, most=2),
        lambda: Form(pattern="("),
        lambda: Language(candidates="de xx"),
        lambda: Language(undetermined=float("nan")),
    ],
)
def test_settings_out_of_bounds(make: Any) -> None:
    with pytest.raises(UserError):
        make()


def test_measures() -> None:
    assert measure(" it's a well-known fact. ", "words") == 4
    assert measure("a\n\nb", "lines") == 3
    assert measure(" ab ", "characters") == 2


def test_language_where_the_script_decides() -> None:
    reward = Language(candidates="ru hi el")
    assert reward([], "Привет, мир", {"language": "ru"}) == 1.0
    assert reward([], "Привет, мир", {"language": "hi"}) == 0.0
    assert Language(candidates="ru hi", soft=True)([], "Привет abc", {"language": "ru"}) == pytest.approx(0.8)
    # A language of the record that is no candidate is one.
    assert reward([], "안녕하세요", {"language": "ko"}) == 1.0


def test_numbers_have_no_language() -> None:
    with pytest.raises(RewardFailure, match="no letters"):
        Language()([], "42", {"language": "de"})
    assert Language(undetermined=1.0)([], "42", {"language": "de"}) == 1.0
    with pytest.raises(UserError, match="language"):
        Language().check({})


def test_a_script_that_no_candidate_has_is_another_language() -> None:
    assert Language(candidates="de fr")([], "Привет", {"language": "de"}) == 0.0


def test_language_with_the_model() -> None:
    pytest.importorskip("py3langid", reason="the extra langid is not installed")
    reward = Language(candidates="de en fr")
    assert reward([], "Das ist die Hauptstadt von Japan.", {"language": "de"}) == 1.0
    assert reward([], "This is the capital of Japan.", {"language": "de"}) == 0.0
