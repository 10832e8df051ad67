"""Profile a model by language: compression, split letters, bits per byte, and the cost of adapting it.

Bits per byte compare models on one text. They do not compare languages, because scripts need different
numbers of bytes. Parallel text does: the bits of a text over those of its English translation say how much
harder the model finds the same content (Tsvetkov and Kipnis, arXiv 2410.02052, use the inverse).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.evaluate.bits import DocumentScore, score_documents
from koine.evaluate.bootstrap import bootstrap_interval
from koine.evaluate.language_levels import WELL, level_of
from koine.languages import language
from koine.tokenizer.measures import REFERENCE, measure
from koine.tokenizer.predict import predict_costs
from koine.tokenizer.split_characters import split_characters

if TYPE_CHECKING:
    from koine.evaluate.log_likelihood import ScoringModel
    from koine.tokenizer import Tokenizer

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ProfileText:
    """A text to profile a model on.

    Attributes:
        form: texts are parallel within a form; each form has its own English.
        parallel_id: the same in all languages of a form; None where the text is not parallel.
        scored: whether the model scores it; the tokenizer is measured on all texts.
    """

    language: str
    text: str
    form: str = "text"
    parallel_id: str | None = None
    scored: bool = True


Scores = list[tuple[ProfileText, DocumentScore]]


def profile_languages(
    model: ScoringModel,
    tokenizer: Tokenizer,
    texts: Sequence[ProfileText],
    *,
    primary: Iterable[str] = (),
    batch_size: int = 16,
    device: str = "cpu",
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Row]:
    """Return the figures of each language; a language of several forms (English) has those of its first.

    Args:
        model: a causal LM.
        tokenizer: the model's.
        texts: in any order.
        primary: languages that the model was trained on, for the cost of adapting it to the others. Empty:
            those that it serves well.
        batch_size: documents at a time.
        device: where the model is.
        resamples: of the bootstrap intervals.
        seed: of the bootstrap intervals.
        progress: is called with the share of the languages that are scored, and the next one.

    Returns:
        For each language: `form`, `documents` (scored), `bytes_per_token`, `tokens`, `bytes`,
        `unknown_share` (of the bytes), `partial_character_share` (of the tokens), `relative_tokens`
        (English: 1), `letters`, `split_share` and `single_byte_share` (of the letters), `bits_per_byte` and
        `interval`, `bits_per_english_byte` and its interval, `relative_bits` (English: 1) and its interval,
        `baseline_share` (bits of the model over those of the better of two codes that know no language: by
        letter frequencies, and of equally likely tokens), `level`,
        `document_bits` (of each scored document), `is_primary`, `adaptation_cost` (0: cheapest, 1: dearest;
        None: primary) and `letters_seen`.

    Raises:
        UserError: there is no text to score.
    """
    by_form: dict[str, dict[str, list[ProfileText]]] = defaultdict(lambda: defaultdict(list))
    for text in texts:
        by_form[text.form][text.language].append(text)
    if not any(text.scored and text.text for text in texts):
        raise UserError("no text to score", hint="give documents with text")

    def scores_of(some: Sequence[ProfileText]) -> Scores:
        scored = [text for text in some if text.scored and text.text]
        found = score_documents(
            model,
            tokenizer,
            ({"text": text.text, "language": text.language} for text in scored),
            batch_size=batch_size,
            max_length=None,
            device=device,
        )
        return list(zip(scored, found, strict=True))

    total, done = sum(len(members) for members in by_form.values()), 0
    rows: dict[str, Row] = {}
    for form, members in by_form.items():
        measured = _measure_tokens(tokenizer, members)
        english: Scores = []
        for code in sorted(members, key=lambda code: code != REFERENCE):
            if progress is not None:
                progress(done / total, code)
            done += 1
            scores = scores_of(members[code])
            english = scores if code == REFERENCE else english
            if code in rows or not scores:
                continue
            bits = _bits(scores, english, resamples=resamples, seed=seed)
            of_letters = letter_entropy(text.text for text in members[code]) * bits.pop("characters")
            of_tokens = math.log2(tokenizer.vocab_size) * bits.pop("scored_tokens")
            share = math.fsum(bits["document_bits"]) / min(of_letters, of_tokens)
            rows[code] = {"form": form, **measured[code], **bits, "baseline_share": share}
            rows[code]["level"] = level_of(rows[code])
    _add_costs(rows, tokenizer, by_form, [language(code).code for code in primary])
    return rows


def _measure_tokens(tokenizer: Tokenizer, members: Mapping[str, Sequence[ProfileText]]) -> dict[str, Row]:
    """Return the figures of the tokenizer for the languages of one form."""
    from koine.tokenizer.measures import MeasuredText

    measured = measure(
        {"": tokenizer},
        [
            MeasuredText(code, text.text, text.parallel_id)
            for code, texts in members.items()
            for text in texts
        ],
    )[""]
    rows = {}
    for code, texts in members.items():
        found, pieces = measured[code], split_characters(tokenizer, [text.text for text in texts])
        rows[code] = {
            **{name: found[name] for name in ("bytes", "tokens", "bytes_per_token")},
            **{name: found[name] for name in ("unknown_share", "partial_character_share")},
            "relative_tokens": found.get("parity"),
            "letters": pieces.letters,
            "split_share": pieces.split / max(pieces.letters, 1),
            "single_byte_share": pieces.single_bytes / max(pieces.letters, 1),
        }
    return rows


def _bits(
    own: Scores,
    english: Scores,
    *,
    resamples: int,
    seed: int,
) -> Row:
    """Return bits per byte of a language, and its bits for the same content as the English text."""

    def ratio(top: Sequence[float], bottom: Sequence[float]) -> tuple[float, list[float] | None]:
        interval = bootstrap_interval(top, bottom, resamples=resamples, seed=seed)
        return math.fsum(top) / math.fsum(bottom), None if interval is None else list(interval)

    bits = [score.nats / math.log(2.0) for _, score in own]
    row: Row = {"documents": len(own), "document_bits": [round(amount, 4) for amount in bits]}
    row["bits_per_byte"], row["interval"] = ratio(bits, [float(score.bytes) for _, score in own])
    row["characters"] = sum(len(text.text) for text, _ in own)
    row["scored_tokens"] = sum(score.tokens for _, score in own)
    there = {text.parallel_id: score for text, score in english if text.parallel_id is not None}
    pairs = [
        (amount, there[text.parallel_id])
        for (text, _), amount in zip(own, bits, strict=True)
        if text.parallel_id in there
    ]
    for name in ("relative_bits", "bits_per_english_byte"):
        row[name] = row[f"{name}_interval"] = None
        if pairs:
            top = [amount for amount, _ in pairs]
            bottom = [
                score.nats / math.log(2.0) if name == "relative_bits" else float(score.bytes)
                for _, score in pairs
            ]
            row[name], row[f"{name}_interval"] = ratio(top, bottom)
    return row


def letter_entropy(texts: Iterable[str]) -> float:
    """Return the entropy of the characters of a text, in bits a character.

    A code that knows the frequencies of this text's characters and nothing else needs as many.
    """
    counts = Counter(character for text in texts for character in text)
    total: int = counts.total()
    found: float = -math.fsum(count / total * math.log2(count / total) for count in counts.values())
    return found if found > 0 else 1e-9


def _add_costs(
    rows: dict[str, Row],
    tokenizer: Tokenizer,
    by_form: Mapping[str, Mapping[str, Sequence[ProfileText]]],
    primary: Sequence[str],
) -> None:
    """Add the predicted cost of adapting the model to each language that is not primary."""
    known = list(primary) or [code for code, row in rows.items() if row["level"] == WELL]
    for code, row in rows.items():
        row["is_primary"] = code in known
        row["adaptation_cost"] = row["letters_seen"] = None
    if not known or len(known) == len(rows):
        return
    texts = {code: [text.text for text in by_form[row["form"]][code]] for code, row in rows.items()}
    for expected in predict_costs(tokenizer, texts, primary=known):
        rows[expected.language]["adaptation_cost"] = expected.cost
        rows[expected.language]["letters_seen"] = expected.script_overlap


def scripts_of(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Return the tokenizer's figures by script: sums and weighted means over the languages written in it."""
    members: dict[str, list[Row]] = defaultdict(list)
    codes: dict[str, list[str]] = defaultdict(list)
    for code, row in rows.items():
        script = "Zzzz" if code == "und" else language(code).script
        members[script].append(row)
        codes[script].append(code)

    def share(inside: Sequence[Row], name: str, unit: str) -> float:
        whole: float = sum(row[unit] for row in inside)
        return float(sum(row[name] * row[unit] for row in inside)) / max(whole, 1.0)

    return {
        script: {
            "languages": codes[script],
            "bytes_per_token": sum(row["bytes"] for row in inside) / sum(row["tokens"] for row in inside),
            "unknown_share": share(inside, "unknown_share", "bytes"),
            "split_share": share(inside, "split_share", "letters"),
            "single_byte_share": share(inside, "single_byte_share", "letters"),
        }
        for script, inside in members.items()
    }
