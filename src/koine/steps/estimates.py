"""What the recipe's steps will need, known before they run.

Training follows from the model and the hardware (`koine.train.estimate_training`); the small steps from rates seen on one core of a
laptop-class machine, which earlier builds in the same run folder then correct.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koine.plan import Estimate

IMPORTED = 350 * 2**20
"""Resident bytes of a process that has imported torch."""
LIGHT = 120 * 2**20
"""Resident bytes of a process that has not."""


def sample(
    *, languages: tuple[str, ...], documents_per_language: int, questions_per_language: int, **_: Any
) -> Estimate:
    """The sample world: some 5,000 documents a second."""
    written = len(languages) * (documents_per_language + questions_per_language)
    return Estimate(LIGHT + 200 * 2**20, 2.0 + written / 7_000)


def own(*, max_bytes_per_language: int, **_: Any) -> Estimate:
    """Reading one's own text streams, so memory does not grow; how much there is to read is not known before."""
    return Estimate(LIGHT + 100 * 2**20, 10.0 + max_bytes_per_language / 1e5)


def own_text(*, max_bytes: int, **_: Any) -> Estimate:
    """As `own`, for a step that names its limit `max_bytes`."""
    return own(max_bytes_per_language=max_bytes)


def tokenizer(*, sample_bytes: int, vocabulary_size: int, **_: Any) -> Estimate:
    """BPE training: the table of pre-tokens grows with the sample."""
    return Estimate(LIGHT + 40 * sample_bytes + 4_000 * vocabulary_size, 2.0 + sample_bytes / 2e6)


def tokens(**_: Any) -> Estimate:
    """Tokenizing: bounded by one shard of text."""
    return Estimate(LIGHT + 600 * 2**20, 8.0)


def training(
    *,
    preset: str,
    vocabulary_size: int,
    steps: int,
    sequence_length: int,
    batch_size: int,
    micro_batch_size: int,
    dtype: str,
    threads: int,
    **_: Any,
) -> Estimate:
    """A training step's formula, with the evaluations beside it; nothing is known beforehand of a model that is no preset."""
    if not preset:
        return Estimate(2 * 2**30, 60.0)
    from koine.data import Mixture, Phase, Source
    from koine.model import preset as model_preset
    from koine.train import TrainSettings, estimate_training

    source = Source(name="any", path=Path("any"), proportion=1.0)
    mixture = Mixture(
        phases=(Phase(name="any", steps=steps, sources=(source,)),),
        sequence_length=sequence_length,
        batch_size=batch_size,
    )
    settings = TrainSettings(micro_batch_size=micro_batch_size, dtype=dtype, threads=threads)  # type: ignore[arg-type]
    found = estimate_training(model_preset(preset, vocab_size=vocabulary_size), settings, mixture)
    return Estimate(found.peak_bytes + 180 * 2**20, found.seconds * 1.15 + 5.0)


def evaluation(*, documents_per_language: int, questions_per_language: int, **_: Any) -> Estimate:
    """Evaluation of a few documents and questions in some two dozen languages."""
    return Estimate(
        IMPORTED + 150 * 2**20, 5.0 + 0.4 * documents_per_language + 0.25 * questions_per_language
    )


def comparison(**_: Any) -> Estimate:
    """Reading the evaluations and writing tables."""
    return Estimate(LIGHT, 1.0)


def extension(
    *, base_length: int, length: int, steps: int, batch_size: int, micro_batch_size: int, **_: Any
) -> Estimate:
    """A stage of context extension of a model whose sizes are not known beforehand: one of some ten million parameters, its blocks recomputed."""
    at_once = max(length, (micro_batch_size or batch_size) * base_length)
    return Estimate(
        IMPORTED + 250 * 2**20 + 45_000 * at_once, 10.0 + steps * batch_size * base_length / 3_000
    )


def long_evaluation(*, lengths: tuple[int, ...], documents: int, **_: Any) -> Estimate:
    """The same documents once for each length."""
    return Estimate(IMPORTED + 600 * 2**20, 5.0 + 2.0 * documents * len(lengths))


def branch(*, steps: int, sequence_length: int, batch_size: int, micro_batch_size: int, **_: Any) -> Estimate:
    """Training of a model whose sizes are not known beforehand: one of some ten million parameters."""
    at_once = (micro_batch_size or batch_size) * sequence_length
    return Estimate(
        IMPORTED + 400 * 2**20 + 60_000 * at_once, 5.0 + steps * batch_size * sequence_length / 4_000
    )


def mixing(**_: Any) -> Estimate:
    """Reading some models and writing one."""
    return Estimate(IMPORTED + 500 * 2**20, 5.0)


def domains(*, documents: int, **_: Any) -> Estimate:
    """The same documents of some six domains."""
    return Estimate(IMPORTED + 500 * 2**20, 5.0 + 0.5 * documents)


def sample_code(**_: Any) -> Estimate:
    """Some megabytes of Python."""
    return Estimate(LIGHT + 100 * 2**20, 3.0)
