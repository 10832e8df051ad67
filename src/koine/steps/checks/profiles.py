"""Checks of the steps that profile models by language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from koine.errors import UserError
from koine.plan import PlannedInput
from koine.steps.checks.corpora import known_codes, mean_document, preview_of
from koine.steps.checks.messages import surprise
from koine.steps.facts import CorpusFacts, ModelFacts, model_facts, vocabulary_size


def profile_sample(
    *, languages: tuple[str, ...], documents: int, scored_documents: int, **_: Any
) -> CorpusFacts:
    """Check that the sample world can be written in all languages."""
    from koine.data.sample import sample_languages
    from koine.data.sample.coverage import covers
    from koine.languages import language

    codes = known_codes("languages", languages)
    for code in codes:
        if not covers(code):
            raise UserError(
                f"languages has '{code}' ({language(code).name}), of which CLDR knows too little for the "
                "sample world",
                hint=f"it is there in {len(sample_languages())} languages; for others give text of your own "
                "(data=PATH)",
            )
    _check_documents(documents, scored_documents)
    return CorpusFacts(
        primary=codes,
        expanded=(),
        chat=(),
        part_bytes={},
        heldout_documents=scored_documents,
        document_bytes=150,
    )


def profile_text(
    data: PlannedInput,
    *,
    fields: tuple[str, ...],
    languages: tuple[str, ...],
    documents: int,
    scored_documents: int,
    max_document_bytes: int,
    max_bad_share: float,
    record_format: str = "",
    **_: Any,
) -> CorpusFacts | None:
    """Check the user's text, and that it has the languages."""
    wanted = known_codes("languages", languages)
    _check_documents(documents, scored_documents)
    preview = preview_of(data, fields, max_bad_share, record_format)
    if preview is None:
        return None
    named = tuple(code for code in preview.languages if preview.text_bytes.get(code))
    if preview.whole:
        absent = [code for code in wanted if code not in named]
        if absent:
            raise UserError(
                f"languages has {', '.join(absent)}, of which the data have no text",
                where=data.path,
                hint=f"they have: {', '.join(named) or 'no language at all'}",
            )
        if not named:
            raise UserError(
                "no record has text and a language",
                where=data.path,
                hint="name the field that holds the language: --set fields=text=...,language=...",
            )
    return CorpusFacts(
        primary=wanted or named,
        expanded=(),
        chat=(),
        part_bytes={},
        heldout_documents=scored_documents,
        document_bytes=min(mean_document(preview), max_document_bytes),
    )


def _check_documents(documents: int, scored_documents: int) -> None:
    """Warn where fewer documents are read than models shall score."""
    if scored_documents > documents:
        surprise(f"scored_documents is {scored_documents}, and documents {documents}: all of them are scored")


def profile_model(
    text: PlannedInput, model: PlannedInput, *, primary_languages: tuple[str, ...], **_: Any
) -> ModelFacts | None:
    """Check a model of any architecture, and that the text has the primary languages."""
    codes = known_codes("primary_languages", primary_languages)
    facts = text.facts if isinstance(text.facts, CorpusFacts) else None
    known = () if facts is None else facts.languages or ()
    absent = [code for code in codes if known and code not in known and code != "en"]
    if absent:
        raise UserError(
            f"primary_languages has {', '.join(absent)}, of which there is no text",
            hint=f"possible are: {', '.join(known)}",
        )
    vocabulary_size(model)
    return model_facts(model)


def profile_speed(
    text: PlannedInput,
    models: Mapping[str, PlannedInput],
    profiles: Mapping[str, PlannedInput],
    *,
    lengths: tuple[int, ...],
    **_: Any,
) -> None:
    """Check the lengths."""
    from koine.generate.speed import NEW_TOKENS

    if not lengths:
        raise UserError("lengths is empty", hint="give tokens of context, for example --set lengths=512,8192")
    if min(lengths) <= NEW_TOKENS:
        raise UserError(
            f"lengths has {min(lengths)}", hint=f"each must be more than the {NEW_TOKENS} new tokens of a run"
        )
