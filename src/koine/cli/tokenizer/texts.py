"""Read the texts of the verbs of `koine tokenizer`, by language."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from koine.tokenizer.measures import MeasuredText


def read_measured_texts(
    paths: tuple[str, ...],
    languages: str | None,
    *,
    parallel: bool,
    split: str | None,
    max_bytes: int | None,
    max_bad_share: float,
) -> Iterator[MeasuredText]:
    """Yield the texts of records in the chosen languages, at most `max_bytes` of each.

    Records without a language are `und`. Raises `UserError` for a language or a split without text.
    """
    from koine.data.records import TRANSLATED, read_records
    from koine.errors import UserError, did_you_mean
    from koine.tokenizer.measures import REFERENCE, MeasuredText

    chosen = codes_of(languages)
    # Parity needs the English translations, whatever is reported.
    read = None if chosen is None else chosen | {REFERENCE}
    taken: dict[str, int] = {}
    present: set[str] = set()
    for path in paths:
        records = read_records(path, languages=read, max_bad_share=max_bad_share, split="all", carry=())
        for record in records:
            code = record["language"]
            if split is not None and record.get("split", split) != split:
                continue
            translated = parallel or record.get(TRANSLATED, False)
            if chosen is not None and code not in chosen and not translated:
                continue
            if max_bytes is not None and taken.get(code, 0) >= max_bytes:
                continue
            texts = [record["text"]] if "text" in record else [m["content"] for m in record["messages"]]
            for text in texts:
                taken[code] = taken.get(code, 0) + len(text.encode("utf-8"))
                yield MeasuredText(code, text, f"{record['id']}" if translated and "text" in record else None)
        present |= records.present
    where = ", ".join(paths)
    for code in sorted((chosen or set()) - taken.keys()):
        raise UserError(
            f"no text of language '{code}'"
            + (f" in the split '{split}'" if split is not None and taken else ""),
            where=where,
            hint=did_you_mean(code, present),
        )
    if split is not None and not taken:
        raise UserError(f"no record is of the split '{split}'", where=where, hint="give another --split")


def codes_of(languages: str | None) -> set[str] | None:
    """Return the canonical codes of a comma-separated list; `None` for no list."""
    from koine.languages import language

    if languages is None:
        return None
    return {language(code.strip()).code for code in languages.split(",") if code.strip()}


def texts_of(paths: tuple[str, ...], languages: str | None) -> Callable[[], Iterator[tuple[str, str]]]:
    """Return a function that yields (language, text) of the chosen languages, anew at each call.

    Its first complete pass raises `UserError` for a chosen language without text.
    """
    from koine.errors import UserError, did_you_mean

    where = ", ".join(paths)
    chosen = codes_of(languages)
    checked = False

    def read() -> Iterator[tuple[str, str]]:
        nonlocal checked
        present = set()
        for path in paths:
            for code, text in _texts(path):
                present.add(code)
                if chosen is None or code in chosen:
                    yield code, text
        if not checked:
            for code in sorted(chosen or ()):
                if code not in present:
                    raise UserError(
                        f"no text of language '{code}'", where=where, hint=did_you_mean(code, present)
                    )
            checked = True

    return read


def _texts(path: str) -> Iterator[tuple[str, str]]:
    from koine.data.records import read_records
    from koine.errors import UserError

    for record in read_records(path, carry=()):
        code = record.get("language")
        if not code:
            raise UserError("a record without a language", where=path, hint='give each record a "language"')
        if "text" in record:
            yield code, record["text"]
        else:
            for message in record["messages"]:
                yield code, message["content"]
