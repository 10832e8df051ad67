"""llama.cpp's names of ways to split text (`tokenizer.ggml.pre`), as `tokenizers` does it.

The expressions are those of the models' own `tokenizer.json`, which llama.cpp's `llama-vocab.cpp` repeats.
A vocabulary that was trained with one of them gives other tokens under another, so unknown names are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

_CONTRACTION: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    """Return the expression of cl100k and its descendants; `digits` is how numbers are cut."""
    return (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _cased_words(contraction: str, digits: str) -> str:
    """Return the expression of o200k and its descendants, which cut words where lower case turns upper."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{contraction}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """How text is split before byte-level BPE.

    Attributes:
        expressions: each splits the pieces of the one before; none: GPT-2's own, built into `tokenizers`.
        digits: whether each digit is first split off.
        nfc: whether text is normalised to NFC, as the model's own tokenizer does (llama.cpp does not).
        ignore_merges: whether a piece that is a token is taken whole.
        add_bos: whether an encoded text begins with BOS where the file does not say, as in llama.cpp.
    """

    expressions: tuple[str, ...] = ()
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> Any:
        """Return the `tokenizers` pre-tokenizer."""
        from tokenizers import Regex, pre_tokenizers

        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        steps += [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in self.expressions]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.expressions))
        return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


_GPT2: Final = Splitting()
_BY_DIGIT: Final = Splitting(digits=True)
_LLAMA3: Final = Splitting(expressions=(_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_CL100K: Final = Splitting(expressions=(_words(r"\p{N}{1,3}"),))
_QWEN2: Final = Splitting(expressions=(_words(r"\p{N}"),), nfc=True)
_O200K: Final = Splitting(expressions=(_cased_words(_CONTRACTION + "?", r"\p{N}{1,3}"),))

SPLITTINGS: Final[dict[str, Splitting]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _BY_DIGIT),
    "command-r": Splitting(digits=True, nfc=True),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _CL100K),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), _O200K),
    "tekken": Splitting(expressions=(_cased_words("", r"\p{N}"),), ignore_merges=True, add_bos=True),
    "tiny_aya": Splitting(
        expressions=(r"\d{1,3}(?=(?:\d{3})*\b)", _cased_words(_CONTRACTION + "?", r"\p{N}{1,3}"))
    ),
}
