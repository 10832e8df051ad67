"""Generate for a batch of prompts of token ids."""

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
    """Generate for each prompt, and return the finished requests in order.

    Prompt i samples with `seed + i`, so that its tokens do not depend on the other prompts.

    Args:
        model: the decoder.
        prompts: token ids, of any lengths.
        sampling: settings of all prompts; `stop` and `json_schema` need a `LocalEngine`.
        stop_ids: tokens that end generation; the one found is the last of `Request.tokens`.
        max_batch: prompts that run at once.
        prefill_chunk: prompt tokens processed between two decode steps.

    Raises:
        UserError: a prompt is empty or holds an unknown id.
    """
    scheduler = Scheduler(model, max_batch=max_batch, prefill_chunk=prefill_chunk, prefixes=0)
    requests = [
        scheduler.submit(prompt, own, stop_ids=stop_ids)
        for prompt, own in zip(prompts, sampling.per_prompt(len(prompts)), strict=True)
    ]
    scheduler.run()
    return requests
