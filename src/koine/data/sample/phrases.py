"""Sentences of the sample world in the languages that have questions of their own.

`phrases.tsv` holds a row a language. A question never inflects what is inserted (`{x}`): where the language would, the question names the
thing first and asks then ("Country: {x}. What is its currency?").
"""

from __future__ import annotations

import functools
from importlib import resources


@functools.cache
def phrases() -> dict[str, dict[str, str]]:
    """Language code to phrase name to phrase."""
    text = resources.files("koine.data.sample").joinpath("phrases.tsv").read_text(encoding="utf-8")
    header, *rows = (line.split("\t") for line in text.splitlines())
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


QUESTION_LANGUAGES: tuple[str, ...] = tuple(phrases())
"""The languages with questions: eight of each cluster."""
