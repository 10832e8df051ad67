"""Reading tokens with a cache of what was read before, for our decoder and for any causal LM of transformers."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from koine.errors import UserError
from koine.model.decoder import Decoder
from koine.model.interop import CausalLM

# Long prompts are read in pieces, so that the activations of all positions never stand side by side.
CHUNK = 2048
# What is taken as the context of a model whose configuration states none (recurrent ones).
UNLIMITED = 2**30


class Cached(Protocol):
    """One row of text being read."""

    def feed(self, tokens: Tensor) -> Tensor:
        """Read `[1, time]` ids after those read before; logits `[vocab]` of what comes next."""
        ...


class DecoderCache:
    """Our decoder with its own cache."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.cache = model.new_cache(1)

    def feed(self, tokens: Tensor) -> Tensor:
        return self.model.logits(self.model(tokens, cache=self.cache)[0, -1])


class TransformersCache:
    """A causal LM of transformers with the cache that it makes itself."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.past: Any = None

    def feed(self, tokens: Tensor) -> Tensor:
        out = self.model.inner(input_ids=tokens, past_key_values=self.past, use_cache=True)
        self.past = getattr(out, "past_key_values", None)
        if self.past is None:
            raise UserError(
                f"{type(self.model.inner).__name__} keeps no key-value cache",
                mend="chat needs a model that does",
            )
        logits = out.logits[0, -1]
        assert isinstance(logits, Tensor)
        return logits


class Reader:
    """The tokens read so far and the cache that belongs to exactly them."""

    def __init__(self, model: Decoder | CausalLM) -> None:
        self.model = model
        self.context = _context(model)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.tokens: list[int] = []
        self._cache: Cached | None = None

    def reset(self) -> None:
        """Forget everything read."""
        self.tokens = []
        self._cache = None

    def continues(self, prompt: list[int]) -> bool:
        """Whether `prompt` is what was read and at least one token more."""
        read = len(self.tokens)
        return self._cache is not None and len(prompt) > read and prompt[:read] == self.tokens

    def read(self, tokens: list[int]) -> Tensor:
        """Read on; logits `[vocab]` of what comes next. Interrupted, it forgets everything rather than half a token."""
        cache, read = self._cache or self._new_cache(), self.tokens
        self.reset()
        with torch.inference_mode():
            for start in range(0, len(tokens), CHUNK):
                logits = cache.feed(torch.tensor([tokens[start : start + CHUNK]], device=self.device))
        self._cache, self.tokens = cache, read + tokens
        # A copy is an ordinary tensor, which the caller may change.
        return logits.clone()

    def _new_cache(self) -> Cached:
        return DecoderCache(self.model) if isinstance(self.model, Decoder) else TransformersCache(self.model)


def _context(model: Decoder | CausalLM) -> int:
    config = model.config if isinstance(model, Decoder) else model.inner.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or UNLIMITED)
