"""Estimates of the memory and time of steps, made before they run.

Training follows from the model and the hardware (`koine.train.estimate_training`). The other steps follow
from rates
measured on one core of a laptop-class machine; earlier builds in the same run folder then correct them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.plan import Estimate

if TYPE_CHECKING:
    from koine.model.config import ModelConfig
    from koine.steps.text_mixture import TextMixture
    from koine.train.settings import TrainSettings

IMPORTED = 350 * 2**20
"""Resident bytes of a process that has imported torch."""
LIGHT = 120 * 2**20
"""Resident bytes of a process that has not."""


def sample(
    *, languages: tuple[str, ...], documents_per_language: int, questions_per_language: int, **_: Any
) -> Estimate:
    """Return the estimate of the sample world: some 5,000 documents a second."""
    written = len(languages) * (documents_per_language + questions_per_language)
    return Estimate(LIGHT + 200 * 2**20, 2.0 + written / 7_000)


def own(*, max_bytes_per_language: int, **_: Any) -> Estimate:
    """Return the estimate of sorting the user's text: it is streamed, and its size is not known before."""
    return Estimate(LIGHT + 100 * 2**20, 10.0 + max_bytes_per_language / 1e5)


def own_text(*, max_bytes: int, **_: Any) -> Estimate:
    """Return `own` for a step whose limit is called `max_bytes`."""
    return own(max_bytes_per_language=max_bytes)


def tokenizer(*, sample_bytes: int, vocabulary_size: int, **_: Any) -> Estimate:
    """Return the estimate of BPE training: the table of pre-tokens grows with the sample."""
    return Estimate(LIGHT + 40 * sample_bytes + 4_000 * vocabulary_size, 2.0 + sample_bytes / 2e6)


def tokens(**_: Any) -> Estimate:
    """Return the estimate of tokenizing: memory is bounded by one shard of text."""
    return Estimate(LIGHT + 600 * 2**20, 8.0)


def training(
    model: Path | None,
    *,
    mixture: TextMixture,
    settings: TrainSettings,
    config: ModelConfig | None,
    threads: int,
    **_: Any,
) -> Estimate:
    """Return the estimate of `koine.train`; of a model of unknown sizes that of ten million parameters."""
    if config is None and model is not None and (model / "config.json").exists():
        from koine.model import read_config

        config = read_config(model)
    if config is None:
        tokens = mixture.steps * mixture.batch_size * mixture.sequence_length
        rows = settings.micro_batch_size or mixture.batch_size
        at_once = max(mixture.max_length, rows * mixture.sequence_length)
        # With gradient checkpointing the activations of a block are computed again in place of being kept.
        bytes_per_token = 45_000 if settings.gradient_checkpointing else 60_000
        return Estimate(IMPORTED + 400 * 2**20 + bytes_per_token * at_once, 10.0 + tokens / 4_000)
    from koine.steps.corpus_files import Roles
    from koine.train import estimate_training

    roles = Roles(primary=("en",), expanded=("de",), chat=())
    found = estimate_training(config, replace(settings, threads=threads), mixture.build({}, roles))
    return Estimate(found.peak_bytes + 180 * 2**20, found.seconds * 1.15 + 5.0)


def evaluation(*, documents_per_language: int, questions_per_language: int, **_: Any) -> Estimate:
    """Return the estimate of an evaluation in some two dozen languages."""
    return Estimate(
        IMPORTED + 150 * 2**20, 5.0 + 0.4 * documents_per_language + 0.25 * questions_per_language
    )


def comparison(**_: Any) -> Estimate:
    """Return the estimate of reading evaluations and writing tables."""
    return Estimate(LIGHT, 1.0)


def long_evaluation(*, lengths: tuple[int, ...], documents: int, **_: Any) -> Estimate:
    """Return the estimate of an evaluation at several context lengths."""
    return Estimate(IMPORTED + 600 * 2**20, 5.0 + 2.0 * documents * len(lengths))


def mixing(**_: Any) -> Estimate:
    """Return the estimate of reading some models and writing one."""
    return Estimate(IMPORTED + 500 * 2**20, 5.0)


def domains(*, documents: int, **_: Any) -> Estimate:
    """Return the estimate of an evaluation on some six domains."""
    return Estimate(IMPORTED + 500 * 2**20, 5.0 + 0.5 * documents)


def sample_code(**_: Any) -> Estimate:
    """Return the estimate of some megabytes of Python."""
    return Estimate(LIGHT + 100 * 2**20, 3.0)


def copy(**_: Any) -> Estimate:
    """Return the estimate of copying a small model."""
    return Estimate(LIGHT, 1.0)
