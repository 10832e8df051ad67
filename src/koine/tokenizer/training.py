"""Train a byte-level BPE tokenizer on weighted languages (universal-tokenizer paper).

The trainer is that of `tokenizers`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from koine import __version__
from koine.errors import KoineWarning, UserError
from koine.fields import check_integer
from koine.tokenizer.corpus_sampling import Corpus, count_bytes, draw, quotas, stream
from koine.tokenizer.pretoken_counts import (
    DIRECT_BYTES,
    PretokenCounts,
    count_pretokens,
    counting_progress,
    feeding_scale,
    on_terminal,
    repeated,
)
from koine.tokenizer.pretokenize import pre_tokenizer, short_runs
from koine.tokenizer.special import BOS, SMALLEST_VOCABULARY, SPECIAL_TOKENS
from koine.tokenizer.tokenizer import Tokenizer, from_backend
from koine.tokenizer.weights import BucketMass, Scheme, language_weights


def train_tokenizer(
    texts_by_language: Corpus,
    *,
    vocab_size: int,
    scheme: Scheme = "bucketed",
    bucket_mass: BucketMass = "uniform",
    english_share: float | None = 0.30,
    temperature: float = 3.0,
    min_frequency: int = 5,
    sample_bytes: int | None = None,
    max_repeats: float = 10.0,
    seed: int = 0,
    show_progress: bool = False,
    data: Sequence[str] = (),
) -> Tokenizer:
    """Train a tokenizer of `vocab_size` ids: special tokens, the 256 bytes, then merges by frequency.

    The same texts and parameters give the same result, byte for byte.

    Args:
        texts_by_language: language code -> a function that returns an iterable of texts, or one function that
            returns (language code, text) of all languages. Each is called anew for both passes (counting and
            training), so nothing needs to be held in memory.
        vocab_size: number of ids.
        scheme, bucket_mass, english_share, temperature: see `language_weights`.
        min_frequency: a pair is merged only if it occurs this often in the sample (5 in the paper).
        sample_bytes: text to train on, all languages together; `None`: all.
        max_repeats: most passes over a language's text to reach its weight; repetition is a `KoineWarning`.
        seed: of the choice of texts.
        show_progress: show progress bars on a terminal.
        data: where the text lies, for the record in `tokenizer_training.json`.

    Raises:
        UserError: the vocabulary is smaller than special tokens and bytes, a language has no text, or a code
            is unknown.

    Memory does not grow with the text (`koine.tokenizer.pretoken_counts`). A `KoineWarning` says where counts
    of a long text were scaled down, or rare pre-tokens left out.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocab_size} is smaller than the alphabet",
            hint=f"take at least {SMALLEST_VOCABULARY} ({len(SPECIAL_TOKENS)} special tokens and 256 bytes)",
        )
    check_integer("min_frequency", min_frequency, low=1)
    with counting_progress(show_progress, what="reading") as watched:
        sizes = count_bytes(lambda: watched(stream(texts_by_language)))
    if isinstance(texts_by_language, Mapping):
        # A language without any text yields nothing to count.
        sizes = dict.fromkeys(texts_by_language, 0) | sizes
    weights = language_weights(
        sizes, scheme=scheme, bucket_mass=bucket_mass, english_share=english_share, temperature=temperature
    )
    drawn = quotas(sizes, weights, sample_bytes=sample_bytes, max_repeats=max_repeats)
    backend = _empty_backend()
    pretokens = _learn_from_sample(
        backend, texts_by_language, sizes, drawn,
        vocab_size=vocab_size, min_frequency=min_frequency, seed=seed, show_progress=show_progress,
    )  # fmt: skip
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        warnings.warn(
            f"the text gives a vocabulary of {reached}, not {vocab_size}: no other pair occurs "
            f"{min_frequency} times; give more text, a lower min_frequency or a smaller vocabulary",
            KoineWarning,
            stacklevel=2,
        )
    return from_backend(
        backend,
        training={
            "koine": __version__,
            "data": list(data),
            "vocab_size": vocab_size,
            "scheme": scheme,
            "bucket_mass": bucket_mass,
            "english_share": english_share,
            "temperature": temperature,
            "min_frequency": min_frequency,
            "sample_bytes": sample_bytes,
            "max_repeats": max_repeats,
            "seed": seed,
            "pretokens": pretokens,
            "languages": {
                code: {"bytes": sizes[code], "weight": weights[code], "drawn_bytes": round(drawn[code])}
                for code in sizes
            },
        },
    )


def _learn_from_sample(
    backend: Any,
    corpus: Corpus,
    sizes: Mapping[str, int],
    drawn: Mapping[str, float],
    *,
    vocab_size: int,
    min_frequency: int,
    seed: int,
    show_progress: bool,
) -> dict[str, Any] | None:
    """Draw `drawn` bytes of each language and learn merges; return figures of the counts of a long text."""
    if sum(drawn.values()) <= DIRECT_BYTES:
        sample = draw(corpus, sizes=sizes, quota=drawn, seed=seed)
        texts = (text for text, times in _with_short_runs(sample) for _ in range(times))
        _learn(
            backend, texts, vocab_size=vocab_size, min_frequency=min_frequency, show_progress=show_progress
        )
        return None
    with counting_progress(show_progress, what="counting", total=sum(sizes.values())) as watched:
        sample = draw(lambda: watched(stream(corpus)), sizes=sizes, quota=drawn, seed=seed)
        table = count_pretokens(
            _with_short_runs(sample), normalizer=backend.normalizer, pre_tokenizer=backend.pre_tokenizer
        )
    scale = learn_from_table(
        backend, table, vocab_size=vocab_size, min_frequency=min_frequency, show_progress=show_progress
    )
    _warn_of_approximations(table, scale)
    return {
        "occurrences": table.occurrences,
        "distinct": len(table.counts),
        "dropped_occurrences": table.dropped,
        "scale": scale,
    }


def _with_short_runs(sample: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Cut texts inside runs that are too long for the trainer."""
    return ((part, times) for text, times in sample for part in short_runs(text))


def _warn_of_approximations(table: PretokenCounts, scale: float) -> None:
    """Warn if counts were dropped or scaled."""
    parts = []
    if table.dropped:
        parts.append(
            f"{table.dropped:,} occurrences of rare pre-tokens were left out "
            f"({table.dropped / table.occurrences:.2%} of all)"
        )
    if scale < 1.0:
        parts.append(
            f"all counts were scaled by {scale:.3g} to fit the library, so pairs are merged by rounded "
            "frequencies"
        )
    if parts:
        warnings.warn("the text is long: " + "; ".join(parts), KoineWarning, stacklevel=4)


def _empty_backend() -> Any:
    """Return a `tokenizers.Tokenizer` with our normalizer and pre-tokenizer and no vocabulary yet."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def learn_from_table(
    backend: Any, table: PretokenCounts, *, vocab_size: int, min_frequency: int, show_progress: bool
) -> float:
    """Learn merges from counts of pre-tokens; return the factor by which the counts were scaled."""
    from tokenizers import normalizers, pre_tokenizers

    scale = feeding_scale(table)
    # The table's pre-tokens are already cut and spelled in bytes; they only need to be split at the spaces.
    real = backend.normalizer, backend.pre_tokenizer
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    _learn(
        backend,
        repeated(table, scale),
        vocab_size=vocab_size,
        min_frequency=max(1, round(min_frequency * scale)),
        show_progress=show_progress,
    )
    backend.normalizer, backend.pre_tokenizer = real
    return scale


def _learn(
    backend: Any, texts: Iterator[str], *, vocab_size: int, min_frequency: int, show_progress: bool
) -> None:
    """Learn merges from `texts` with the library's trainer and the backend's pre-tokenizer."""
    from tokenizers import AddedToken, pre_tokenizers, processors, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=show_progress and on_terminal(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    # As in Cohere's tokenizers, encoding with special tokens adds a leading BOS.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
