"""Train a byte-level BPE tokenizer on weighted languages (universal-tokenizer paper; the trainer is `tokenizers`')."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from koine.errors import KoineWarning, UserError
from koine.tokenizer.pretokenize import pre_tokenizer
from koine.tokenizer.sampling import Corpus, count_bytes, draw, quotas
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
) -> Tokenizer:
    """A tokenizer of `vocab_size` ids: the special tokens, the 256 bytes, then merges, most frequent first.

    texts_by_language: language code -> a function that gives an iterable of texts, or one function that gives
        (language code, text) for all languages; each is called anew for both passes (counting and training), so
        nothing needs to be held in memory. With the same texts and parameters the result is the same, byte by byte.
    scheme, bucket_mass, english_share, temperature: see `language_weights`.
    min_frequency: a pair is merged only if it occurs this often in the sample (5 in the paper).
    sample_bytes: text to train on, all languages together; None takes as much as there is.
    max_repeats: a language is read at most this many times to reach its weight; any repetition is a `KoineWarning`.

    Raises `UserError` for a vocabulary smaller than special tokens and bytes, for languages without text, unknown codes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocab_size} is smaller than the alphabet",
            mend=f"take at least {SMALLEST_VOCABULARY} ({len(SPECIAL_TOKENS)} special tokens and 256 bytes)",
        )
    if min_frequency < 1:
        raise UserError(f"the smallest frequency is {min_frequency}", mend="give at least 1")
    sizes = count_bytes(texts_by_language)
    weights = language_weights(
        sizes, scheme=scheme, bucket_mass=bucket_mass, english_share=english_share, temperature=temperature
    )
    drawn = quotas(sizes, weights, sample_bytes=sample_bytes, max_repeats=max_repeats)
    sample = draw(texts_by_language, sizes=sizes, quota=drawn, seed=seed)
    backend = _train(sample, vocab_size=vocab_size, min_frequency=min_frequency, show_progress=show_progress)
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        warnings.warn(
            f"the text gives a vocabulary of {reached}, not {vocab_size}: no other pair occurs {min_frequency} times; "
            "give more text, a lower min_frequency or a smaller vocabulary",
            KoineWarning,
            stacklevel=2,
        )
    return from_backend(backend)


def _train(texts: Iterator[str], *, vocab_size: int, min_frequency: int, show_progress: bool) -> Any:
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=show_progress,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    # As in Cohere's tokenizers, whoever asks the backend for special tokens gets a leading BOS.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return backend
