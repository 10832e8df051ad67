"""Haystack text of any language, cut into pieces at whose edges a needle can stand."""

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

# A sentence ends at these signs of the world's scripts: some before white space alone, some wherever they stand.
_CLOSERS = "[\"'”’»」』)）\\]]*"
_SENTENCE = re.compile(rf"\s*\S.*?(?:[.!?…।॥؟۔።፧፨։]+{_CLOSERS}(?=\s|$)|[。！？။។]+{_CLOSERS}|(?=\n)|$)")
LONGEST_PIECE = 160
"""Characters: where a text has no sentence ends (Thai, poems), pieces are cut at white space, or else after this many."""
SAMPLE_DOCUMENTS = 2000


@dataclass(frozen=True)
class Haystack:
    """Text in pieces. Joined, their tokens are the text; a needle goes between two of them.

    pieces: token ids of each piece, white space at its beginning. words: some of its words, for the counting tasks.
    language: BCP-47, `und` where unknown. source: what to say about where it is from.
    """

    pieces: tuple[tuple[int, ...], ...]
    words: tuple[str, ...]
    language: str
    source: str

    @property
    def tokens(self) -> int:
        """How many tokens there are; longer prompts repeat the text."""
        return sum(map(len, self.pieces))

    def cut(
        self, tokens: int, rng: random.Random, *, intact: Callable[[Sequence[int]], bool]
    ) -> list[list[int]]:
        """Pieces in order from a random one on, `tokens` tokens together; the text begins anew where it ends.

        The last piece is cut to fit, and by a few tokens more where that would break a character: `intact` says whether a cut piece
        is whole text.
        """
        first = rng.randrange(len(self.pieces))
        return fill(itertools.cycle((*self.pieces[first:], *self.pieces[:first])), tokens, intact=intact)


def fill(
    pieces: Iterable[Sequence[int]], tokens: int, *, intact: Callable[[Sequence[int]], bool]
) -> list[list[int]]:
    """`tokens` tokens of `pieces`, fewer where these end before; see `Haystack.cut`."""
    found: list[list[int]] = []
    left = tokens
    for given in pieces:
        if left <= 0:
            break
        piece = list(given)
        if len(piece) > left:
            piece = piece[:left]
            while piece and not intact(piece):
                piece.pop()
            left = len(piece)
        if piece:
            found.append(piece)
        left -= len(piece)
    return found


def split_pieces(text: str) -> list[str]:
    """The text in sentences, white space at their beginning, none longer than `LONGEST_PIECE` characters.

    Joined, they are the text without white space at its end.
    """
    return [piece for match in _SENTENCE.finditer(text.rstrip()) for piece in _shortened(match.group())]


def _shortened(sentence: str) -> Iterator[str]:
    while len(sentence) > LONGEST_PIECE:
        edge = sentence.rfind(" ", LONGEST_PIECE // 2, LONGEST_PIECE)
        edge = LONGEST_PIECE if edge < 0 else edge
        # A mark that belongs to the letter before it stays with it.
        while edge < len(sentence) - 1 and unicodedata.combining(sentence[edge]):
            edge += 1
        yield sentence[:edge]
        sentence = sentence[edge:]
    if sentence:
        yield sentence


def words_of(text: str) -> Iterator[str]:
    """Runs of letters (with their marks), at most 14 characters long; where a script writes no spaces these are phrases."""
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
    """A haystack of (text, language) documents, read from the start until `at_least` tokens are there.

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
    """The haystack of files or folders as `koine.data.records.read_records` takes them; `language` chooses among the records, and
    names those that do not say."""
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
    """(text, language) of every document; chats are passed over."""
    from koine.data.records import read_records

    for path in paths:
        if not Path(path).exists():
            raise UserError("no such file or folder", where=path, hint="give the haystack's text")
        for record in read_records(path, unit="file", split="all", carry=()):
            if "text" in record:
                yield record["text"], record["language"]


def sample_haystack(encode: Encode, *, at_least: int, language: str = "en") -> Haystack:
    """A haystack of the built-in sample world: documents that tell facts, in any of its languages.

    Raises `UserError` for a language that it does not have.
    """
    return make_haystack(
        ((text, language) for text in sample_texts(language)),
        encode,
        at_least=at_least,
        source="the sample world",
    )


def sample_texts(language: str) -> Iterator[str]:
    """The documents of the sample world that tell facts, without its lists and quizzes."""
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
