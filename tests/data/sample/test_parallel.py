"""Parallel text: the same facts in each language, with English in the same form."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict

import pytest

from koine.data.sample import QUESTION_LANGUAGES
from koine.data.sample.parallel import NAMES, PARALLEL_LANGUAGES, SENTENCES, ParallelText, parallel_texts
from koine.errors import UserError
from koine.languages import language


def by_document(texts: list[ParallelText]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for one in texts:
        found[one.parallel_id][one.language] = one.text
    return found


def test_there_are_forty_languages_in_many_scripts() -> None:
    assert len(set(PARALLEL_LANGUAGES)) == 40
    assert set(QUESTION_LANGUAGES) < set(PARALLEL_LANGUAGES)
    assert len({language(code).script for code in PARALLEL_LANGUAGES}) == 19


def test_all_languages_tell_the_same_facts() -> None:
    codes = ["de", "hi", "sw", "am"]
    documents = by_document(list(parallel_texts(codes, 30)))
    assert len(documents) == 60
    for name, versions in documents.items():
        form = name.partition("-")[0]
        assert versions.keys() == ({"en", "de", "hi"} if form == SENTENCES else {"en", "sw", "am"})
        lines = {code: text.splitlines() for code, text in versions.items()}
        assert len({len(some) for some in lines.values()}) == 1, name
        for told in zip(*lines.values(), strict=True):
            numbers = [sorted(int(one) for one in re.findall(r"\d+", line)) for line in told]
            assert all(len(one) == len(numbers[0]) for one in numbers) or "20" in told[0], told


def test_english_is_in_the_form_of_the_language() -> None:
    texts = list(parallel_texts(["sw"], 20))
    assert {(one.language, one.form) for one in texts} == {("en", NAMES), ("sw", NAMES)}
    english = next(one.text for one in texts if one.language == "en")
    sentences = next(one.text for one in parallel_texts(["en"], 20))
    assert english != sentences
    assert len(english) < len(sentences)


def test_text_has_letters_and_no_fact_of_digits_alone() -> None:
    for one in parallel_texts(["en", "ja", "sw"], 30):
        assert all(any(unicodedata.category(c)[0] == "L" for c in line) for line in one.text.splitlines()), (
            one
        )


def test_a_language_without_names_is_refused() -> None:
    with pytest.raises(UserError, match="CLDR does not know enough of 'bo'"):
        list(parallel_texts(["en", "bo"], 2))
