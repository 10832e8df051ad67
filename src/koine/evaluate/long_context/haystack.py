"""Haystack text of any language, cut into pieces; needles go between two pieces."""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from koine.errors import UserError, did_you_mean

Encode = Callable[[str], list[int]]

# Sentence ends in the world's scripts: some count only before white space, others anywhere.
_CLOSERS = "[\"'”’»」』)）\\]]*"
_SENTENCE = re.compile(rf"\s*\S.*?(?:[.!?…।॥؟۔።፧፨։]+{_CLOSERS}(?=\s|$)|[。！？။។]+{_CLOSERS}|(?=\n)|$)")
LONGEST_PIECE = 160
"""Characters of a piece at most; without sentence ends (Thai, poems) it is cut at white space, or here."""
SAMPLE_DOCUMENTS = 2000


@dataclass(frozen=True)
class Haystack:
    """Text in pieces, which joined are the text.

    Attributes:
        pieces: token ids of each piece, white space at its beginning.
        words: some of its words, for the counting tasks.
        language: BCP-47, `und` where unknown.
        source: for reports and error messages.
    """

    pieces: tuple[tuple[int, ...], ...]
    words: tuple[str, ...]
    language: str
    source: str

    @property
    def tokens(self) -> int:
        """Number of tokens; longer prompts repeat the text."""
        return sum(map(len, self.pieces))

    def cut(
        self, tokens: int, rng: random.Random, *, ends_on_character: Callable[[Sequence[int]], bool]
    ) -> list[list[int]]:
        """Return `tokens` tokens of pieces in order from a random one on; the text repeats after its end.

        The last piece is cut to fit, by a few tokens more where it would end within a character.
        `ends_on_character` tells whether ids end at the end of a character.
        """
        first = rng.randrange(len(self.pieces))
        return fill(
            itertools.cycle((*self.pieces[first:], *self.pieces[:first])),
            tokens,
            ends_on_character=ends_on_character,
        )


def fill(
    pieces: Iterable[Sequence[int]], tokens: int, *, ends_on_character: Callable[[Sequence[int]], bool]
) -> list[list[int]]:
    """Return `tokens` tokens of `pieces`, or fewer where these end earlier; see `Haystack.cut`."""
    found: list[list[int]] = []
    left = tokens
    for given in pieces:
        if left <= 0:
            break
        piece = list(given)
        if len(piece) > left:
            piece = piece[:left]
            while piece and not ends_on_character(piece):
                piece.pop()
            left = len(piece)
        if piece:
            found.append(piece)
        left -= len(piece)
    return found


def split_pieces(text: str) -> list[str]:
    """Split a text into sentences of at most `LONGEST_PIECE` characters, white space at their beginning.

    Joined, they are the text without white space at its end.
    """
    return [piece for match in _SENTENCE.finditer(text.rstrip()) for piece in _shortened(match.group())]


def _shortened(sentence: str) -> Iterator[str]:
    while len(sentence) > LONGEST_PIECE:
        edge = sentence.rfind(" ", LONGEST_PIECE // 2, LONGEST_PIECE)
        edge = LONGEST_PIECE if edge < 0 else edge
        # Keep a combining mark with its letter.
        while edge < len(sentence) - 1 and unicodedata.combining(sentence[edge]):
            edge += 1
        yield sentence[:edge]
        sentence = sentence[edge:]
    if sentence:
        yield sentence


def words_of(text: str) -> Iterator[str]:
    """Yield runs of 2 to 14 letters with their marks; in a script without spaces these are phrases."""
    word = ""
    for character in (*text, " "):
        if unicodedata.category(character)[0] in "LM":
            word += character
            continue
        if 2 <= len(word) <= 14:
            yield word
        word = ""


def make_haystack(
    texts: Iterable[tuple[str, str]], encode: Encode, *, at_least: int, source: str
) -> Haystack:
    """Make a haystack of (text, language) documents, reading until it has `at_least` tokens.

    Raises `UserError` where there is no text.
    """
    pieces: list[tuple[int, ...]] = []
    words: dict[str, None] = {}
    languages: Counter[str] = Counter()
    total = 0
    for text, language in texts:
        languages[language] += 1
        for piece in split_pieces(("\n" if pieces else "") + unicodedata.normalize("NFC", text).strip()):
            ids = tuple(encode(piece))
            if ids:
                pieces.append(ids)
                total += len(ids)
        if len(words) < 20_000:
            words.update(dict.fromkeys(words_of(text)))
        if total >= at_least:
            break
    if not pieces:
        raise UserError("holds no text", where=source, hint="give documents with text as the haystack")
    return Haystack(tuple(pieces), tuple(words), languages.most_common(1)[0][0], source)


def read_haystack(
    paths: Sequence[str | Path], encode: Encode, *, at_least: int, language: str | None = None
) -> Haystack:
    """Make a haystack of files or folders, as `koine.data.records.read_records` takes them.

    language: of the records to use; it is also that of records without a language.
    """
    from koine.data.records import UNKNOWN_LANGUAGE

    texts = (
        (text, code)
        for text, code in document_texts(paths)
        if language is None or code in (language, UNKNOWN_LANGUAGE)
    )
    where = ", ".join(map(str, paths))
    if language is not None:
        first = next(texts, None)
        if first is None:
            raise UserError(
                f"no text in the language '{language}'", where=where, hint="give another --language"
            )
        rest = texts
        texts = ((text, language) for text, _ in (first, *rest))
    return make_haystack(texts, encode, at_least=at_least, source=where)


def document_texts(paths: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    """Yield text and language of every document; chats are skipped."""
    from koine.data.piped import is_piped
    from koine.data.records import read_records

    for path in paths:
        if not (is_piped(path) or Path(path).exists()):
            raise UserError("no such file or folder", where=path, hint="give the haystack's text")
        for record in read_records(path, unit="file", split="all", carry=()):
            if "text" in record:
                yield record["text"], record["language"]


def sample_haystack(encode: Encode, *, at_least: int, language: str = "en") -> Haystack:
    """Make a haystack of the built-in sample world: documents of facts, in any of its languages.

    Raises `UserError` for a language that it does not have.
    """
    return make_haystack(
        ((text, language) for text in sample_texts(language)),
        encode,
        at_least=at_least,
        source="the sample world",
    )


def sample_texts(language: str) -> Iterator[str]:
    """Yield the documents of facts of the sample world, without its lists and quizzes."""
    from koine.data.sample import sample_languages
    from koine.data.sample.rendering import sentence
    from koine.data.sample.world import document_plans

    if language not in sample_languages():
        raise UserError(
            f"the sample world has no language '{language}'",
            where="--language",
            hint=f"{did_you_mean(language, sample_languages())}; or give text with --haystack",
        )
    for plan in document_plans(SAMPLE_DOCUMENTS, seed=0, heldout=False):
        yield " ".join(line for fact in plan.facts if (line := sentence(language, fact)) is not None)
