"""Reference log-probabilities: computed once, kept in a cache, shared by losses, strengths and seeds.

A folder of the cache is named by what determines its values: weights, tokens, tokenizer, row length and dtype.
It has one file for `GROUPS_OF_FILE` groups, in the order of the source, so that a killed run goes on after the
last one.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from koine.align.log_probabilities import completion_log_probabilities
from koine.align.source_batches import source_batches
from koine.data.groups import GroupBatch, fewest_tokens
from koine.data.mismatched import MismatchedSource
from koine.data.preference_order import PreferenceOrder
from koine.data.shards import TokenSource
from koine.errors import UserError
from koine.fields import Fields
from koine.files import exclusive, make_folder, read_json, sha256_file, write_atomically, write_json
from koine.model.language_model import LanguageModel
from koine.terminal import note
from koine.train.fingerprint import weights_digest

GROUPS_OF_FILE = 256
"""Groups of one file, which a killed run computes again at most."""
IDENTITY = "reference.json"


class Reference(Protocol):
    """Log-probabilities of completions by a fixed model."""

    @property
    def temperature(self) -> float:
        """Temperature that the logits are divided by."""
        ...

    @property
    def key(self) -> str:
        """sha256 of what determines the values."""
        ...

    def of(self, batch: GroupBatch, /) -> Tensor:
        """Return the log-probability of each completion of a batch, `[C]` float32, on the batch's device."""
        ...


class ReferenceModel:
    """A reference in memory, for completions that are not known before training.

    Args:
        model: it is moved to the batches' device.
        dtype: of its computation: the policy's.
        temperature: that the completions are sampled with.
    """

    def __init__(self, model: LanguageModel, *, dtype: torch.dtype, temperature: float = 1.0) -> None:
        identity = {"weights": weights_digest(model), "dtype": str(dtype), "temperature": temperature}
        self._key = _key(identity)
        self.model = model.to(dtype).eval()
        self.temperature = temperature

    @property
    def key(self) -> str:
        """sha256 of weights, dtype and temperature."""
        return self._key

    def of(self, batch: GroupBatch, /) -> Tensor:
        """Return the log-probability of each completion of a batch, `[C]` float32."""
        return _without_gradients(self.model.to(batch.tokens.device), batch, self.temperature)


@dataclass(frozen=True)
class ReferenceLogProbabilities:
    """The reference's log-probability of each completion of some token sources.

    key: sha256 of what determines the values.
    sums: by the name of a source in the mixture, `[all completions]` float64, in the source's order.
    first: by the name, where the completions of each group begin, `[groups + 1]`.
    mismatched: by the name, of each prompt with the completion of another record, `[groups]` float64; empty
        where no loss needs them.
    """

    key: str
    sums: dict[str, NDArray[np.float64]] = field(compare=False, repr=False)
    first: dict[str, NDArray[np.int64]] = field(compare=False, repr=False)
    mismatched: dict[str, NDArray[np.float64]] = field(compare=False, repr=False, default_factory=dict)

    @property
    def temperature(self) -> float:
        """1: they are of the model's own distribution."""
        return 1.0

    def of(self, batch: GroupBatch) -> Tensor:
        """Return the log-probability of each completion of a batch, `[C]` float32, on the batch's device."""
        found = [
            self.sums[group.source][
                self.first[group.source][group.document] : self.first[group.source][group.document + 1]
            ]
            for group in batch.groups
        ]
        return self._checked(found, batch)

    def of_mismatched(self, batch: GroupBatch) -> Tensor:
        """Return the log-probability of each completion of a `GroupBatch.mismatched` batch, `[C]` float32."""
        found = [self.mismatched[one.source][one.document : one.document + 1] for one in batch.groups]
        return self._checked(found, batch)

    def _checked(self, found: list[NDArray[np.float64]], batch: GroupBatch) -> Tensor:
        values = np.concatenate(found) if found else np.zeros(0)
        if len(values) != batch.completions or not np.isfinite(values).all():
            raise ValueError("the reference has no log-probabilities of these completions")
        return torch.from_numpy(values).to(batch.tokens.device, torch.float32)


def default_cache() -> Path:
    """Return the folder of the user's caches."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "koine" / "reference"


def reference_log_probabilities(
    model: LanguageModel,
    order: PreferenceOrder,
    *,
    cache: Path,
    dtype: torch.dtype = torch.float32,
    rows: int = 4,
    device: str = "cpu",
    mismatched: bool = False,
) -> ReferenceLogProbabilities:
    """Return the log-probabilities of all groups that an order may draw; compute those not in the cache.

    Args:
        model: the reference; it is moved to `device` and `dtype` where something is to be computed.
        order: the groups, and the length of a row, to which long completions are cut.
        cache: folder of all caches.
        dtype: of the computation: the policy's, so that both round alike.
        rows: rows of a forward pass.
        device: where to compute.
        mismatched: also of each prompt with the completion of another record, for KTO.

    Raises:
        UserError: rows of several lengths, a model of another vocabulary, or a folder of the cache that holds
            something else.
    """
    lengths = {shape.sequence_length for shape in order.mixture.shapes()}
    if len(lengths) > 1:
        raise UserError("a reference needs rows of one length", hint="give all phases one sequence length")
    [length] = lengths
    weights = weights_digest(model)
    keys, sums, first, exchanged = [], {}, {}, {}
    for phase in order.mixture.phases:
        for source in phase.all_sources:
            if source.name in sums:
                continue
            tokens = order.sources[source.path]
            if tokens.vocab_size > model.vocab_size:
                raise UserError(
                    f"the pairs have ids up to {tokens.vocab_size}, the reference knows {model.vocab_size}",
                    where=source.path,
                    hint="give a reference with the tokenizer of the pairs",
                )
            identity = {
                "weights": weights,
                "tokens": sha256_file(source.path / "manifest.json"),
                "tokenizer": tokens.tokenizer_fingerprint,
                "row": length,
                "dtype": str(dtype).removeprefix("torch."),
            }
            key = _key(identity)
            counts = np.array(
                [sum(one.completion for one in tokens.segments(number)) for number in range(len(tokens))]
            )
            first[source.name] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            folder = cache / key[:24]
            sums[source.name] = _of_source(
                model, tokens, source.name, identity, folder, first[source.name], dtype, rows, device
            )
            keys.append(key)
            if mismatched:
                identity = {**identity, "completions": "of other records"}
                starts = np.arange(len(tokens) + 1)
                exchanged[source.name] = _of_source(
                    model,
                    order.mismatched(source.path),
                    source.name,
                    identity,
                    cache / _key(identity)[:24],
                    starts,
                    dtype,
                    rows,
                    device,
                )
    whole = hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()
    return ReferenceLogProbabilities(whole, sums, first, exchanged)


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _of_source(
    model: LanguageModel,
    tokens: TokenSource | MismatchedSource,
    name: str,
    identity: dict[str, Any],
    folder: Path,
    first: NDArray[np.int64],
    dtype: torch.dtype,
    rows: int,
    device: str,
) -> NDArray[np.float64]:
    """Return the log-probabilities of one source, `[completions]`; NaN for groups that fit no row."""
    spans = [
        range(start, min(start + GROUPS_OF_FILE, len(tokens)))
        for start in range(0, len(tokens), GROUPS_OF_FILE)
    ]

    def read(span: range) -> NDArray[np.float64] | None:
        wanted = int(first[span.stop] - first[span.start])
        return _read(folder / f"groups-{span.start:08d}.f64", wanted)

    if (folder / IDENTITY).exists():
        _check_identity(folder, identity)
        # A complete cache is only read, so that it may be shared, also where nobody may write.
        parts = [found for span in spans if (found := read(span)) is not None]
        if len(parts) == len(spans):
            return np.concatenate(parts) if parts else np.zeros(0)
    make_folder(folder)
    # The other ranks of a training wait for the first, and then read what it wrote.
    with exclusive(
        folder / ".lock",
        doing="computing reference log-probabilities",
        wait=-1,
        waiting=lambda: note(f"waiting for another process that computes {folder}", err=True),
    ):
        _check_identity(folder, identity)
        parts = []
        ready = False
        for span in spans:
            found = read(span)
            if found is None:
                if not ready:
                    left = len(tokens) - span.start
                    note(f"reference log-probabilities of {left:,} groups, kept in {folder}")
                    model.to(device, dtype).eval()
                    ready = True
                found = _compute(model, tokens, name, span, first, identity["row"], rows, device)
                write_atomically(folder / f"groups-{span.start:08d}.f64", found.tobytes())
            parts.append(found)
    return np.concatenate(parts) if parts else np.zeros(0)


def _check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write what a new folder is for. Raises `UserError` for a folder of other weights or tokens."""
    path = folder / IDENTITY
    if not path.exists():
        write_json(path, identity)
        return
    recorded = Fields(read_json(path), path, hint_if_broken="remove the folder; it is computed again").value
    other = [name for name, value in identity.items() if recorded.get(name) != value]
    if other:
        raise UserError(
            f"is a cache of another {' and '.join(other)}",
            where=folder,
            hint="remove the folder; its log-probabilities are computed again",
        )


def _read(path: Path, count: int) -> NDArray[np.float64] | None:
    """Return the values of a file; None where it is missing or of another size."""
    if not path.is_file() or path.stat().st_size != 8 * count:
        return None
    return np.fromfile(path, dtype=np.float64)


def _compute(
    model: LanguageModel,
    tokens: TokenSource | MismatchedSource,
    name: str,
    groups: range,
    first: NDArray[np.int64],
    time: int,
    rows: int,
    device: str,
) -> NDArray[np.float64]:
    found = np.full(int(first[groups.stop] - first[groups.start]), np.nan)
    fitting = [number for number in groups if fewest_tokens(tokens.segments(number)) <= time]
    for packed, numbers in source_batches(tokens, name, fitting, time=time, rows=rows):
        batch = packed.to(device)
        values = _without_gradients(model, batch).double().cpu().numpy()
        for number, start in zip(numbers, _starts(batch), strict=True):
            count = int(first[number + 1] - first[number])
            offset = int(first[number] - first[groups.start])
            found[offset : offset + count] = values[start : start + count]
    return found


def _without_gradients(model: LanguageModel, batch: GroupBatch, temperature: float = 1.0) -> Tensor:
    """Compute the log-probability of each completion by the kernels of a training, `[C]`.

    Kernels are chosen by whether gradients are enabled. With the same kernels and weights the log-ratio to the
    policy is 0, also in bfloat16, where other kernels differ by a nat over 300 tokens. No weight requires
    gradients meanwhile, so nothing is kept for them.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad = False
    try:
        with torch.enable_grad():
            return completion_log_probabilities(model, batch, temperature=temperature).sums.detach()
    finally:
        for parameter in learning:
            parameter.requires_grad = True


def _starts(batch: GroupBatch) -> list[int]:
    """Return the first completion of each group."""
    counts = torch.bincount(batch.group_of, minlength=len(batch.groups)).cumsum(0)
    return [0, *counts[:-1].tolist()]
