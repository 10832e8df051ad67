"""Forward pass of a `transformers` model with its cache, for the logits of the last position only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from koine.model.lm_head import forward_arguments

if TYPE_CHECKING:
    from koine.generate.cache.padded_cache import PaddedCache


def cache_name(inner: Any) -> str | None:
    """Return the name of the model's argument and output that holds its cache, or None where it has none."""
    names = forward_arguments(inner)
    if "use_cache" not in names:
        return None
    return next((name for name in ("past_key_values", "cache_params") if name in names), None)


class CachedForward:
    """Runs a model after its cache. Arguments that its class does not know are left out."""

    def __init__(self, inner: Any) -> None:
        """inner: a model of `transformers` for which `cache_name` is not None."""
        self.inner, self.name = inner, str(cache_name(inner))
        self.device = next(iter(inner.parameters())).device
        known = forward_arguments(inner)
        self._takes_positions = "position_ids" in known
        # Logits of a whole chunk over a large vocabulary would take gigabytes.
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def __call__(self, ids: Sequence[int], past: Any) -> tuple[Tensor, Any]:
        """Process the next ids of one text; return logits `[vocab]` of the token after them, and the cache.

        past: the cache of the text before; None at its begin.
        """
        out = self._run(torch.tensor([list(ids)], device=self.device), past)
        return out.logits[0, -1], getattr(out, self.name, None)

    def batch(self, cache: PaddedCache, rows: Sequence[Sequence[int]]) -> Tensor:
        """Process the next ids of each row of a left-padded batch; return logits `[rows, vocab]`.

        rows: ids of each row; of different lengths only where the cache is empty.
        """
        counts = [len(row) for row in rows]
        longest = max(counts)
        # Padding repeats the row's own first id, which every class can embed.
        padded = [[row[0]] * (longest - len(row)) + list(row) for row in rows]
        mask, positions = cache.positions(counts, self.device)
        inputs = {} if mask is None else {"attention_mask": mask}
        if self._takes_positions:
            inputs["position_ids"] = positions
        out = self._run(torch.tensor(padded, device=self.device), cache.past, **inputs)
        cache.extend(counts)
        logits_rv: Tensor = out.logits[:, -1]
        return logits_rv

    def _run(self, ids_rt: Tensor, past: Any, **inputs: Tensor) -> Any:
        arguments = {**inputs, **self._last_only, self.name: past}
        return self.inner(input_ids=ids_rt, use_cache=True, **arguments)
