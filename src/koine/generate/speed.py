"""Measure prefill and decode speed of an engine, and the bytes of its KV cache, at several context lengths."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from koine.errors import UserError
from koine.fields import check_integer

if TYPE_CHECKING:
    from koine.generate.local_engine import LocalEngine

NEW_TOKENS = 17
"""Tokens of a run: the first ends the prefill, the others are timed as decode steps."""


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest value of several runs."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return Spread(median(values), min(values), max(values))


@dataclass(frozen=True, kw_only=True)
class LengthSpeed:
    """Speed and KV cache with `tokens` in the context; None where it was not measured.

    Attributes:
        cache_basis: "computed" from the configuration of our decoder, or "measured" on the tensors of the
            cache of `transformers`.
        left_out: why there are no measurements; empty where there are.
    """

    tokens: int
    cache_bytes: int | None = None
    cache_basis: str = ""
    prefill_per_second: Spread | None = None
    decode_per_second: Spread | None = None
    runs: int = 0
    left_out: str = ""


def measure_lengths(
    engine: LocalEngine, text: Sequence[int], lengths: Sequence[int], *, repeats: int = 3, max_seconds: float
) -> list[LengthSpeed]:
    """Measure one request at a time, with as many tokens in the context as each of `lengths` says.

    Args:
        engine: with the model; nothing else may use it meanwhile.
        text: token ids of which prompts are made; repeated where they are too few.
        lengths: tokens of context: those of the prompt and all new tokens but the last.
        repeats: runs of each length; fewer where they would take longer than `max_seconds`.
        max_seconds: a length is left out where one run would take longer, judged by the length before.

    Lengths beyond the model's context are left out; if all are, the context itself is measured.
    """
    if not text:
        raise UserError("no tokens to measure the speed with", hint="give text")
    for length in lengths:
        check_integer("the length", length, low=NEW_TOKENS + 1)
    wanted = sorted(set(lengths))
    if wanted and wanted[0] > engine.context > NEW_TOKENS:
        wanted.insert(0, engine.context)
    # The first run pays for what is done once: packing, threads, the allocator.
    _run(engine, _prompt(text, min(64, engine.context - NEW_TOKENS), 0))
    found: list[LengthSpeed] = []
    last = 0.0
    for length in wanted:
        if length > engine.context:
            reason = f"beyond the model's context of {engine.context:,} tokens"
            found.append(LengthSpeed(tokens=length, left_out=reason))
            continue
        measured = [one.tokens for one in found if one.runs]
        expected = last * length / measured[-1] if measured else 0.0
        if expected > max_seconds:
            reason = f"one run is expected to take more than {expected:,.0f} s, and the limit is {max_seconds:,.0f} s"
            found.append(_with_cache(LengthSpeed(tokens=length, left_out=reason), engine, text))
            continue
        one, last = _measure(engine, text, length, repeats, max_seconds)
        found.append(_with_cache(one, engine, text))
    return found


def _measure(
    engine: LocalEngine, text: Sequence[int], length: int, repeats: int, max_seconds: float
) -> tuple[LengthSpeed, float]:
    """Return the speed at one length, and the seconds of its slowest run."""
    prefill, decode, seconds = [], [], []
    size = length - (NEW_TOKENS - 1)
    for number in range(repeats):
        first, rest = _run(engine, _prompt(text, size, number))
        prefill.append(size / first)
        decode.append((NEW_TOKENS - 1) / rest)
        seconds.append(first + rest)
        if sum(seconds) + max(seconds) > max_seconds:
            break
    speed = LengthSpeed(
        tokens=length,
        prefill_per_second=Spread.of(prefill),
        decode_per_second=Spread.of(decode),
        runs=len(seconds),
    )
    return speed, max(seconds)


def _run(engine: LocalEngine, prompt: list[int]) -> tuple[float, float]:
    """Return the seconds to the first token, and from there to the last."""
    from koine.generate.sampling import Sampling

    times: list[float] = []

    def note_time(_: int) -> bool:
        times.append(time.perf_counter())
        return False

    start = time.perf_counter()
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)
    # Without stop ids, so that every run has as many tokens.
    engine.scheduler.submit(prompt, sampling, on_token=note_time)
    engine.scheduler.run()
    _forget(engine)
    return times[0] - start, times[-1] - times[0]


def _prompt(text: Sequence[int], size: int, number: int) -> list[int]:
    """Return a prompt of `size` tokens that begins elsewhere for each `number`: no cached prefix fits it."""
    start = (number + 1) * 7919
    return [text[(start + place) % len(text)] for place in range(size)]


def _forget(engine: LocalEngine) -> None:
    """Free the KV caches that the engine keeps for later prompts."""
    from koine.generate.padded_scheduler import PaddedScheduler
    from koine.generate.scheduler import Scheduler

    scheduler = engine.scheduler
    if isinstance(scheduler, PaddedScheduler):
        scheduler.cached.clear()
    elif isinstance(scheduler, Scheduler):
        while scheduler.prefixes.evict_oldest():
            pass


def _with_cache(speed: LengthSpeed, engine: LocalEngine, text: Sequence[int]) -> LengthSpeed:
    """Return the speed with the bytes of the KV cache at its length."""
    from koine.generate.cache.measured_bytes import measure_cache_bytes
    from koine.generate.scheduler import Scheduler
    from koine.model import CausalLM
    from koine.model.counting import cache_bytes

    scheduler = engine.scheduler
    if isinstance(scheduler, Scheduler):
        computed = cache_bytes(scheduler.model.config, speed.tokens, scheduler.cache.dtype.itemsize)
        return replace(speed, cache_bytes=computed, cache_basis="computed")
    if speed.runs and isinstance(engine.model, CausalLM):
        measured = measure_cache_bytes(engine.model, _prompt(text, speed.tokens, 0))
        return speed if measured is None else replace(speed, cache_bytes=measured, cache_basis="measured")
    return speed
