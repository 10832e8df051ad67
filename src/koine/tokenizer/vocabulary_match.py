"""Match two vocabularies: tokens that both have, and spellings of the others in old tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from koine.tokenizer.token_bytes import AnyTokenizer, exact_ids


@dataclass(frozen=True)
class VocabularyMatch:
    """Relation of a new vocabulary to an old one."""

    shared: dict[int, int]
    """New id -> old id of the same token: equal bytes, or special tokens of the same name or role."""
    pieces: dict[int, tuple[int, ...]]
    """New id -> old tokens that spell it, for new ids that are not shared and can be spelled."""
    dropped: tuple[int, ...]
    """Old ids that the new vocabulary lacks."""
    new_size: int
    old_size: int

    @property
    def unspelled(self) -> tuple[int, ...]:
        """New ids that the old vocabulary neither has nor can spell (new special tokens)."""
        return tuple(i for i in range(self.new_size) if i not in self.shared and i not in self.pieces)


def match_vocabularies(
    old: AnyTokenizer,
    new: AnyTokenizer,
    *,
    old_special: dict[str, int],
    new_special: dict[str, int],
    parts: Sequence[tuple[int, int]] = (),
) -> VocabularyMatch:
    """Match two vocabularies by the bytes of their tokens, across byte-level and SentencePiece-style kinds.

    Args:
        old, new: the tokenizers.
        old_special, new_special: special token -> id.
        parts: (new id, old id) of special tokens with the same role under different names (begin of text,
            ...).
    """
    same: dict[bytes, list[int]] = {}
    for index in range(old.vocab_size):
        data = old.token_bytes(index)
        if data:
            same.setdefault(data, []).append(index)
    by_bytes = {data: places[0] for data, places in same.items()}
    shared: dict[int, int] = {}
    missing: list[tuple[int, bytes]] = []
    met: dict[bytes, int] = {}
    for index in range(new.vocab_size):
        data = new.token_bytes(index)
        if not data:
            continue
        if data in same:
            # Byte-fallback vocabularies hold some bytes twice (`A` and `<0x41>`), each with its own row.
            place = met.get(data, 0)
            met[data] = place + 1
            shared[index] = same[data][min(place, len(same[data]) - 1)]
        else:
            missing.append((index, data))
    for token, index in new_special.items():
        if token in old_special:
            shared[index] = old_special[token]
    for new_id, old_id in parts:
        shared.setdefault(new_id, old_id)
    pieces = _spell(old, missing, by_bytes)
    kept = set(shared.values())
    dropped = tuple(
        index
        for index in range(old.vocab_size)
        if index not in kept and (old.token_bytes(index) or index in old_special.values())
    )
    return VocabularyMatch(
        shared=shared, pieces=pieces, dropped=dropped, new_size=new.vocab_size, old_size=old.vocab_size
    )


def _spell(
    old: AnyTokenizer, missing: Sequence[tuple[int, bytes]], by_bytes: dict[bytes, int]
) -> dict[int, tuple[int, ...]]:
    """Return the old tokens that spell each missing token, where there are any."""
    texts: list[tuple[int, str]] = []
    pieces: dict[int, tuple[int, ...]] = {}
    for index, data in missing:
        try:
            texts.append((index, data.decode("utf-8")))
        except UnicodeDecodeError:
            # A part of a character; the old vocabulary spells it byte by byte, if it has bytes.
            found = [by_bytes.get(bytes([byte])) for byte in data]
            if all(one is not None for one in found):
                pieces[index] = tuple(one for one in found if one is not None)
    for (index, text), ids in zip(texts, old.encode_batch([text for _, text in texts]), strict=True):
        # If no exact spelling is found (the old tokenizer changes the text), its encoding is the best guess.
        spelled = exact_ids(old, text, ids) or [token for token in ids if token != old.unknown_id]
        if spelled:
            pieces[index] = tuple(spelled)
    return pieces
