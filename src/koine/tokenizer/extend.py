"""Add tokens to an existing BPE tokenizer; all old ids and old merges stay.

BPE applies merges by rank, and no old merge reads a new token. So applying the old merges first and the new
ones to their result gives the same tokens as one list. New merges are therefore learnt on text that the old
tokenizer has already cut: each old token becomes one letter of a private alphabet, and the library's trainer
learns merges of these letters.
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
from koine.fields import check_integer
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
    """A tokenizer with added tokens, and their numbers."""

    tokenizer: Tokenizer
    added_tokens: int
    added_merges: int
    added_characters: int
    """Those of the added tokens that are characters which the old vocabulary lacked or had only as bytes."""


def extend_tokenizer(
    base: str | Path,
    texts: Iterable[str | tuple[str, int]],
    *,
    new_tokens: int,
    min_frequency: int = 5,
    training: Mapping[str, Any] | None = None,
) -> ExtendedTokenizer:
    """Add up to `new_tokens` tokens, learnt from `texts`, to the tokenizer in folder `base`.

    A byte-fallback vocabulary decodes `<0xE0>` only where it stands alone, so its bytes cannot be merged.
    There, characters that the text has and the vocabulary lacks are added first, the most frequent first
    (each saves about two tokens, a merge saves one). Merges follow.

    Example:
        >>> from koine.tokenizer import extend_tokenizer
        >>> extended = extend_tokenizer("tokenizer", korean_texts, new_tokens=2000)
        >>> extended.tokenizer.save("tokenizer-ko")

    Args:
        base: folder with a `tokenizer.json`.
        texts: texts, or (text, times to count it).
        new_tokens: tokens to add; fewer, with a `KoineWarning`, where the text gives fewer.
        min_frequency: a pair is merged, or a character added, only if it occurs this often.
        training: fields about the text for the record `tokenizer_training.json`.

    Raises:
        UserError: `base` is no BPE tokenizer with a pre-tokenizer, the text has nothing to add, or the result
            would not decode a sample of the text as before.
    """
    check_integer("new_tokens", new_tokens, low=1)
    base = Path(base)
    files = read_files(base)
    if TOKENIZER in files:
        _check_kind(parsed_object(files[TOKENIZER], "not a tokenizer", base), base)
    old = load_tokenizer(base)
    content = json.loads(files[TOKENIZER])
    sample: list[str] = []
    characters, merges = _learn_additions(
        content, _watched(texts, sample), base, new_tokens=new_tokens, min_frequency=min_frequency
    )
    added = _add_to_model(content["model"], old, characters, merges)
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


def _learn_additions(
    content: Mapping[str, Any],
    texts: Iterable[tuple[str, int]],
    base: Path,
    *,
    new_tokens: int,
    min_frequency: int,
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the characters and the merges (pairs of old or merged tokens) to add to a `tokenizer.json`."""
    model = content["model"]
    vocabulary = dict(model["vocab"])

    def learner() -> Any:
        # Without dropout, the tokenizer cuts a text the same way every time.
        return open_backend(
            json.dumps({**content, "model": {**model, "vocab": vocabulary, "dropout": None}}), base
        )

    cutting = learner()
    with library_errors(base, doing="the tokenizer cannot read the text", hint="extend another tokenizer"):
        table = count_pretokens(
            texts,
            normalizer=cutting.normalizer,
            pre_tokenizer=_cuts(cutting, vocabulary),
            longest=LONGEST_PRETOKEN,
        )
    # The library's table has the order of a hash map, which differs between processes.
    table.counts = dict(sorted(table.counts.items()))
    characters = _missing_characters(table, vocabulary, most=new_tokens, min_frequency=min_frequency)
    if characters:
        first = max(vocabulary.values(), default=-1) + 1
        vocabulary |= {character: first + place for place, character in enumerate(characters)}
        cutting = learner()
    with library_errors(base, doing="the tokenizer cannot read the text", hint="extend another tokenizer"):
        letters, spelled = _spell(cutting, table, model.get("unk_token"))
    if len(characters) >= new_tokens:
        return characters, []
    pairs = _learn(
        spelled,
        new_tokens=new_tokens - len(characters),
        min_frequency=min_frequency,
        letters=len(letters),
    )
    token_of = {letter: token for token, letter in letters.items()}

    def token(letters: str) -> str:
        return "".join(token_of[letter] for letter in letters)

    return characters, [(token(left), token(right)) for left, right in pairs]


def _add_to_model(
    model: dict[str, Any], old: Tokenizer, characters: Sequence[str], merges: Sequence[tuple[str, str]]
) -> int:
    """Add characters and merges to the `model` of a `tokenizer.json`; return the number of new tokens."""
    vocabulary: dict[str, int] = model["vocab"]
    listed = not model["merges"] or isinstance(model["merges"][0], list)
    taken = {*vocabulary, *old.vocabulary()}
    new = list(characters)
    for first, second in merges:
        model["merges"].append([first, second] if listed else f"{first} {second}")
        if first + second not in taken:
            taken.add(first + second)
            new.append(first + second)
    vocabulary.update({token: old.vocab_size + place for place, token in enumerate(new)})
    return len(new)


def _keep_added_ids(content: dict[str, Any], old: Tokenizer, base: Path) -> None:
    """Write the ids of the added tokens into the model's vocabulary.

    The library gives added tokens that the vocabulary lacks new ids, after all tokens of the model, whatever
    the file says. Added tokens in the vocabulary keep their ids.
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
    """Return the languages that folder `base` was trained on or extended by, from its record.

    `None` where there is no record.
    """
    path = base / TRAINING
    if not path.is_file():
        return None
    record = parsed_object(read_text(path), "not a record of training", path)
    found = [*(record.get("languages") or ()), *(record.get("base_languages") or ())]
    if not all(isinstance(code, str) for code in found):
        raise UserError("its languages are no codes", where=path, hint="the file is damaged")
    return set(found)


def _check_kind(content: Mapping[str, Any], base: Path) -> None:
    """Raise `UserError` for a `tokenizer.json` that is no BPE with a pre-tokenizer."""
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
    """Return the tokenizer's pre-tokenizer, with a cut before each `▁` where it writes spaces as `▁`.

    Gemma's own pre-tokenizer cuts only at spaces, and its normalizer leaves none.
    """
    from tokenizers import Regex, pre_tokenizers

    if SPACE_MARK not in vocabulary:
        return backend.pre_tokenizer
    words = pre_tokenizers.Split(Regex(f"{SPACE_MARK}*[^{SPACE_MARK}]+|{SPACE_MARK}+"), behavior="isolated")
    return pre_tokenizers.Sequence([backend.pre_tokenizer, words])


def _watched(texts: Iterable[str | tuple[str, int]], sample: list[str]) -> Iterator[tuple[str, int]]:
    """Yield (text, times); the first `SAMPLE_BYTES` of the texts also go into `sample`."""
    size = 0
    for one in texts:
        text, times = (one, 1) if isinstance(one, str) else one
        if size < SAMPLE_BYTES:
            part = text[: SAMPLE_BYTES - size]
            size += len(part.encode("utf-8"))
            sample.append(part)
        yield text, times


def _missing_characters(
    table: PretokenCounts, vocabulary: Mapping[str, int], *, most: int, min_frequency: int
) -> list[str]:
    """Return up to `most` characters of the pre-tokens that are no tokens, the most frequent first.

    A byte-level vocabulary lacks none.
    """
    found: Counter[str] = Counter()
    for word, count in table.counts.items():
        for character in word:
            if character not in vocabulary:
                found[character] += count
    ordered = sorted(found, key=lambda character: (-found[character], character))
    return [character for character in ordered if found[character] >= min_frequency][:most]


def _spell(backend: Any, table: PretokenCounts, unknown: str | None) -> tuple[dict[str, str], PretokenCounts]:
    """Return the private letter of each old token that occurs, and the pre-tokens spelled in these letters.

    A pre-token is split at tokens that must not be merged: bytes written out as `<0xE0>`, and unknown text.
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
    """Learn merges of private letters from spelled pre-tokens."""
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
    """Check that every old token kept its id; anything else is a bug of ours."""
    before, after = old.vocabulary(), new.vocabulary()
    moved = [token for token, token_id in before.items() if after.get(token) != token_id]
    if moved:
        raise RuntimeError(f"extending moved the ids of {len(moved)} tokens, the first is {moved[0]!r}")


def _check_decodes(old: Tokenizer, new: Tokenizer, sample: Sequence[str], base: Path) -> None:
    """Raise `UserError` where a sample does not decode as before.

    Where the old tokenizer lost some of a text, the new one may lose less.
    """
    for text in sample:
        decoded = new.decode(new.encode(text))
        before = old.decode(old.encode(text))
        if decoded not in (before, text) and (old.lossless or len(decoded) < len(before)):
            raise UserError(
                f"extended, it would decode '{text[:30]}' to '{decoded[:30]}'",
                where=base,
                hint="extend a byte-level or byte-fallback BPE tokenizer",
            )
