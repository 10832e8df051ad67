"""Add tokens to an existing BPE tokenizer: every old id and every old merge stays, new merges come after them.

BPE applies merges by rank, and no old merge reads a new token, so applying the old merges first and the new ones to what they leave
gives the same tokens as one list. New merges are therefore learnt on text that the old tokenizer has cut already: each old token becomes one
letter of a private alphabet, and the library's trainer learns merges of these letters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.tokenizer.counting import PretokenCounts, count_pretokens, feeding_scale, repeated
from koine.tokenizer.tokenizer import TOKENIZER, TRAINING, Tokenizer, load_tokenizer, read_files

# The private alphabet: code points from here on, without the surrogates.
_FIRST_LETTER = 0x4E00
_SURROGATES = (0xD800, 0xE000)


@dataclass(frozen=True)
class Extended:
    """A tokenizer with tokens added to it."""

    tokenizer: Tokenizer
    added_tokens: int
    added_merges: int


def extend_tokenizer(
    base: Path,
    texts: Iterable[tuple[str, int]],
    *,
    new_tokens: int,
    min_frequency: int = 5,
    training: Mapping[str, Any] | None = None,
) -> Extended:
    """The tokenizer of folder `base` with up to `new_tokens` more, learnt from (text, times).

    Raises `UserError` where `base` is no BPE tokenizer that cuts text before it merges, or the text has nothing to add.
    """
    if new_tokens < 1:
        raise UserError(f"{new_tokens} new tokens", mend="ask for at least 1")
    content = json.loads((base / TOKENIZER).read_text(encoding="utf-8"))
    model = content.get("model", {})
    if model.get("type") != "BPE":
        raise UserError(
            f"a tokenizer of kind {model.get('type')}", where=base, mend="only BPE tokenizers can be extended"
        )
    if content.get("pre_tokenizer") is None:
        raise UserError(
            "cuts no text before it merges, so that merges could cross words",
            where=base,
            mend="extend a tokenizer with a pre-tokenizer",
        )
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(base / TOKENIZER))
    table = count_pretokens(texts, normalizer=backend.normalizer, pre_tokenizer=backend.pre_tokenizer)
    letters, spelled = _spell(backend, table)
    merges = _learn(spelled, new_tokens=new_tokens, min_frequency=min_frequency, letters=len(letters))
    token_of = {letter: token for token, letter in letters.items()}
    vocabulary: dict[str, int] = model["vocab"]
    listed = bool(model["merges"]) and isinstance(model["merges"][0], list)
    taken = [*vocabulary.values(), *(token["id"] for token in content.get("added_tokens", []))]
    next_id = max(taken) + 1
    added = 0
    for left, right in merges:
        first, second = (("".join(token_of[letter] for letter in part)) for part in (left, right))
        model["merges"].append([first, second] if listed or not model["merges"] else f"{first} {second}")
        if first + second not in vocabulary:
            vocabulary[first + second] = next_id + added
            added += 1
    if not added:
        raise UserError(
            f"the text gives no pair of tokens that occurs {min_frequency} times",
            mend="give more text, or a lower --min-frequency",
        )
    files = read_files(base)
    files[TOKENIZER] = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    if training is not None:
        files[TRAINING] = json.dumps(training, ensure_ascii=False, indent=2) + "\n"
    extended = Tokenizer(files, where=base)
    _check_kept(load_tokenizer(base), extended)
    return Extended(extended, added, len(merges))


def _spell(backend: Any, table: PretokenCounts) -> tuple[dict[str, str], PretokenCounts]:
    """The private letter of each old token that occurs, and the table with its pre-tokens spelled in letters."""
    letters: dict[str, str] = {}
    spelled = PretokenCounts(occurrences=table.occurrences)
    for word, count in table.counts.items():
        text = ""
        for token in backend.model.tokenize(word):
            if token.value not in letters:
                letters[token.value] = _letter(len(letters))
            text += letters[token.value]
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
