"""Sentence and question templates of the sample world, in the languages with questions.

`phrases.tsv` holds a row per language. A question never inflects the inserted name (`{x}`). Where the
language would, the question first names the thing, then asks ("Country: {x}. What is its currency?").
"""

from __future__ import annotations

import functools
from importlib import resources


@functools.cache
def phrases() -> dict[str, dict[str, str]]:
    """Return language code -> phrase name -> phrase."""
    text = resources.files("koine.data.sample").joinpath("phrases.tsv").read_text(encoding="utf-8")
    header, *rows = (line.split("\t") for line in text.splitlines())
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


QUESTION_LANGUAGES: tuple[str, ...] = tuple(phrases())
"""The languages with questions: eight of each cluster."""
