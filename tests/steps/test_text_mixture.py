"""Mixtures of training steps: shapes, shares, and languages by role."""

from __future__ import annotations

from pathlib import Path

import pytest

from koine.data.mixture import Shape
from koine.errors import UserError
from koine.steps.corpus_files import Roles
from koine.steps.text_mixture import (
    LongText,
    TextMixture,
    TextSource,
    adaptation_sources,
    chat_sources,
    domain_sources,
    equal_shares,
    language_weights,
    pretraining_sources,
    with_dialogues,
)

ROLES = Roles(primary=("en", "de", "fr"), expanded=("hi", "tr"), chat=())


@pytest.mark.parametrize(
    ("length", "every", "rows", "shapes"),
    [
        (512, 0, 16, {Shape(512, 16): 20}),
        (2048, 4, 16, {Shape(512, 16): 15, Shape(2048, 4): 5}),
        (8192, 4, 8, {Shape(512, 8): 15, Shape(8192, 1): 5}),
        (2048, 1, 16, {Shape(2048, 4): 20}),
    ],
)
def test_a_batch_of_long_rows_has_as_many_tokens(
    length: int, every: int, rows: int, shapes: dict[Shape, int]
) -> None:
    long = LongText(every=every, sequence_length=length, source=TextSource(name="long")) if every else None
    mixture = TextMixture(
        sources=(TextSource(name="text"),), steps=20, sequence_length=512, batch_size=rows, long=long
    )
    assert mixture.build({}, None).shapes() == shapes
    assert mixture.max_length == length


def test_roles_become_the_languages_of_the_corpus() -> None:
    sources = pretraining_sources(english_share=0.3, expanded_share=0.05, code_share=0.1)
    built = TextMixture(sources=sources, steps=1, sequence_length=8, batch_size=1).build(
        {"documents": Path("documents")}, ROLES
    )
    documents, expanded, code = built.phases[0].sources
    assert documents.path == Path("documents")
    # Of all text: 5 % expanded, 25 % English, 35 % each of the two others.
    assert documents.languages is not None
    assert 0.95 * documents.languages["en"] == pytest.approx(0.25)
    assert 0.95 * documents.languages["de"] == pytest.approx(0.35)
    assert expanded.languages == {"hi": 1.0, "tr": 1.0}
    assert code.languages is None
    assert [one.proportion for one in (documents, expanded, code)] == pytest.approx([0.855, 0.045, 0.1])
    with pytest.raises(UserError, match="must be smaller"):
        pretraining_sources(english_share=0.3, expanded_share=0.4)


def test_english_gets_its_share_only_beside_others() -> None:
    assert language_weights(("en",), 0.3) == {"en": 1.0}
    assert language_weights(("de", "fr"), 0.3) == {"de": 1.0, "fr": 1.0}


def test_shares_of_domains() -> None:
    assert equal_shares(["code", "law"], {"general": 0.2}) == {"code": 0.4, "law": 0.4, "general": 0.2}
    assert [source.name for source in domain_sources({"code": 1.0, "law": 0.0})] == ["code"]


def test_dialogues_take_a_share_of_the_sources() -> None:
    sources = with_dialogues(adaptation_sources(("hi",), 0.2), 0.5, ("de",))
    assert [(one.name, one.proportion) for one in sources] == [
        ("adapted", pytest.approx(0.4)),
        ("primary", pytest.approx(0.1)),
        ("dialogues", 0.5),
    ]
    assert sources[-1].languages == ("de",)
    assert with_dialogues(sources[:2], 0.0) == sources[:2]
    with pytest.raises(UserError, match="the share of dialogues is 1"):
        with_dialogues(sources[:2], 1.0)


def test_the_chat_stage_repeats_dialogues_and_documents() -> None:
    found = {one.name: one.proportion for one in chat_sources(dialogue_share=0.5, document_share=0.1)}
    assert found == {"chats": pytest.approx(0.4), "dialogues": 0.5, "replayed": 0.1}
    assert [one.name for one in chat_sources(dialogue_share=0.0, document_share=0.0)] == ["chats"]
    with pytest.raises(UserError, match="together they must have less than 1"):
        chat_sources(dialogue_share=0.5, document_share=0.5)
