"""Add tokens to an existing BPE tokenizer: every old id and every old merge stays, new merges come after them.

BPE applies merges by rank, and no old merge reads a new token, so applying the old merges first and the new ones to what they leave
gives the same tokens as one list. New merges are therefore learnt on text that the old tokenizer has cut already: each old token becomes one
letter of a private alphabet, and the library's trainer learns merges of these letters.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine import __version__
from koine.errors import KoineWarning, UserError
from koine.tokenizer.control import DAMAGED, library_errors, open_backend, parsed_object, read_text
from koine.tokenizer.pretoken_counts import PretokenCounts, count_pretokens, feeding_scale, repeated
from koine.tokenizer.token_bytes import BYTE_TOKEN, SPACE_MARK
from koine.tokenizer.tokenizer import TOKENIZER, TRAINING, Tokenizer, load_tokenizer, read_files

# The private alphabet: code points from here on, without the surrogates.
_FIRST_LETTER = 0x4E00
_SURROGATES = (0xD800, 0xE000)


SAMPLE_BYTES = 200_000
"""Text of the sample that must decode as before."""
LONGEST_PRETOKEN = 4096
"""Longest pre-token, in characters or bytes as the tokenizer spells it.

Longer ones are cut, since the trainer needs time in the square of their length.
"""


@dataclass(frozen=True)
class ExtendedTokenizer:
    """A tokenizer with tokens added to it, `added_characters` of them characters that it had only as bytes or not at all."""

    tokenizer: Tokenizer
    added_tokens: int
    added_merges: int
    added_characters: int


def extend_tokenizer(
    base: Path,
    texts: Iterable[tuple[str, int]],
    *,
    new_tokens: int,
    min_frequency: int = 5,
    training: Mapping[str, Any] | None = None,
) -> ExtendedTokenizer:
    """The tokenizer of folder `base` with up to `new_tokens` more, learnt from (text, times).

    A byte-fallback vocabulary decodes `<0xE0>` only where it stands alone, so its bytes cannot be merged: the characters that the text
    has and the vocabulary lacks come first, the most frequent first (each saves two tokens or so, a merge one), then merges.

    training: what the record of the extension (`tokenizer_training.json`) says of the text, beside base, sizes and version.

    Fewer tokens than asked for are a `KoineWarning`. Raises `UserError` where `base` is no BPE tokenizer that cuts text before it merges,
    the text has nothing to add, or the result would not decode its own sample as before.
    """
    if new_tokens < 1:
        raise UserError(f"{new_tokens} new tokens", hint="ask for at least 1")
    files = read_files(base)
    if TOKENIZER in files:
        _check_kind(parsed_object(files[TOKENIZER], "not a tokenizer", base), base)
    old = load_tokenizer(base)
    content = json.loads(files[TOKENIZER])
    model = content["model"]
    vocabulary: dict[str, int] = model["vocab"]
    # Merges are learnt on the one reading that is the same every time.
    learner = open_backend(json.dumps({**content, "model": {**model, "dropout": None}}), base)
    sample: list[str] = []
    with library_errors(base, doing="the tokenizer cannot read the text", hint="extend another tokenizer"):
        table = count_pretokens(
            _watched(texts, sample),
            normalizer=learner.normalizer,
            pre_tokenizer=_cuts(learner, vocabulary),
            longest=LONGEST_PRETOKEN,
        )
    # The library's table is in the order of a hash map, another one in every process.
    table.counts = dict(sorted(table.counts.items()))
    next_id = old.vocab_size
    characters = _missing_characters(table, vocabulary, most=new_tokens, min_frequency=min_frequency)
    for character in characters:
        vocabulary[character] = next_id
        next_id += 1
    added = len(characters)
    if characters:
        learner = open_backend(json.dumps({**content, "model": {**model, "dropout": None}}), base)
    with library_errors(base, doing="the tokenizer cannot read the text", hint="extend another tokenizer"):
        letters, spelled = _spell(learner, table, model.get("unk_token"))
    merges: list[tuple[str, str]] = []
    if added < new_tokens:
        merges = _learn(
            spelled, new_tokens=new_tokens - added, min_frequency=min_frequency, letters=len(letters)
        )
    token_of = {letter: token for token, letter in letters.items()}
    listed = not model["merges"] or isinstance(model["merges"][0], list)
    taken = {*vocabulary, *old.vocabulary()}
    for left, right in merges:
        first, second = (("".join(token_of[letter] for letter in part)) for part in (left, right))
        model["merges"].append([first, second] if listed else f"{first} {second}")
        if first + second not in taken:
            taken.add(first + second)
            vocabulary[first + second] = next_id
            next_id += 1
            added += 1
    if not added:
        raise UserError(
            f"the text gives no pair of tokens that occurs {min_frequency} times",
            hint="give more text, or a lower --min-frequency",
        )
    if added < new_tokens:
        warnings.warn(
            f"the text gives {added} tokens, not {new_tokens}: no other pair occurs {min_frequency} times; "
            "give more text, a lower min_frequency or fewer tokens",
            KoineWarning,
            stacklevel=2,
        )
    _keep_added_ids(content, old, base)
    files[TOKENIZER] = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    record = {
        "koine": __version__,
        "extends": {"path": str(base), "tokenizer_sha256": old.fingerprint, "vocab_size": old.vocab_size},
        "new_tokens": new_tokens,
        "min_frequency": min_frequency,
        "added_tokens": added,
        "added_merges": len(merges),
        "added_characters": len(characters),
        **(training or {}),
    }
    files[TRAINING] = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    extended = Tokenizer(files, where=base)
    _check_kept(old, extended)
    _check_decodes(old, extended, sample, base)
    return ExtendedTokenizer(extended, added, len(merges), len(characters))


def _keep_added_ids(content: dict[str, Any], old: Tokenizer, base: Path) -> None:
    """Write the ids of the added tokens into the model's vocabulary.

    The library numbers added tokens that the vocabulary lacks anew, after all tokens of the model, whatever
    id the file gives them; those that stand in it keep the id that they have there.
    """
    vocabulary: dict[str, int] = content["model"]["vocab"]
    ids = old.vocabulary()
    for token in content.get("added_tokens") or []:
        vocabulary[token["content"]] = token["id"] = ids[token["content"]]
    content["added_tokens"] = sorted(content.get("added_tokens") or [], key=lambda token: token["id"])
    content["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    by_id: dict[int, str] = {}
    for token, token_id in vocabulary.items():
        if token_id in by_id:
            raise UserError(
                f"the tokens '{by_id[token_id]}' and '{token}' have one id, {token_id}",
                where=base,
                hint="give each token an id of its own",
            )
        by_id[token_id] = token


def trained_languages(base: Path) -> set[str] | None:
    """The languages that the record of folder `base` says it was trained on or extended by; None where there is no record."""
    path = base / TRAINING
    if not path.is_file():
        return None
    record = parsed_object(read_text(path), "not a record of training", path)
    found = [*(record.get("languages") or ()), *(record.get("base_languages") or ())]
    if not all(isinstance(code, str) for code in found):
        raise UserError("its languages are no codes", where=path, hint="the file is damaged")
    return set(found)


def _check_kind(content: Mapping[str, Any], base: Path) -> None:
    model = content.get("model")
    if not isinstance(model, dict):
        raise UserError("not a tokenizer (it has no model)", where=base, hint=DAMAGED)
    if model.get("type") != "BPE":
        raise UserError(
            f"a tokenizer of kind {model.get('type')}", where=base, hint="only BPE tokenizers can be extended"
        )
    if content.get("pre_tokenizer") is None:
        raise UserError(
            "cuts no text before it merges, so that merges could cross words",
            where=base,
            hint="extend a tokenizer with a pre-tokenizer",
        )
    if model.get("continuing_subword_prefix"):
        raise UserError(
            f"marks the inside of words with '{model['continuing_subword_prefix']}'",
            where=base,
            hint="extend a byte-level or byte-fallback BPE tokenizer",
        )


def _cuts(backend: Any, vocabulary: Mapping[str, int]) -> Any:
    """The tokenizer's cuts; where it writes spaces as `▁`, also one before these, since Gemma's cuts only where a space is left."""
    from tokenizers import Regex, pre_tokenizers

    if SPACE_MARK not in vocabulary:
        return backend.pre_tokenizer
    words = pre_tokenizers.Split(Regex(f"{SPACE_MARK}*[^{SPACE_MARK}]+|{SPACE_MARK}+"), behavior="isolated")
    return pre_tokenizers.Sequence([backend.pre_tokenizer, words])


def _watched(texts: Iterable[tuple[str, int]], sample: list[str]) -> Iterator[tuple[str, int]]:
    """The texts as they are; the first `SAMPLE_BYTES` of them also go into `sample`."""
    size = 0
    for text, times in texts:
        if size < SAMPLE_BYTES:
            part = text[: SAMPLE_BYTES - size]
            size += len(part.encode("utf-8"))
            sample.append(part)
        yield text, times


def _missing_characters(
    table: PretokenCounts, vocabulary: Mapping[str, int], *, most: int, min_frequency: int
) -> list[str]:
    """Up to `most` characters of the pre-tokens that are no tokens, the most frequent first; none in a byte-level vocabulary."""
    found: Counter[str] = Counter()
    for word, count in table.counts.items():
        for character in word:
            if character not in vocabulary:
                found[character] += count
    ordered = sorted(found, key=lambda character: (-found[character], character))
    return [character for character in ordered if found[character] >= min_frequency][:most]


def _spell(backend: Any, table: PretokenCounts, unknown: str | None) -> tuple[dict[str, str], PretokenCounts]:
    """The private letter of each old token that occurs, and the table with its pre-tokens spelled in letters.

    A pre-token ends at a token that must not be merged: a byte that is written out, unknown text.
    """
    letters: dict[str, str] = {}
    spelled = PretokenCounts(occurrences=table.occurrences)
    fallback = bool(getattr(backend.model, "byte_fallback", False))
    for word, count in table.counts.items():
        parts = [""]
        for token in backend.model.tokenize(word):
            value = token.value
            if value == unknown or (fallback and BYTE_TOKEN.fullmatch(value)):
                parts.append("")
                continue
            if value not in letters:
                letters[value] = _letter(len(letters))
            parts[-1] += letters[value]
        for text in parts:
            if text:
                spelled.counts[text] = spelled.counts.get(text, 0) + count
    return letters, spelled


def _letter(index: int) -> str:
    place = _FIRST_LETTER + index
    return chr(place if place < _SURROGATES[0] else place + _SURROGATES[1] - _SURROGATES[0])


def _learn(
    table: PretokenCounts, *, new_tokens: int, min_frequency: int, letters: int
) -> list[tuple[str, str]]:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    scale = feeding_scale(table)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    trainer = trainers.BpeTrainer(
        vocab_size=letters + new_tokens,
        min_frequency=max(1, round(min_frequency * scale)),
        show_progress=False,
    )
    backend.train_from_iterator(repeated(table, scale), trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def _check_kept(old: Tokenizer, new: Tokenizer) -> None:
    """Every old token has its old id in the new vocabulary; anything else is a bug of ours."""
    before, after = old.vocabulary(), new.vocabulary()
    moved = [token for token, token_id in before.items() if after.get(token) != token_id]
    if moved:
        raise RuntimeError(f"extending moved the ids of {len(moved)} tokens, the first is {moved[0]!r}")


def _check_decodes(old: Tokenizer, new: Tokenizer, sample: Sequence[str], base: Path) -> None:
    """Text goes to ids and back as it did before; where the old tokenizer lost some of it, the new one may lose less."""
    for text in sample:
        decoded = new.decode(new.encode(text))
        before = old.decode(old.encode(text))
        if decoded not in (before, text) and (old.lossless or len(decoded) < len(before)):
            raise UserError(
                f"extended, it would decode '{text[:30]}' to '{decoded[:30]}'",
                where=base,
                hint="extend a byte-level or byte-fallback BPE tokenizer",
            )
