"""Sentence and question templates of the sample world, in the languages with questions.

`phrases.tsv` holds a row per template, and all languages have equally many of each. `{x}` is the subject as
CLDR names it, `{y}` the answer. Where a language would inflect the subject, a template names the thing first
and then asks ("Country: {x}. What is its currency?"), or takes a form of `koine.data.sample.subjects`.
"""

from __future__ import annotations

import functools
from importlib import resources


@functools.cache
def phrases() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return language code -> phrase -> templates: questions by kind, sentences by `says_` and kind."""
    text = resources.files("koine.data.sample").joinpath("phrases.tsv").read_text(encoding="utf-8")
    found: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines()[1:]:
        code, name, template = line.split("\t")
        found.setdefault(code, {}).setdefault(name, []).append(template)
    return {code: {name: tuple(templates) for name, templates in own.items()} for code, own in found.items()}


QUESTION_LANGUAGES: tuple[str, ...] = tuple(phrases())
"""The languages with questions: eight of each cluster."""


@functools.cache
def wordings(phrase: str) -> int:
    """Count the templates of a phrase: the same in every language."""
    return len(phrases()[QUESTION_LANGUAGES[0]][phrase])
