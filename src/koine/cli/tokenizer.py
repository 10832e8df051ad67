"""`koine tokenizer`: language weights, training, measures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from koine.tokenizer.measures import Unit

SCHEMES = ("bucketed", "natural", "uniform", "temperature")
BUCKET_MASSES = ("uniform", "data")
INITIALISATIONS = ("random", "mean", "subword-mean", "focus", "distill")


class EnglishShare(click.ParamType[float | None]):
    """A number between 0 and 1, or `none`."""

    name = "SHARE|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if value is None or str(value).lower() == "none":
            return None
        try:
            return float(value)
        except ValueError:
            self.fail(f"'{value}' is neither a number nor 'none'", param, ctx)


def weighting(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which text is read and how its languages are weighted."""
    for option in reversed(
        [
            click.option(
                "--data",
                multiple=True,
                required=True,
                type=click.Path(),
                help="Text with a language per record (file or folder); may be repeated.",
            ),
            click.option(
                "--languages", help="Only these codes, with commas between.  [default: all in the data]"
            ),
            click.option(
                "--scheme",
                type=click.Choice(SCHEMES),
                default="bucketed",
                show_default=True,
                help="How languages are weighted.",
            ),
            click.option(
                "--bucket-mass",
                type=click.Choice(BUCKET_MASSES),
                default="uniform",
                show_default=True,
                help="Mass of a bucket of languages of one family and script.",
            ),
            click.option(
                "--english-share",
                type=EnglishShare(),
                default="0.30",
                show_default=True,
                help="Share of English where it is among others; 'none' leaves it to the scheme.",
            ),
            click.option(
                "--temperature",
                default=3.0,
                show_default=True,
                help="Only for --scheme temperature: share^(1/T).",
            ),
            click.option(
                "--sample-bytes", type=int, help="Bytes of text to train on.  [default: as many as there are]"
            ),
            click.option(
                "--max-repeats",
                default=10.0,
                show_default=True,
                help="Read a language at most this many times.",
            ),
        ]
    ):
        command = option(command)
    return command


@click.group()
def tokenizer() -> None:
    """Train tokenizers, compare them, move models to them."""


@tokenizer.command()
@weighting
@click.option(
    "--vocab-size", type=int, default=32000, show_default=True, help="Number of ids, specials included."
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the tokenizer to."
)
@click.option("--min-frequency", default=5, show_default=True, help="Merge only pairs that occur this often.")
@click.option("--seed", default=0, show_default=True, help="Seed of the choice of texts.")
def train(
    data: tuple[str, ...],
    languages: str | None,
    scheme: Any,
    bucket_mass: Any,
    english_share: float | None,
    temperature: float,
    sample_bytes: int | None,
    max_repeats: float,
    vocab_size: int,
    out: Path,
    min_frequency: int,
    seed: int,
) -> None:
    """Train a byte-level BPE tokenizer on weighted languages."""
    from koine.errors import UserError
    from koine.files import atomic_directory
    from koine.tokenizer.special import SMALLEST_VOCABULARY

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocab_size} is smaller than the alphabet",
            where="--vocab-size",
            mend=f"take at least {SMALLEST_VOCABULARY} (special tokens and 256 bytes)",
        )
    with atomic_directory(out) as folder:
        from koine.tokenizer import train_tokenizer

        trained = train_tokenizer(
            texts_of(data, languages),
            vocab_size=vocab_size,
            scheme=scheme,
            bucket_mass=bucket_mass,
            english_share=english_share,
            temperature=temperature,
            min_frequency=min_frequency,
            sample_bytes=sample_bytes,
            max_repeats=max_repeats,
            seed=seed,
            show_progress=True,
            data=data,
        )
        trained.save(folder)
    click.echo(f"{trained.vocab_size:,} tokens written to {out}")


@tokenizer.command()
@weighting
def weights(
    data: tuple[str, ...],
    languages: str | None,
    scheme: Any,
    bucket_mass: Any,
    english_share: float | None,
    temperature: float,
    sample_bytes: int | None,
    max_repeats: float,
) -> None:
    """Show how much of each language a tokenizer would be trained on, and how often it would be read."""
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table

    from koine.languages import bucket
    from koine.tokenizer.sampling import count_bytes, quotas
    from koine.tokenizer.weights import language_weights

    sizes = count_bytes(texts_of(data, languages))
    shares = language_weights(
        sizes, scheme=scheme, bucket_mass=bucket_mass, english_share=english_share, temperature=temperature
    )
    drawn = quotas(sizes, shares, sample_bytes=sample_bytes, max_repeats=max_repeats)
    total = sum(sizes.values())
    largest = max(shares.values())
    table = Table(title=f"{len(sizes)} languages, {total:,} bytes, {scheme}", title_justify="left")
    for name in ("language", "bytes", "share", "bucket", "weight", "read", ""):
        table.add_column(name, justify="right" if name in ("bytes", "share", "weight", "read") else "left")
    for code in sorted(shares, key=lambda code: (-shares[code], code)):
        key = bucket(code)
        table.add_row(
            code,
            f"{sizes[code]:,}",
            f"{sizes[code] / total:.2%}",
            key if isinstance(key, str) else " / ".join(map(str, key)),
            f"{shares[code]:.2%}",
            f"{drawn[code] / sizes[code]:.2f}×",
            Bar(largest, 0.0, shares[code], width=8),
        )
    Console().print(table)


@tokenizer.command()
@click.argument("tokenizers", nargs=-1, required=True)
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(),
    help="Text with a language per record, or with a text per language in each record (parallel); may be repeated.",
)
@click.option("--languages", help="Only these codes, with commas between.  [default: all in the data]")
@click.option(
    "--parallel", is_flag=True, help="Records of different languages with equal ids are translations."
)
@click.option("--split", help="Only records whose field 'split' says this.")
@click.option("--max-bytes", type=int, help="At most this many bytes of each language.  [default: all]")
@click.option("--price", type=float, help="Price of a million tokens, for the cost of a megabyte.")
@click.option(
    "--max-bad", default=0.01, show_default=True, help="Stop where a larger share of records is bad."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the measures as JSON to this file.")
@click.option(
    "--report", type=click.Path(path_type=Path), help="Write tables and heat maps as HTML to this file."
)
def measure(
    tokenizers: tuple[str, ...],
    data: tuple[str, ...],
    languages: str | None,
    parallel: bool,
    split: str | None,
    max_bytes: int | None,
    price: float | None,
    max_bad: float,
    out: Path | None,
    report: Path | None,
) -> None:
    """Compare TOKENIZERS on the same text: folders with tokenizer.json, folders of transformers, .tiktoken files, SentencePiece .model files.

    Bytes per token, tokens per word, parity with English on parallel text, Gini over languages, Rényi efficiency, partial characters, the
    vocabulary by script, speed. The definitions are in docs/tokenizer.md.
    """
    from koine.errors import UserError
    from koine.files import write_json
    from koine.tokenizer.foreign import open_tokenizer
    from koine.tokenizer.measures import measure as measure_tokenizers

    for target in (out, report):
        if target is not None and not target.parent.is_dir():
            raise UserError("no such folder", where=target.parent, mend="make it first, or choose another")
    names = [str(Path(name)) for name in tokenizers]
    if len(set(names)) < len(names):
        raise UserError("a tokenizer is given twice", mend="give each once")
    opened = {name: open_tokenizer(name) for name in names}
    result = measure_tokenizers(
        opened,
        units_of(data, languages, parallel=parallel, split=split, max_bytes=max_bytes, max_bad_share=max_bad),
        languages=codes_of(languages),
        price_per_million=price,
    )
    if out is not None:
        write_json(out, result)
    if report is not None:
        from koine.plan.report import write_page
        from koine.tokenizer.comparison import blocks

        rows = result[names[0]].values()
        facts = [
            ("Languages", str(result[names[0]]["overall"]["languages"])),
            ("Text", f"{sum(row['bytes'] for row in rows if 'languages' not in row) / 1e6:.1f} MB"),
            ("Tokenizers", str(len(names))),
        ]
        write_page(
            report, name="Tokenizers side by side", sections=[("Comparison", blocks(result))], facts=facts
        )
    show_measures(result)
    for target in (out, report):
        if target is not None:
            click.echo(f"written to {target}")


@tokenizer.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer", "target", type=click.Path(path_type=Path), required=True, help="The tokenizer to move to."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write the model to.")
@click.option(
    "--init",
    type=click.Choice(INITIALISATIONS),
    default="subword-mean",
    show_default=True,
    help="First guess for the rows of new tokens.",
)
@click.option("--text", multiple=True, type=click.Path(), help="Text to learn from, for focus and distill.")
@click.option(
    "--max-bytes", default=2_000_000, show_default=True, help="Bytes of that text of each language."
)
@click.option("--seed", default=0, show_default=True, help="Seed of random and distill.")
def adapt(
    model: Path, target: Path, out: Path, init: Any, text: tuple[str, ...], max_bytes: int, seed: int
) -> None:
    """Move MODEL, any causal language model with a tokenizer.json, to another tokenizer.

    Shared tokens keep their rows. Where the new vocabulary holds the whole old one, moving back gives the old weights again.
    """
    from koine.files import atomic_directory
    from koine.model.vocabulary import move_model

    texts = None
    if text:
        units = units_of(text, None, parallel=False, split=None, max_bytes=max_bytes, max_bad_share=0.01)
        texts = (unit.text for unit in units)
    with atomic_directory(out) as folder:
        moved = move_model(model, target, folder, method=init, texts=texts, seed=seed)
    click.echo(
        f"{moved.rows:,} tokens: {moved.shared:,} keep their rows, {moved.spelled:,} are new ({init}), "
        f"{moved.unspelled:,} have no spelling (mean); {moved.dropped:,} old tokens dropped"
        + (f"; {moved.padding:,} rows of padding kept" if moved.padding else "")
        + (": moving back gives the old weights again" if moved.reversible else "")
    )
    click.echo(f"written to {out}")


@tokenizer.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, required=True, type=click.Path(), help="Text in the languages to add.")
@click.option("--languages", help="Only these codes, with commas between.  [default: all in the data]")
@click.option("--tokens", type=int, required=True, help="How many tokens to add.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the tokenizer to."
)
@click.option("--min-frequency", default=5, show_default=True, help="Merge only pairs that occur this often.")
@click.option(
    "--compare", is_flag=True, help="Also train a tokenizer of the same size from scratch, and compare."
)
@click.option(
    "--heldout",
    multiple=True,
    type=click.Path(),
    help="Text to measure on.  [default: every 20th text of --data, which is not learnt from]",
)
def extend(
    base: Path,
    data: tuple[str, ...],
    languages: str | None,
    tokens: int,
    out: Path,
    min_frequency: int,
    compare: bool,
    heldout: tuple[str, ...],
) -> None:
    """Add tokens to the BPE tokenizer BASE for more languages, keeping every old id and every old merge.

    Other languages of the data that BASE was trained on are measured too, and the tokenizer of --compare learns them with the new ones.
    """
    from koine.errors import KoineWarning
    from koine.files import atomic_directory
    from koine.tokenizer import load_tokenizer, train_tokenizer
    from koine.tokenizer.extend import extend_tokenizer, trained_languages
    from koine.tokenizer.foreign import open_tokenizer
    from koine.tokenizer.heldout import EVERY, split_texts
    from koine.tokenizer.measures import Unit
    from koine.tokenizer.measures import measure as measure_tokenizers
    from koine.tokenizer.sampling import count_bytes
    from koine.tokenizer.spelling import AnyTokenizer

    load_tokenizer(base)
    known = trained_languages(base)
    new_text = split_texts(texts_of(data, languages), heldout=False, every=None if heldout else EVERY)
    sizes = count_bytes(new_text)
    everything = texts_of(data, None)
    present = count_bytes(everything)
    old = sorted(code for code in present if code not in sizes and (known is None or code in known))
    chosen = ",".join([*sizes, *old])
    if heldout:
        measured = texts_of(heldout, None)
        scratch_text = texts_of(data, chosen)
    else:
        measured = split_texts(texts_of(data, chosen), heldout=True)
        scratch_text = split_texts(texts_of(data, chosen), heldout=False)
    with atomic_directory(out) as folder:
        extended = extend_tokenizer(
            base,
            ((text, 1) for _, text in new_text()),
            new_tokens=tokens,
            min_frequency=min_frequency,
            training={
                "data": list(data),
                "languages": {code: {"bytes": size} for code, size in sizes.items()},
                "base_languages": sorted(known or ()),
                "sample": "all texts" if heldout else f"all but every {EVERY}th text of each language",
                "seed": None,
            },
        )
        extended.tokenizer.save(folder)
        opened: dict[str, AnyTokenizer] = {"before": open_tokenizer(base), "extended": extended.tokenizer}
        if compare:
            if not old:
                warnings.warn(
                    "the data has no text of the base's languages, so that the tokenizer from scratch learns the added ones alone; "
                    "give it with --data, and name the added languages with --languages",
                    KoineWarning,
                    stacklevel=2,
                )
            opened["from scratch"] = train_tokenizer(
                scratch_text,
                vocab_size=extended.tokenizer.vocab_size,
                min_frequency=min_frequency,
                scheme="natural",
                english_share=None,
            )
    click.echo(
        f"{extended.added_tokens:,} tokens ({extended.added_characters:,} of them characters) and {extended.added_merges:,} merges added; "
        f"written to {out}"
    )
    added_codes = ", ".join(sizes)
    click.echo(f"added languages: {added_codes}; the base's: {', '.join(old) or 'none in the data'}")
    if compare:
        click.echo(
            f"from scratch: {opened['from scratch'].vocab_size:,} tokens learnt from {', '.join([*sizes, *old])}, weighted as they are"
        )
    units = [Unit(code, text) for code, text in measured()]
    if not units:
        warnings.warn(
            "too little text to hold any out; nothing is measured; give --heldout", KoineWarning, stacklevel=2
        )
        return
    click.echo(f"measured on {', '.join(heldout) or f'every {EVERY}th text, which nothing was learnt from'}:")
    show_measures(measure_tokenizers(opened, units))


@tokenizer.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, required=True, type=click.Path(), help="Text of all these languages.")
@click.option("--primary", required=True, help="Codes of the languages that the model was pretrained on.")
@click.option("--max-bytes", default=200_000, show_default=True, help="Bytes of each language to look at.")
def predict(base: Path, data: tuple[str, ...], primary: str, max_bytes: int) -> None:
    """Rank languages by how dear it will be to adapt a model with the tokenizer BASE to them, before any training."""
    from rich.console import Console
    from rich.table import Table

    from koine.languages import language
    from koine.tokenizer.foreign import open_tokenizer
    from koine.tokenizer.predict import predict_costs

    texts: dict[str, list[str]] = {}
    for unit in units_of(data, None, parallel=False, split=None, max_bytes=max_bytes, max_bad_share=0.01):
        texts.setdefault(unit.language, []).append(unit.text)
    codes = [language(code.strip()).code for code in primary.split(",") if code.strip()]
    table = Table(title="expected cost of adaptation, the dearest first")
    for name in ("language", "name", "tokens per byte", "letters seen", "cost"):
        table.add_column(name, justify="left" if name in ("language", "name") else "right")
    for one in predict_costs(open_tokenizer(base), texts, primary=codes):
        name = language(one.language).name if one.language != "und" else "unknown"
        table.add_row(
            one.language, name, f"{one.tokens_per_byte:.3f}", f"{one.script_overlap:.0%}", f"{one.cost:.2f}"
        )
    Console().print(table)


def show_measures(result: dict[str, dict[str, Any]]) -> None:
    """The means over languages and bytes per token of each language, a tokenizer a column, in as many tables as the terminal is wide for."""
    from rich.console import Console
    from rich.table import Table

    from koine.tokenizer.comparison import is_group, table

    console = Console()
    names = short_names(list(result))
    columns, rows = table(result)
    by_measure = list(zip(columns[1:], *(row[1:] for row in rows), strict=True))
    codes = [code for code in next(iter(result.values())) if not is_group(code)]
    with_parity = any("parity" in rows_of[code] for rows_of in result.values() for code in codes)

    def cell(name: str, code: str) -> str:
        parity = result[name][code].get("parity")
        return f"{result[name][code]['bytes_per_token']:.2f}" + ("" if parity is None else f" ({parity:.2f})")

    widest = max((len(name) for name in columns), default=0)
    column = min(24, max(12, *map(len, names.values())))
    most = max(1, (console.width - widest - 5) // (column + 3))
    for start in range(0, len(result), most):
        shown = list(result)[start : start + most]
        overall = Table()
        overall.add_column("measure", no_wrap=True)
        by_language = Table()
        by_language.add_column("language")
        for name in shown:
            for one in (overall, by_language):
                one.add_column(names[name], justify="right", overflow="fold", max_width=column)
        for measure_name, *values in by_measure:
            overall.add_row(measure_name, *values[start : start + most])
        for code in codes:
            by_language.add_row(code, *(cell(name, code) for name in shown))
        # As lines: a table breaks its title at its own width.
        console.print("means over languages")
        console.print(overall)
        console.print("bytes per token" + (" (parity with English)" if with_parity else ""))
        console.print(by_language)


def short_names(paths: list[str]) -> dict[str, str]:
    """The last parts of paths, as many as tell them apart."""
    longest = max(len(Path(path).parts) for path in paths)
    for count in range(1, longest + 1):
        names = {path: str(Path(*Path(path).parts[-count:])) for path in paths}
        if len(set(names.values())) == len(paths):
            break
    return names


def units_of(
    paths: tuple[str, ...],
    languages: str | None,
    *,
    parallel: bool,
    split: str | None,
    max_bytes: int | None,
    max_bad_share: float,
) -> Iterator[Unit]:
    """The text of records, in the chosen languages, at most `max_bytes` of each; records without a language are `und`."""
    from koine.data.records import TRANSLATED, read_records
    from koine.errors import UserError, did_you_mean
    from koine.tokenizer.measures import REFERENCE, Unit

    chosen = codes_of(languages)
    # Parity needs the English translations, whatever is reported.
    read = None if chosen is None else chosen | {REFERENCE}
    taken: dict[str, int] = {}
    present: set[str] = set()
    for path in paths:
        records = read_records(path, languages=read, max_bad_share=max_bad_share, split="all")
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
                yield Unit(code, text, f"{record['id']}" if translated and "text" in record else None)
        present |= records.present
    where = ", ".join(paths)
    for code in sorted((chosen or set()) - taken.keys()):
        raise UserError(
            f"no text of language '{code}'"
            + (f" in the split '{split}'" if split is not None and taken else ""),
            where=where,
            mend=did_you_mean(code, present),
        )
    if split is not None and not taken:
        raise UserError(f"no record is of the split '{split}'", where=where, mend="give another --split")


def codes_of(languages: str | None) -> set[str] | None:
    """The canonical codes of a list with commas; None for no list."""
    from koine.languages import language

    if languages is None:
        return None
    return {language(code.strip()).code for code in languages.split(",") if code.strip()}


def texts_of(paths: tuple[str, ...], languages: str | None) -> Callable[[], Iterator[tuple[str, str]]]:
    """A function that reads (language, text) of the chosen languages anew at each call."""
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
                        f"no text of language '{code}'", where=where, mend=did_you_mean(code, present)
                    )
            checked = True

    return read


def _texts(path: str) -> Iterator[tuple[str, str]]:
    from koine.data.records import read_records
    from koine.errors import UserError

    for record in read_records(path):
        code = record.get("language")
        if not code:
            raise UserError("a record without a language", where=path, mend='give each record a "language"')
        if "text" in record:
            yield code, record["text"]
        else:
            for message in record["messages"]:
                yield code, message["content"]
