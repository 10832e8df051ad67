"""Speed of training steps on this machine: measured on a few steps of the model itself, and remembered.

A measurement takes less than a second for models of any size. It is made while other processes leave the cores free, because a busy
machine would look slow for ever. Otherwise an earlier measurement of the same kind is used, or an assumed
speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from koine.data.batch import NO_TARGET, Batch
from koine.errors import UserError
from koine.fields import Fields
from koine.files import write_json
from koine.hardware import busy_cores, processor_name, usable_cores
from koine.model.config import ModelConfig
from koine.model.counting import block_matrix_parameters, count_parameters, training_flops_per_token
from koine.model.decoder import Decoder
from koine.train.determinism import deterministic
from koine.train.model_adapters import prepare_model
from koine.train.objectives import LanguageModelling
from koine.train.optimiser import Optimiser
from koine.train.settings import TrainSettings

MAX_OPERATIONS = 2e10
"""FLOPs of the micro-batch that is timed: half a second of a slow core. Larger ones are timed in part."""
MAX_ENTRIES = 2**24
"""Entries of the embedding and of a layer of the model that is timed; larger models are made narrower."""
DOCUMENT_TOKENS = 128
"""Length of the documents in a timed row."""
TIMED_SECONDS = 0.3
NOW_SECONDS, FRESH_SECONDS = 60.0, 3_600.0
"""A measurement of the last minute counts as made now; one of the last hour is not repeated."""
MOST_REMEMBERED = 256
QUIET_SHARE = 0.15
"""Other processes may use this share of all cores while the speed is measured."""
ASSUMED_RATE = {"float32": 8e10, "bfloat16": 1.2e11}
"""FLOP/s of one core that training reaches, where nothing was measured."""
ASSUMED_LAYER_SECONDS = 1e-3
"""Time of one layer's operations in a micro-batch, however small it is."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of the parts of a training step."""

    micro_batch: float
    """Forward and backward pass of one micro-batch."""
    update: float
    """Clipping and the optimiser's update."""
    basis: str = ""
    """One sentence about where the speed comes from."""
    measured: bool = True


def training_speed(
    config: ModelConfig, settings: TrainSettings, rows: int, length: int, threads: int
) -> Speed:
    """Return the speed of micro-batches of `rows` times `length` tokens on `threads` CPU cores.

    It is measured now where other processes leave the cores free, unless that was done within the last hour.
    """
    place = _place(config, settings, rows, length, threads)
    earlier = _read(place)
    if earlier is not None and time.time() - earlier[1] < FRESH_SECONDS:
        return _with_time(*earlier)
    used, cores = _busy_cores(), usable_cores()
    if used <= QUIET_SHARE * cores:
        found = measure_speed(config, settings, rows, length, threads)
        _write(place, found)
        return replace(found, basis="Training speed: measured now on this machine.")
    busy = f"it was not measured now, because other processes use {used:.1f} of {cores} cores"
    if earlier is not None:
        found = _with_time(*earlier)
        return replace(found, basis=f"{found.basis.removesuffix('.')}; {busy}.")
    return replace(
        assumed_speed(config, settings, rows, length, threads),
        basis=f"Training speed: assumed, it may be off by a factor of 3; {busy}.",
    )


@functools.cache
def _busy_cores() -> float:
    """Return `busy_cores`, measured once in a process."""
    return busy_cores()


def assumed_speed(
    config: ModelConfig, settings: TrainSettings, rows: int, length: int, threads: int
) -> Speed:
    """Return a speed from the FLOPs and an assumed rate of each core."""
    operations = rows * length * training_flops_per_token(config, length)
    seconds = operations / (ASSUMED_RATE[settings.dtype] * threads)
    seconds += len(config.layers) * ASSUMED_LAYER_SECONDS
    update = count_parameters(config).total * 2e-9
    again = 4 / 3 if settings.gradient_checkpointing else 1.0
    return Speed(micro_batch=seconds * again, update=update, measured=False)


def measure_speed(
    config: ModelConfig, settings: TrainSettings, rows: int, length: int, threads: int
) -> Speed:
    """Time steps of a new model of this configuration, and leave torch's threads and settings as they were.

    A micro-batch of more than `MAX_OPERATIONS` is timed with fewer layers, rows and tokens, and scaled by its
    FLOPs; the update is scaled by the parameters.
    """
    small, small_rows, small_length = _affordable(config, rows, length)
    scale = (rows * length * training_flops_per_token(config, length)) / (
        small_rows * small_length * training_flops_per_token(small, small_length)
    )
    with torch.random.fork_rng(devices=()), deterministic(replace(settings, threads=threads)):
        model = Decoder(small)
        prepare_model(model, gradient_checkpointing=settings.gradient_checkpointing)
        dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        optimiser, objective = Optimiser(model, settings, dtype=dtype), LanguageModelling()
        batch = _batch(small.vocab_size, small_rows, small_length)

        def forward_backward() -> None:
            loss, _ = objective(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.accumulate_gradients()

        def update() -> None:
            optimiser.scale_and_clip(1e-3, settings.clip_norm)
            optimiser.step(0.0)

        micro_batch, updated = _timed(forward_backward, update)
    larger = count_parameters(config).total / count_parameters(small).total
    return Speed(micro_batch=micro_batch * scale, update=updated * larger)


def _timed(work: Callable[[], None], then: Callable[[], None]) -> tuple[float, float]:
    """Return the median seconds of `work`, and of `then` after it; the first time is not counted."""
    first: list[float] = []
    second: list[float] = []
    work()
    then()
    until = time.perf_counter() + TIMED_SECONDS
    while not first or time.perf_counter() < until:
        begin = time.perf_counter()
        work()
        middle = time.perf_counter()
        then()
        first.append(middle - begin)
        second.append(time.perf_counter() - middle)
    return median(first), median(second)


def _affordable(config: ModelConfig, rows: int, length: int) -> tuple[ModelConfig, int, int]:
    """Return a smaller configuration and micro-batch of at most about `MAX_OPERATIONS`."""
    small = config
    while block_matrix_parameters(small) > MAX_ENTRIES and small.hidden_size > 1024:
        groups, kv_heads = small.num_heads // small.num_kv_heads, max(1, small.num_kv_heads // 2)
        small = replace(
            small,
            hidden_size=small.hidden_size // 2,
            intermediate_size=small.intermediate_size // 2,
            num_heads=kv_heads * groups,
            num_kv_heads=kv_heads,
        )
    small = replace(small, vocab_size=min(small.vocab_size, max(1024, MAX_ENTRIES // small.hidden_size)))

    def operations() -> float:
        return rows * length * training_flops_per_token(small, length)

    while operations() > MAX_OPERATIONS and len(small.layers) > 1:
        small = replace(small, layers=small.layers[: max(1, len(small.layers) // 2)])
    while operations() > MAX_OPERATIONS and rows > 1:
        rows //= 2
    while operations() > MAX_OPERATIONS and length > 64:
        length //= 2
    return small, rows, length


def _batch(vocab_size: int, rows: int, length: int) -> Batch:
    """Return random tokens in documents of `DOCUMENT_TOKENS`."""
    tokens = torch.randint(vocab_size, (rows, length))
    targets = torch.randint(vocab_size, (rows, length))
    ids = (torch.arange(length, dtype=torch.int32) // DOCUMENT_TOKENS).expand(rows, -1).contiguous()
    targets[:, DOCUMENT_TOKENS - 1 :: DOCUMENT_TOKENS] = NO_TARGET
    return Batch(tokens, targets, ids, list)


def _place(config: ModelConfig, settings: TrainSettings, rows: int, length: int, threads: int) -> Path:
    """Return the file that remembers a measurement; its name is a hash of all that decides on the speed."""
    known = {
        "config": dataclasses.asdict(config),
        "dtype": settings.dtype,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "shape": (rows, length, threads),
        "machine": (processor_name(), usable_cores(), str(torch.__version__)),
    }
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "koine" / "training-speed" / f"{name}.json"


def _read(place: Path) -> tuple[Speed, float] | None:
    """Return a remembered speed and its time; None where there is none, or it cannot be read."""
    try:
        value = json.loads(place.read_text(encoding="utf-8"))
        fields = Fields(value, place)
        numbers = {name: fields.number(name, low=0) for name in ("micro_batch", "update", "when")}
    except (OSError, ValueError, UserError):
        # It only saves time: a missing or damaged one is measured again.
        return None
    when = numbers.pop("when")
    return Speed(**numbers), when


def _with_time(speed: Speed, when: float) -> Speed:
    if time.time() - when < NOW_SECONDS:
        return replace(speed, basis="Training speed: measured now on this machine.")
    moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
    return replace(speed, basis=f"Training speed: measured on this machine on {moment}.")


def _write(place: Path, speed: Speed) -> None:
    # Without a writable folder (no home, a read-only or full disk) it is measured again next time.
    with contextlib.suppress(OSError, RuntimeError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            place,
            {
                "micro_batch": speed.micro_batch,
                "update": speed.update,
                "when": time.time(),
            },
        )
        entries = sorted(place.parent.glob("*.json"), key=lambda entry: entry.stat().st_mtime_ns)
        for entry in entries[:-MOST_REMEMBERED]:
            entry.unlink(missing_ok=True)
