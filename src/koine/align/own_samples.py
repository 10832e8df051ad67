"""Sample from a model that is being trained, for a measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from koine.align.sampler import gathered, inference_copy, is_split, open_scheduler
from koine.errors import UserError
from koine.generate.sampling import Sampling
from koine.model.language_model import LanguageModel


class Sample(NamedTuple):
    """A sampled completion: its ids, the stop token included, and whether a stop token ended it."""

    tokens: tuple[int, ...]
    stopped: bool


def sample_completions(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Iterable[int] = (),
    max_batch: int = 32,
) -> list[Sample]:
    """Sample one completion of each prompt from the model as it is now; the model itself is not touched.

    Prompt i samples with `seed + i`, so a completion depends on weights, prompt and place in the list alone. A
    completion ends where prompt and completion fill the model's context. Weights that FSDP split over
    processes are gathered: all processes call this.

    Raises:
        UserError: a prompt fills the context, or holds an unknown id.
    """
    stop_ids = frozenset(stop_ids)
    # What is gathered already, after a forward pass, may be in the precision of the computation.
    whole = gathered(model, torch.float32) if is_split(model) else model
    scheduler = open_scheduler(inference_copy(whole), max_batch)
    requests = []
    for number, (prompt, own) in enumerate(zip(prompts, sampling.per_prompt(len(prompts)), strict=True)):
        room = own.max_new_tokens if model.context_length is None else model.context_length - len(prompt)
        if room < 1:
            raise UserError(
                f"prompt {number + 1} has {len(prompt)} tokens, and the model's context holds "
                f"{model.context_length}",
                hint="give a shorter prompt",
            )
        limited = dataclasses.replace(own, max_new_tokens=min(own.max_new_tokens, room))
        requests.append(scheduler.submit(prompt, limited, stop_ids=stop_ids))
    scheduler.run()
    return [Sample(tuple(request.tokens), request.finish == "stop") for request in requests]
