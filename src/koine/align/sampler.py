"""Sample completions from a model in training.

Generation wants weights in a layout that cannot be trained (`koine.generate.cpu`). So each round makes a copy
of the model for inference. The copy shares all tensors with the model, except the matrices that are prepacked:
these are laid out anew from the weights of the moment, which takes less time than one training step
(docs/explanation/log.md).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from koine.errors import UserError
from koine.generate.cache_support import probe_padding
from koine.generate.cpu.prepacked_linear import prepack
from koine.generate.padded_scheduler import PaddedScheduler
from koine.generate.request import Request
from koine.generate.sampling import Sampling
from koine.generate.scheduler import Scheduler
from koine.generate.sequential import SequentialGenerator
from koine.model.causal_lm import CausalLM
from koine.model.decoder import Decoder
from koine.model.language_model import LanguageModel


def inference_copy(model: LanguageModel) -> LanguageModel:
    """Return a copy of a model for inference with its weights of this moment. The model stays as it is.

    Use it until the next update of the weights. Its parameters share memory with the model's, unless they are
    prepacked.
    """
    memo: dict[int, object] = {
        id(one): nn.Parameter(one.detach(), requires_grad=False) for one in model.parameters()
    }
    # Modules are copied, so that what they keep between calls in inference mode is not the trainer's.
    copied = copy.deepcopy(model, memo)
    copied.set_gradient_checkpointing(False)
    copied.eval()
    return prepack(copied) if isinstance(copied, Decoder) else copied


def is_split(model: LanguageModel) -> bool:
    """Return whether the weights are split over processes (FSDP)."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def gathered(model: LanguageModel, dtype: torch.dtype | None) -> LanguageModel:
    """Return a whole copy of a model whose weights are split over processes; all of them call this.

    dtype: that split weights are computed in; None: as they are.

    Raises `UserError` for another class than our decoder, and for a model with a LoRA adapter.
    """
    if not isinstance(model, Decoder) or model.adapter is not None:
        what = "model with an adapter" if model.adapter is not None else model.architecture
        raise UserError(
            f"a {what} whose weights are split over processes cannot be sampled from",
            hint="train in one process",
        )
    tensors = {}
    for name, tensor in model.state_dict().items():
        whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        tensors[name] = whole.to(dtype) if dtype is not None and whole.is_floating_point() else whole
    with torch.device("meta"):
        copied = Decoder(model.config)
    copied.load_state_dict(tensors, assign=True)
    copied.eos_ids = model.eos_ids
    return copied


def open_scheduler(model: LanguageModel, max_batch: int) -> Scheduler | PaddedScheduler | SequentialGenerator:
    """Return what runs the requests of an `inference_copy`."""
    if isinstance(model, Decoder):
        return Scheduler(model, max_batch=max_batch)
    assert isinstance(model, CausalLM)
    with torch.inference_mode():
        shapes = probe_padding(model.inner)
    if shapes is None:
        return SequentialGenerator(model)
    return PaddedScheduler(model, shapes, max_batch=max_batch)


def sample(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    stop_ids: Collection[int],
    max_batch: int = 64,
) -> list[Request]:
    """Sample one completion for each prompt; return the finished requests in order.

    Their log-probabilities are of the distribution at the sampling's temperature.

    Args:
        model: from `inference_copy`.
        prompts: token ids; equal ones are computed once.
        sampling: its seed is not read.
        seeds: one for each prompt.
        stop_ids: tokens that end a completion; the one found is its last token.
        max_batch: completions that run at once.
    """
    engine = open_scheduler(model, max_batch)
    requests = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        request = engine.submit(prompt, replace(sampling, seed=seed), stop_ids=stop_ids)
        request.tempered = not sampling.greedy
        requests.append(request)
    engine.run()
    return requests


def sample_seed(seed: int, step: int, prompt: str, index: int) -> int:
    """Return the seed of completion `index` of a prompt at a step of a run with this seed."""
    text = f"{seed}/{step}/{index}/{prompt}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
