"""Answers to a batch of prompts of any lengths, as token ids."""

from __future__ import annotations

from collections.abc import Sequence

from koine.generate.request import Request
from koine.generate.sampling import Sampling
from koine.generate.scheduler import Scheduler
from koine.model.decoder import Decoder


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int] = (),
    max_batch: int = 64,
    prefill_chunk: int = 2048,
) -> list[Request]:
    """The finished requests, in order: their `tokens` (the stop id that was met included), `log_probabilities` and `finish`.

    Prompt i draws with `seed + i`, so that none depends on the others. Raises `UserError` for an empty prompt or an unknown id.
    """
    scheduler = Scheduler(model, max_batch=max_batch, prefill_chunk=prefill_chunk, prefixes=0)
    requests = [
        scheduler.submit(prompt, own, stop_ids=stop_ids)
        for prompt, own in zip(prompts, sampling.per_prompt(len(prompts)), strict=True)
    ]
    scheduler.run()
    return requests
