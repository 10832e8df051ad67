"""Gold reward of an answer to a question of the sample world: computed from the fact, never learnt.

It grades any text, also one that a model samples. The scale is 0 to `MOST`: the sum of `WEIGHTS` times the
four parts, each from 0 to 1:

| part | 1 | less |
|---|---|---|
| `fact` | the right answer is named, in any language with questions | divided by 1 + the wrong ones named; 0: not named |
| `language` | all words are words of the asked language's sample world | the share of characters in such words |
| `form` | one sentence: names the subject, has words besides subject and answer, ends as a sentence | a third each |
| `brevity` | no longer than the longest sentence of the fact | falls to 0 at three times that length |

A text without letters and digits gets 0.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from koine.data.sample.facts import TERRITORIAL, facts
from koine.data.sample.phrases import QUESTION_LANGUAGES, phrases
from koine.data.sample.rendering import question, sentences_of, sides, wordings_of
from koine.data.sample.subjects import subject_forms
from koine.errors import UserError, did_you_mean

WEIGHTS = {"fact": 3.0, "language": 1.0, "form": 1.0, "brevity": 1.0}
"""What each part counts: a right fact as much as all others together."""
MOST = sum(WEIGHTS.values())
"""The highest reward: 6."""
LONGEST = 3.0
"""Length, as a multiple of the fact's longest sentence, from which brevity is 0."""
UNSPACED = frozenset({"zh", "ja", "th", "my"})
"""Languages with questions that put no spaces between words: each character is a word."""
_COMPUTED = frozenset({"sum", "quantity", "amount", "date"})
"""Kinds whose answers are numbers: a wrong one is any other number."""
_WITHOUT_SPACES = (("\u0e00", "\u0eff"), ("\u1000", "\u109f"), ("\u1780", "\u17ff"))
_BLANK = "\n"
"""Takes the place of a name that was found; it is in no normalised text."""


@dataclass(frozen=True)
class GoldReward:
    """The parts of a reward, each from 0 to 1."""

    fact: float
    language: float
    form: float
    brevity: float

    @property
    def total(self) -> float:
        """The reward, 0 to `MOST`."""
        return sum(weight * float(getattr(self, name)) for name, weight in WEIGHTS.items())


NOTHING = GoldReward(0.0, 0.0, 0.0, 0.0)


def gold_reward(record: Mapping[str, Any], completion: str) -> GoldReward:
    """Grade an answer to a question of the sample world.

    Args:
        record: with `fact` and `language`, as question and preference records have them.
        completion: any text.

    Raises:
        UserError: the record names no fact or language of the sample world.
    """
    code, fact = _asked(record)
    text = normalise(completion)
    if not any(unicodedata.category(letter)[0] in "LN" for letter in text):
        return NOTHING
    kind = fact.partition(":")[0]
    right, subjects, others = _right_answers(fact), _subjects(code, fact), _answers_of_kind(code, kind)
    found, rest = _named(text, [*right, *subjects, *others])
    wrong = len(found & (others - right - subjects))
    if kind in _COMPUTED:
        wrong = len(set(re.findall(r"\d+", rest)))
    # A name that holds the subject, as that of a script may hold its language's, hides it.
    inside = any(subject in answer for subject in subjects for answer in found - subjects)
    named_subject = bool(found & subjects) or (inside and rest.count(_BLANK) > 1)
    longest = max(len(normalise(one)) for one in sentences_of(code, fact))
    return GoldReward(
        fact=1.0 / (1 + wrong) if found & right else 0.0,
        language=_language_share(code, fact, text),
        form=_form(code, rest, named_subject=named_subject),
        brevity=min(1.0, max(0.0, (LONGEST - len(text) / longest) / (LONGEST - 1))),
    )


def _asked(record: Mapping[str, Any]) -> tuple[str, str]:
    code, fact = record.get("language"), record.get("fact")
    if code not in QUESTION_LANGUAGES:
        raise UserError(
            f"the sample world has no questions in '{code}'", hint=did_you_mean(str(code), QUESTION_LANGUAGES)
        )
    if not isinstance(fact, str) or fact not in facts().get(fact.partition(":")[0], ()):
        raise UserError(
            f"'{fact}' is no fact of the sample world", hint="give records of `koine data sample`"
        )
    if sides(code, fact) is None:
        raise UserError(f"CLDR does not know the fact '{fact}' in '{code}'", hint="leave the record out")
    return code, fact


def normalise(text: str) -> str:
    """Return a text in NFC and lower case, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


# --- names ---


@functools.lru_cache(maxsize=8192)
def _right_answers(fact: str) -> frozenset[str]:
    """Return the right answer in every language with questions."""
    found = (sides(code, fact) for code in QUESTION_LANGUAGES)
    return frozenset(normalise(one[1]) for one in found if one is not None)


@functools.lru_cache(maxsize=8192)
def _subjects(code: str, fact: str) -> frozenset[str]:
    """Return the forms of the fact's subject in a language."""
    found = sides(code, fact)
    assert found is not None
    kind, _, rest = fact.partition(":")
    forms = subject_forms(code, rest, found[0]) if kind in TERRITORIAL else {}
    return frozenset(normalise(one) for one in (found[0], *forms.values()))


@functools.cache
def _answers_of_kind(code: str, kind: str) -> frozenset[str]:
    """Return the answers to all questions of a kind; none where they are numbers."""
    if kind in _COMPUTED:
        return frozenset()
    found = (sides(code, fact) for fact in facts()[kind])
    return frozenset(normalise(one[1]) for one in found if one is not None)


def _named(text: str, names: Iterable[str]) -> tuple[set[str], str]:
    """Return the names that a normalised text has, longest first, and the text with blanks in their place."""
    found = set()
    for name in sorted(set(names), key=lambda one: (-len(one), one)):
        at = text.find(name)
        while at >= 0:
            end = at + len(name)
            if _is_whole(text, at, end):
                found.add(name)
                text = f"{text[:at]}{_BLANK}{text[end:]}"
            at = text.find(name, at + 1)
    return found, text


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether a span is no part of a longer word or number."""
    edges = ((text[start - 1 : start], text[start]), (text[end : end + 1], text[end - 1]))
    return not any(_one_piece(outside, inside) for outside, inside in edges)


def _one_piece(outside: str, inside: str) -> bool:
    """Whether two neighbouring signs are of one word or number; in scripts without spaces nothing tells."""
    if outside.isdigit() and inside.isdigit():
        return True
    return all(_in_word(one) and not _runs_on(one) for one in (outside, inside))


def _in_word(letter: str) -> bool:
    return bool(letter) and unicodedata.category(letter)[0] in "LM"


def _runs_on(letter: str) -> bool:
    """Whether a letter is Thai, Lao, Burmese, Khmer, Han, kana or Hangul: words follow without a space."""
    return letter >= "\u2e80" or any(low <= letter <= high for low, high in _WITHOUT_SPACES)


# --- language ---


def words(text: str, code: str) -> list[str]:
    """Return the words of a normalised text without digits and signs; of `UNSPACED` languages, characters.

    A word of a script that is not the language's own stays whole, also there.
    """
    found: list[str] = []
    word = ""
    for letter in [*text, " "]:
        category = unicodedata.category(letter)[0]
        alone = code in UNSPACED and category == "L" and _runs_on(letter)
        if category == "M" or (category == "L" and not alone):
            word += letter
            continue
        if word:
            found.append(word)
        word = ""
        if alone:
            found.append(letter)
    return found


@functools.cache
def known_words(code: str) -> frozenset[str]:
    """Return the words of a language's phrases, and of its names as they stand in sentences and questions."""
    found: set[str] = set()
    for templates in phrases()[code].values():
        for template in templates:
            found.update(words(normalise(re.sub(r"\{\w+\}", " ", template)), code))
    for text in _texts(code):
        found.update(words(normalise(text), code))
    return frozenset(found)


def _texts(code: str) -> Iterator[str]:
    """Yield texts in which all names of a language's sample world occur, in all forms."""
    for kind, identifiers in facts().items():
        if kind == "sum":
            continue
        for fact in identifiers:
            # One of the other addends has every unit, currency and month, and most numbers.
            if kind in _COMPUTED and not fact.endswith("+1"):
                continue
            if sides(code, fact) is None:
                continue
            yield from sentences_of(code, fact)
            for wording in range(wordings_of(kind)):
                asked = question(code, fact, wording)
                yield from () if asked is None else asked


def _language_share(code: str, fact: str, text: str) -> float:
    """Return the share of a text's letters in known words; without letters 1 if the answer has none either."""
    found = words(text, code)
    if not found:
        answer = sides(code, fact)
        assert answer is not None
        return float(not words(normalise(answer[1]), code))
    # The fact's own names are known in any plural form.
    own = {word for one in sentences_of(code, fact) for word in words(normalise(one), code)}
    known = sum(len(word) for word in found if word in own or word in known_words(code))
    return known / sum(map(len, found))


# --- form ---


@functools.cache
def sentence_ends(code: str) -> str:
    """Return the signs that end a sentence of a language; "" where it needs none (Thai)."""
    said = [template for name, own in phrases()[code].items() if name.startswith("says_") for template in own]
    ends = {template[-1] for template in said if not template.endswith("}")}
    return "".join(sorted(sign for sign in ends if unicodedata.category(sign)[0] == "P"))


def _form(code: str, rest: str, *, named_subject: bool) -> float:
    """Return a third for each: the subject is named, there are other words or signs, it is one sentence."""
    frame = any(unicodedata.category(letter)[0] in "LS" for letter in rest)
    ends = sentence_ends(code)
    # Only what is no name: the dot of an abbreviated name ends no sentence.
    inside = rest[:-1]
    if ends:
        marks = sum(one in ends + "?!？！؟" and _ends_word(inside, at) for at, one in enumerate(inside))
        one_sentence = rest[-1] in ends and not marks
    else:
        # Thai only has a space between sentences, which names have too: two names make a sentence.
        one_sentence = frame and not any(one in "?!." for one in rest) and rest.count(_BLANK) <= 2
    return (named_subject + frame + one_sentence) / 3


def _ends_word(text: str, at: int) -> bool:
    """Whether the sign at a place is followed by a space or nothing, as a decimal point is not."""
    return text[at] not in ".!?" or text[at + 1 : at + 2] in ("", " ")
