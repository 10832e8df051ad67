"""Phrases of all languages."""

from __future__ import annotations

import re

from koine.evaluate.long_context.phrases import lead_and_answer, phrase_languages, phrases_of


def test_every_language_has_every_phrase() -> None:
    slots = {name: set(re.findall(r"{\w+}", value)) for name, value in vars(phrases_of("en")).items()}
    for code in phrase_languages():
        for name, value in vars(phrases_of(code)).items():
            assert value, (code, name)
            assert set(re.findall(r"{\w+}", value)) == slots[name], (code, name)
        own = phrases_of(code)
        for sentence, question, slot in (
            (own.fact, own.ask, "{value}"),
            (own.facts, own.ask_facts, "{values}"),
            (own.variables, own.ask_variables, "{names}"),
            (own.words, own.ask_words, "{names}"),
        ):
            # A model would copy from a question that contains the beginning of the answer.
            assert lead_and_answer(sentence, slot, "")[0] not in question, code
    assert phrases_of("pt-BR").code == "pt"
    assert phrases_of("th").code == "und"
    assert lead_and_answer("It is {value}.", "{value}", "7") == ("It is", " 7")
    assert lead_and_answer("それは{value}です。", "{value}", "7") == ("それは", "7")
