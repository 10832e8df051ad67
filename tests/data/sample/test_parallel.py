"""Parallel text: the same facts in each language, with English in the same form."""

from __future__ import annotations

from collections import defaultdict

import pytest

from koine.data.sample import QUESTION_LANGUAGES
from koine.data.sample.coverage import locale_of
from koine.data.sample.facts import split_of, territories
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
    documents = by_document(list(parallel_texts(["de", "hi", "sw", "am"], 300)))
    for name, versions in documents.items():
        form = name.partition("-")[0]
        assert versions.keys() == ({"en", "de", "hi"} if form == SENTENCES else {"en", "sw", "am"})
        assert len({text.count("\n") for text in versions.values()}) == 1, name
    first = documents["names-0000"]
    assert first["en"].splitlines() == [
        "South Korea: South Korean Won",
        "South Korea: Korean",
        "South Korea: Seoul",
    ]
    assert first["sw"].splitlines() == [
        "Korea Kusini: Won ya Korea Kusini",
        "Korea Kusini: Kikorea",
        "Korea Kusini: Seoul",
    ]


def test_territories_that_no_training_has_seen_come_first() -> None:
    count = sum(split_of(f"currency:{one.code}") == "heldout_territory" for one in territories())
    texts = [one.text for one in parallel_texts(["sw"], 400) if one.language == "en"]
    unseen = {
        str(locale_of("en").territories[one.code])
        for one in territories()
        if split_of(f"currency:{one.code}") == "heldout_territory"
    }
    told = [text.partition(":")[0] for text in texts]
    assert len(told) > 200
    assert set(told[:20]) <= unseen
    assert not set(told[count:]) & unseen


def test_english_is_in_the_form_of_the_language() -> None:
    texts = list(parallel_texts(["sw"], 20))
    assert {(one.language, one.form) for one in texts} == {("en", NAMES), ("sw", NAMES)}
    english = next(one.text for one in texts if one.language == "en")
    sentences = next(one.text for one in parallel_texts(["en"], 20))
    assert english != sentences
    assert len(english) < len(sentences)


def test_a_language_without_names_is_refused() -> None:
    with pytest.raises(UserError, match="CLDR does not know enough of 'bo'"):
        list(parallel_texts(["en", "bo"], 2))
