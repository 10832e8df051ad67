"""How text is cut before BPE: words with one leading mark, punctuation runs, line ends; every digit stands alone.

The classes are those of GPT-4o's public `o200k_base` vocabulary: a word is cut where lower case turns to upper case,
combining marks stay with their letters (so Indic and Arabic words are not broken), and one non-letter before a
word, mostly the space, belongs to it. Unlike there, digits are never grouped: a number is spelled by its digits.
"""

from __future__ import annotations

from typing import Any, Final

# Letters that may begin a word or stand in a caseless script, and letters that may continue one.
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD: Final = r"[^\r\n\p{L}\p{N}]?"
_ENGLISH_ENDING: Final = (
    "(?i:" + "|".join("'" + ending for ending in ("s", "t", "re", "ve", "m", "ll", "d")) + ")?"
)

PIECES: Final[tuple[str, ...]] = (
    f"{_LEAD}{_UPPER}*{_LOWER}+{_ENGLISH_ENDING}",  # a word ending in lower case: " Paris", "मुंबई", "東京"
    f"{_LEAD}{_UPPER}+{_LOWER}*{_ENGLISH_ENDING}",  # a word in capitals: " NASA"
    r"\p{N}",  # one digit of any script
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",  # punctuation and symbols, with the line end that follows
    r"\s*[\r\n]+",  # line ends, with the spaces before them
    r"\s+(?!\S)",  # spaces up to the last one, which belongs to the word that follows
    r"\s+",
)
PATTERN: Final = "|".join(PIECES)


def pre_tokenizer() -> Any:
    """The `tokenizers` pre-tokenizer: cut by `PATTERN`, then spell each piece in bytes."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
