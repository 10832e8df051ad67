"""The steps that write a corpus folder: from the sample world, or from the user's own text.

Heavy imports are inside the functions, so that a run in which everything is up to date never loads torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.plan import step
from koine.steps import checks, estimates
from koine.steps.corpus_files import (
    LanguageShare,
    field_mapping,
    split_roles,
    write_own_corpus,
    write_step_report,
)
from koine.steps.corpus_files import Roles as CorpusRoles


@step(
    version="2",
    estimate=estimates.sample,
    check=checks.sample,
    formerly=("koine.recipes.corpora:sample_corpus",),
)
def sample_corpus(
    *,
    languages: tuple[str, ...],
    primary_cluster: str,
    primary_languages: tuple[str, ...],
    documents_per_language: int,
    questions_per_language: int,
    code_bytes: int,
    seed: int,
    out: Path,
) -> None:
    """Write the sample world in `languages`, with the primary and expanded languages."""
    from koine.data.sample import QUESTION_LANGUAGES, write_sample

    primary, expanded = split_roles(
        languages, primary_cluster=primary_cluster, primary_languages=primary_languages
    )
    world = out / "world"
    shutil.rmtree(world, ignore_errors=True)
    summary = write_sample(
        languages,
        world,
        seed=seed,
        documents_per_language=documents_per_language,
        questions_per_language=questions_per_language,
        code_bytes=code_bytes,
    )
    for path in world.iterdir():
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    world.rmdir()
    chat = tuple(code for code in languages if code in QUESTION_LANGUAGES)
    CorpusRoles(primary=primary, expanded=expanded, chat=chat).save(out)
    rows = [[str(value) for value in row] for row in summary.rows()]
    write_step_report(
        out,
        "Sample world",
        [
            {
                "kind": "text",
                "text": f"Facts and phrases from CLDR in {len(languages)} languages, the same facts in each. "
                f"Pretraining: {', '.join(primary)}. Adaptation: {', '.join(expanded)}.",
            },
            {"kind": "table", "columns": list(summary.columns), "rows": rows},
        ],
    )


@step(
    version="1",
    estimate=estimates.own,
    check=checks.own_corpus,
    formerly=("koine.recipes.corpora:own_corpus",),
)
def own_corpus(
    data: Path,
    *,
    fields: tuple[str, ...],
    primary_cluster: str,
    primary_languages: tuple[str, ...],
    languages: tuple[str, ...],
    max_bytes_per_language: int,
    heldout_bytes_per_language: int,
    heldout_share: float,
    min_bytes_per_language: int,
    max_bad_share: float,
    questions_per_language: int,
    seed: int,
    record_format: str = "",
    out: Path,
) -> None:
    """Sort the user's own records into a corpus.

    Without chats among the records, the sample world's questions take their place.

    Raises:
        UserError: no language has enough text, or too many records cannot be read.
    """
    from koine.data import RecordFormat, read_records
    from koine.languages import language

    for folder in ("documents", "documents-heldout", "questions"):
        shutil.rmtree(out / folder, ignore_errors=True)
    # All splits: records whose split is not train become the held-out text.
    reader = read_records(
        data,
        fields=field_mapping(fields),
        max_bad_share=max_bad_share,
        split="all",
        carry=(),
        record_format=RecordFormat(record_format or None),
    )
    wanted = {language(code).code for code in languages}
    unknown = 0

    def chosen() -> Iterator[dict[str, Any]]:
        nonlocal unknown
        for record in reader:
            if record["language"] == "und":
                unknown += 1
            elif not wanted or record["language"] in wanted:
                yield record

    shares = write_own_corpus(
        chosen(),
        out,
        max_bytes=max_bytes_per_language,
        heldout_bytes=heldout_bytes_per_language,
        heldout_share=heldout_share,
        min_bytes=min_bytes_per_language,
    )
    if not shares:
        raise UserError(
            f"no language has {min_bytes_per_language} bytes of text and a held-out document",
            where=data,
            hint=f"{unknown} records name no language: map the field (--set fields=text=...,language=...)"
            if unknown
            else "lower it with --set min_bytes_per_language=...",
        )
    primary, expanded = split_roles(
        tuple(shares), primary_cluster=primary_cluster, primary_languages=primary_languages
    )
    own_chats = tuple(code for code in shares if shares[code].chats)
    chat = own_chats or sample_chats(tuple(shares), out, questions_per_language, seed)
    CorpusRoles(primary=primary, expanded=expanded, chat=chat).save(out)
    notes = [
        f"{len(shares)} languages. Pretraining: {', '.join(primary)}. Adaptation: {', '.join(expanded)}."
    ]
    if own_chats:
        notes.append("Chats are yours.")
    else:
        notes.append(
            f"The text holds no chats, so the sample world's questions stand in for: {', '.join(chat)}."
        )
    if unknown:
        notes.append(f"{unknown} records name no language and were left out.")
    foreign = [
        f"{count} as {name}" for name, count in reader.formats.items() if name not in ("text", "messages")
    ]
    if foreign:
        notes.append(f"Records were read {', '.join(foreign)}.")
    if reader.bad:
        notes.append(f"{reader.bad} bad records were left out, the first: {reader.examples[0]}.")
    write_step_report(
        out, "Your text", [{"kind": "text", "text": " ".join(notes)}, share_table(shares, primary)]
    )


def sample_chats(codes: tuple[str, ...], out: Path, questions: int, seed: int) -> tuple[str, ...]:
    """Write the sample world's questions to a corpus and return their languages.

    They are those of `codes` that the sample world has questions in, or English.
    """
    from koine.data.sample import QUESTION_LANGUAGES, write_sample

    chat = tuple(code for code in codes if code in QUESTION_LANGUAGES) or ("en",)
    world = out / "world"
    shutil.rmtree(world, ignore_errors=True)
    write_sample(
        chat, world, seed=seed, documents_per_language=1, questions_per_language=questions, code_bytes=0
    )
    shutil.rmtree(out / "questions")
    (world / "questions").replace(out / "questions")
    shutil.rmtree(world)
    return chat


def share_table(shares: Mapping[str, LanguageShare], primary: tuple[str, ...]) -> dict[str, Any]:
    """Return the report's table of documents, bytes and chats by language."""
    from koine.languages import language

    heads = ("documents", "bytes", "held-out documents", "held-out bytes", "chats")
    return {
        "kind": "table",
        "columns": ["language", "name", "role", *heads],
        "rows": [
            [
                code,
                language(code).name,
                "primary" if code in primary else "expanded",
                share.documents,
                share.bytes,
                share.heldout_documents,
                share.heldout_bytes,
                share.chats,
            ]
            for code, share in shares.items()
        ],
    }


@step(
    version="1",
    estimate=estimates.own,
    check=checks.text_corpus,
    formerly=("koine.recipes.corpora:text_corpus",),
)
def text_corpus(
    data: Path,
    *,
    fields: tuple[str, ...],
    languages: tuple[str, ...],
    max_bytes_per_language: int,
    min_bytes_per_language: int,
    max_bad_share: float,
    record_format: str = "",
    out: Path,
) -> None:
    """Sort the user's own documents into a corpus where all languages have the same role."""
    from koine.data import RecordFormat, read_records
    from koine.languages import language

    for folder in ("documents", "documents-heldout", "questions"):
        shutil.rmtree(out / folder, ignore_errors=True)
    reader = read_records(
        data,
        fields=field_mapping(fields),
        max_bad_share=max_bad_share,
        split="all",
        carry=(),
        record_format=RecordFormat(record_format or None),
    )
    wanted = {language(code).code for code in languages}
    shares = write_own_corpus(
        (record for record in reader if not wanted or record["language"] in wanted),
        out,
        max_bytes=max_bytes_per_language,
        heldout_bytes=max(10_000, max_bytes_per_language // 10),
        heldout_share=0.05,
        min_bytes=min_bytes_per_language,
    )
    if not shares:
        raise UserError(
            f"no language has {min_bytes_per_language} bytes of text and a held-out document",
            where=data,
            hint="give more text, or lower it with --set min_bytes_per_language=...",
        )
    CorpusRoles(primary=tuple(shares), expanded=(), chat=()).save(out)
    write_step_report(
        out,
        "Text",
        [
            {
                "kind": "table",
                "columns": ["language", "documents", "bytes", "held-out documents", "held-out bytes"],
                "rows": [
                    [code, share.documents, share.bytes, share.heldout_documents, share.heldout_bytes]
                    for code, share in shares.items()
                ],
            }
        ],
    )
