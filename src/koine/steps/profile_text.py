"""The steps that write the text on which models are profiled: the sample world's, or the user's own."""

from __future__ import annotations

import json
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.files import read_json, write_json
from koine.plan import step
from koine.steps import checks, estimates
from koine.steps.corpus_files import field_mapping, read_lines
from koine.steps.evaluation import Record, evenly_spaced, truncate_text

if TYPE_CHECKING:
    from koine.evaluate.language_profile import ProfileText

TEXTS, ABOUT = "texts.jsonl", "text.json"
"""Files of the text: one document a line, and a sentence about it."""


@step(version="1", estimate=estimates.profile_sample, check=checks.profile_sample)
def sample_profile_text(
    *, languages: tuple[str, ...], documents: int, scored_documents: int, seed: int, out: Path
) -> None:
    """Write parallel text of the sample world: the same facts in every language.

    documents: of each language. scored_documents: those that models score, the first of them.
    """
    from koine.data.sample.parallel import NAMES, REFERENCE, SENTENCES, parallel_texts
    from koine.evaluate.language_profile import ProfileText

    texts = [
        ProfileText(
            language=one.language,
            text=unicodedata.normalize("NFC", one.text),
            form=one.form,
            parallel_id=one.parallel_id,
            scored=one.number < scored_documents,
        )
        for one in parallel_texts(languages, documents, seed=seed)
    ]
    told, named = (
        list(dict.fromkeys(one.language for one in texts if one.form == form)) for form in (SENTENCES, NAMES)
    )
    about = "The sample world: currency, language and capital of territories, the same in each language."
    if told:
        about += f" In sentences: {', '.join(told)}."
    if named := [code for code in named if code != REFERENCE]:
        about += f" As names and numbers, compared with English written so: {', '.join(named)}."
    _write(out, texts, about, parallel=True)


@step(version="1", estimate=estimates.own, check=checks.profile_text)
def own_profile_text(
    data: Path,
    *,
    fields: tuple[str, ...],
    languages: tuple[str, ...],
    parallel: bool,
    documents: int,
    scored_documents: int,
    max_document_bytes: int,
    max_bytes_per_language: int,
    max_bad_share: float,
    record_format: str = "",
    out: Path,
) -> None:
    """Choose documents of each language from the user's text.

    parallel: records of one id are translations. Records with a text for each language are known to be.
    max_document_bytes: length to which a document is cut; parallel documents stay whole.

    Raises:
        UserError: no record has text and a language, or text is parallel and no id is in all languages.
    """
    from koine.data import RecordFormat, read_records
    from koine.data.records import TRANSLATED
    from koine.evaluate.language_profile import ProfileText
    from koine.languages import language

    reader = read_records(
        data,
        fields=field_mapping(fields),
        max_bad_share=max_bad_share,
        split="all",
        carry=(),
        record_format=RecordFormat(record_format or None),
    )
    wanted = {language(code).code for code in languages}
    found: dict[str, list[Record]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    for record in reader:
        code = record["language"]
        if "text" not in record or code == "und" or (wanted and code not in wanted):
            continue
        if len(found[code]) < documents and sizes[code] < max_bytes_per_language and record["text"].strip():
            found[code].append(record)
            sizes[code] += len(record["text"].encode("utf-8"))
            parallel = parallel or bool(record.get(TRANSLATED))
    chosen = {code: records for code, records in sorted(found.items()) if records}
    if not chosen:
        raise UserError(
            "no record has text and a language",
            where=data,
            hint="name the field that holds the language: --set fields=text=...,language=...",
        )
    shared = _shared_ids(chosen) if parallel else []
    if parallel and not shared:
        raise UserError(
            f"no id is in all of {', '.join(chosen)}, so the text is not parallel",
            where=data,
            hint="give the translations of a record its id, or set parallel=false",
        )
    scored_ids = {record["id"] for record in evenly_spaced([{"id": one} for one in shared], scored_documents)}
    texts = []
    for code, records in chosen.items():
        scored = scored_ids or {record["id"] for record in evenly_spaced(records, scored_documents)}
        for record in records:
            text = unicodedata.normalize("NFC", record["text"])
            texts.append(
                ProfileText(
                    language=code,
                    text=text if parallel else truncate_text(text, max_document_bytes),
                    parallel_id=str(record["id"]) if parallel else None,
                    scored=record["id"] in scored,
                )
            )
    kind = "the same content in each language" if parallel else "not parallel"
    _write(out, texts, f"Your text in {len(chosen)} languages, {kind}.", parallel=parallel)


def _shared_ids(records: Mapping[str, Sequence[Record]]) -> list[Any]:
    """Return the ids that all languages have, in the order of the first language."""
    first, *others = ([record["id"] for record in some] for some in records.values())
    common = set(first).intersection(*others)
    return [one for one in dict.fromkeys(first) if one in common]


def _write(out: Path, texts: Sequence[ProfileText], about: str, *, parallel: bool) -> None:
    """Write the documents and what they are."""
    lines = [json.dumps(asdict(text), ensure_ascii=False) for text in texts]
    (out / TEXTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    scored = [text for text in texts if text.scored]
    languages = sorted({text.language for text in texts})
    write_json(
        out / ABOUT,
        {
            "about": about,
            "parallel": parallel,
            "languages": languages,
            "documents": len(texts),
            "bytes": sum(len(text.text.encode("utf-8")) for text in texts),
            "scored_documents": len(scored),
            "scored_bytes": sum(len(text.text.encode("utf-8")) for text in scored),
        },
    )


def read_profile_texts(folder: Path) -> list[ProfileText]:
    """Return the documents of a text folder."""
    from koine.evaluate.language_profile import ProfileText

    return [ProfileText(**line) for line in read_lines(folder / TEXTS)]


def about_text(folder: Path) -> dict[str, Any]:
    """Return what a text folder says about its text."""
    found: dict[str, Any] = read_json(folder / ABOUT)
    return found
