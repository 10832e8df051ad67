"""Checks of the steps that write a corpus: languages, and the beginning of the user's data."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.files import walk
from koine.languages import language
from koine.plan import PlannedInput
from koine.steps.checks.messages import surprise, with_settings
from koine.steps.corpus_files import field_mapping, split_roles
from koine.steps.estimates import CHAT_BYTES, DIALOGUE_BYTES, RECORD_BYTES
from koine.steps.facts import (
    CorpusFacts,
)

if TYPE_CHECKING:
    from koine.data.preview import DataPreview


def sample(
    *,
    languages: tuple[str, ...],
    primary_cluster: str,
    primary_languages: tuple[str, ...],
    documents_per_language: int,
    questions_per_language: int,
    code_bytes: int,
    **_: Any,
) -> CorpusFacts:
    """Check that the sample world can be written in all languages, and that each has a role."""
    from koine.data.sample import QUESTION_LANGUAGES, sample_languages
    from koine.data.sample.coverage import covers
    from koine.data.sample.world import DIALOGUES, heldout_count

    codes = known_codes("languages", languages)
    for code in codes:
        if not covers(code):
            raise UserError(
                f"languages has '{code}' ({language(code).name}), of which CLDR knows too little for the "
                "sample world",
                hint=f"it is there in {len(sample_languages())} languages, with questions in "
                f"{', '.join(QUESTION_LANGUAGES)}; for others give text of your own (data=PATH)",
            )
    absent = [code for code in known_codes("primary_languages", primary_languages) if code not in codes]
    if absent:
        raise UserError(
            f"primary_languages has {', '.join(absent)}, and languages has not",
            hint=f"possible are: {', '.join(codes)}",
        )
    primary, expanded = split_roles(
        codes, primary_cluster=primary_cluster, primary_languages=primary_languages
    )
    chat = tuple(code for code in codes if code in QUESTION_LANGUAGES)
    silent = [code for code in codes if code not in QUESTION_LANGUAGES]
    if chat and silent:
        surprise(
            f"the sample world has no questions in {', '.join(silent)}: the model reads text in these "
            f"languages and is not taught to answer in them"
        )
    return CorpusFacts(
        primary=primary,
        expanded=expanded,
        chat=chat,
        heldout_documents=heldout_count(documents_per_language),
        part_bytes={
            "documents": len(codes) * documents_per_language * RECORD_BYTES,
            "questions/train": len(chat) * questions_per_language * CHAT_BYTES,
            "dialogues": len(chat) * DIALOGUES * questions_per_language * DIALOGUE_BYTES,
            "code.jsonl": int(1.2 * code_bytes),
        },
    )


def known_codes(parameter: str, given: Iterable[str]) -> tuple[str, ...]:
    """Return our codes of languages; raise `UserError` for an unknown or repeated one."""
    found: dict[str, str] = {}
    for text in given:
        try:
            code = language(text).code
        except UserError as error:
            raise UserError(f"{parameter} has '{text}', which is no language", hint=error.hint) from None
        if code in found:
            same = f"'{text}'" if found[code] == text else f"'{found[code]}' and '{text}', the same language,"
            raise UserError(f"{parameter} names {same} twice", hint="name each language once")
        found[code] = text
    return tuple(found)


def own_corpus(
    data: PlannedInput,
    *,
    fields: tuple[str, ...],
    languages: tuple[str, ...],
    max_bytes_per_language: int,
    min_bytes_per_language: int,
    max_bad_share: float,
    record_format: str = "",
    primary_cluster: str,
    primary_languages: tuple[str, ...],
    **_: Any,
) -> CorpusFacts | None:
    """Check the user's text, and that both roles of languages can be filled from it."""
    primary_codes = known_codes("primary_languages", primary_languages)
    preview = preview_of(data, fields, max_bad_share, record_format)
    kept = kept_languages(
        data, preview, known_codes("languages", languages), min_bytes_per_language, max_bytes_per_language
    )
    if kept is None or preview is None:
        return None
    absent = [code for code in primary_codes if code not in kept]
    if absent and len(absent) < len(primary_codes):
        surprise(f"primary_languages has {', '.join(absent)}, and the data have not enough text of it")
    primary, expanded = split_roles(
        kept, primary_cluster=primary_cluster, primary_languages=primary_languages
    )
    return text_facts(preview, kept, max_bytes_per_language, primary, expanded)


def text_corpus(
    data: PlannedInput,
    *,
    fields: tuple[str, ...],
    languages: tuple[str, ...],
    max_bytes_per_language: int,
    min_bytes_per_language: int,
    max_bad_share: float,
    record_format: str = "",
    **_: Any,
) -> CorpusFacts | None:
    """Check the user's text where all languages have the same role."""
    preview = preview_of(data, fields, max_bad_share, record_format)
    kept = kept_languages(
        data, preview, known_codes("languages", languages), min_bytes_per_language, max_bytes_per_language
    )
    if kept is None or preview is None:
        return None
    return text_facts(preview, kept, max_bytes_per_language, kept, ())


def domain_text(
    data: PlannedInput,
    *,
    domain: str,
    fields: tuple[str, ...],
    max_bytes: int,
    max_bad_share: float,
    record_format: str = "",
    **_: Any,
) -> CorpusFacts | None:
    """Check a domain's text."""
    preview = preview_of(data, fields, max_bad_share, record_format)
    if preview is None:
        return None
    count = preview.documents + preview.chats
    if preview.whole and count < 2:
        raise UserError(
            f"the domain '{domain}' has {count} documents",
            where=data.path,
            hint="give more: one in twenty is held out, at least one",
        )
    written = min(int(1.5 * max_bytes), preview.file_bytes)
    return CorpusFacts(
        part_bytes={"documents": written},
        document_bytes=(sum(preview.text_bytes.values()) + preview.chat_bytes) // max(1, count) or 1,
    )


def preview_of(
    data: PlannedInput, fields: tuple[str, ...], max_bad_share: float, record_format: str
) -> DataPreview | None:
    """Return the beginning of the user's data; None where they do not exist yet."""
    mapping = field_mapping(fields)
    if not data.exists:
        return None
    try:
        return _preview(data.path, tuple(mapping.items()), max_bad_share, record_format, _state(data.path))
    except UserError as error:
        raise with_settings(error, data.path) from None


def _state(path: Path) -> tuple[tuple[int, int], ...]:
    """Return time and size of every file, which change with the content."""
    files = walk(path) if path.is_dir() else [path]
    found = [file.stat() for file in files if file.exists()]
    return tuple((about.st_mtime_ns, about.st_size) for about in found)


@functools.lru_cache(maxsize=64)
def _preview(
    path: Path,
    fields: tuple[tuple[str, str], ...],
    max_bad_share: float,
    record_format: str,
    state: tuple[tuple[int, int], ...],
) -> DataPreview:
    """Return `preview_records`, once for each `state` of the files: several steps may read the same data."""
    from koine.data.preview import preview_records

    return preview_records(
        path, fields=dict(fields), max_bad_share=max_bad_share, record_format=record_format
    )


def kept_languages(
    data: PlannedInput,
    preview: DataPreview | None,
    wanted: tuple[str, ...],
    min_bytes: int,
    max_bytes: int,
) -> tuple[str, ...] | None:
    """Return the languages that have enough text; None where only the whole data tell.

    Raises `UserError` where none has enough, or one that is asked for is not there.
    """
    if min_bytes > max_bytes:
        raise UserError(
            f"min_bytes_per_language is {min_bytes}, and at most {max_bytes} are taken of each",
            hint="it must not be above max_bytes_per_language",
        )
    if preview is None or not preview.whole:
        return None
    absent = [code for code in wanted if code not in preview.languages]
    if absent:
        raise UserError(
            f"languages has {', '.join(absent)}, of which the data have no text",
            where=data.path,
            hint=f"they have: {', '.join(preview.languages) or 'no language at all'}",
        )
    kept = tuple(
        code
        for code in preview.languages
        if preview.text_bytes.get(code, 0) >= max(1, min_bytes) and (not wanted or code in wanted)
    )
    if kept:
        return kept
    sizes = ", ".join(f"{code} {preview.text_bytes.get(code, 0):,}" for code in preview.languages)
    raise UserError(
        f"no language has {min_bytes:,} bytes of text (by language: {sizes or 'none is named'})",
        where=data.path,
        hint="lower min_bytes_per_language, or give more text"
        if sizes
        else "map the field that names it: --set fields=text=...,language=...",
    )


def mean_document(preview: DataPreview) -> int:
    """Return the mean bytes of a document."""
    return sum(preview.text_bytes.values()) // max(1, preview.documents) or 1


def text_facts(
    preview: DataPreview,
    kept: tuple[str, ...],
    max_bytes: int,
    primary: tuple[str, ...],
    expanded: tuple[str, ...],
) -> CorpusFacts:
    """Return the facts of a corpus made of the user's text."""
    from koine.data.sample import QUESTION_LANGUAGES

    chat = tuple(code for code in kept if code in preview.chat_languages)
    taken = sum(min(max_bytes, preview.text_bytes[code]) for code in kept)
    return CorpusFacts(
        primary=primary,
        expanded=expanded,
        chat=chat or tuple(code for code in kept if code in QUESTION_LANGUAGES) or ("en",),
        part_bytes={"documents": int(1.3 * taken), "questions/train": 2**20},
        document_bytes=mean_document(preview),
    )
