"""Sample from a model that is being trained: generation runs on a copy, which is packed for speed.

Generation packs weights into layouts that cannot be trained (`koine.generate.cpu.prepacked_linear`), and its
buffers are inference tensors. So nothing of it may touch the model of the training.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from koine.errors import UserError
from koine.generate.cache_support import probe_padding
from koine.generate.cpu.prepacked_linear import prepack
from koine.generate.padded_scheduler import PaddedScheduler
from koine.generate.sampling import Sampling
from koine.generate.scheduler import Scheduler
from koine.generate.sequential import SequentialGenerator
from koine.model.causal_lm import CausalLM
from koine.model.decoder import Decoder
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
    completion ends where prompt and completion fill the model's context.

    Raises:
        UserError: a prompt fills the context, or holds an unknown id.
    """
    stop_ids = frozenset(stop_ids)
    scheduler = _scheduler(inference_copy(model), max_batch)
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


def _scheduler(model: LanguageModel, max_batch: int) -> Scheduler | PaddedScheduler | SequentialGenerator:
    if isinstance(model, Decoder):
        return Scheduler(prepack(model), max_batch=max_batch, prefixes=0)
    assert isinstance(model, CausalLM)
    with torch.inference_mode():
        shapes = probe_padding(model.inner)
    if shapes is None:
        return SequentialGenerator(model)
    return PaddedScheduler(model, shapes, max_batch=max_batch, prefixes=0)


def inference_copy(model: LanguageModel) -> LanguageModel:
    """Return a copy of a model for generation, with weights of its own and without gradients.

    Weights that FSDP split over processes are gathered; all processes call this.
    """
    clone: Any
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        clone = copy.deepcopy(model)
    elif isinstance(model, Decoder) and model.adapter is None:
        clone = Decoder(model.config)
        clone.eos_ids = model.eos_ids
        # What is gathered already, after a forward pass, may be in the precision of the computation.
        gathered: dict[str, Any] = {
            name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()).float()
            for name, tensor in model.state_dict().items()
        }
        clone.load_state_dict(gathered, assign=True)
    else:
        raise UserError(
            f"a {model.architecture} that is split over processes cannot be sampled from",
            hint="train in one process, or monitor without prompts",
        )
    return clone.requires_grad_(False).eval()  # type: ignore[no-any-return]
