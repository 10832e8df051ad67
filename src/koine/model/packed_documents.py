"""Keep the documents of a packed row apart in classes of `transformers`; find out by experiment which can.

| way | what the class gets | for example |
|---|---|---|
| `positions` | position ids that begin at 0 in each document; the class makes its own masks of them | Llama |
| `masks` | the same where it takes them; the masks that `transformers` makes for it are restricted to documents | BLOOM |
| none | | recurrent classes, such as Mamba |

Names of classes decide nothing. Two rows of two documents are computed:

1. Other tokens in the first document must leave the logits of the second one as they are.
2. The logits of each document must be those that it has in a row of its own.

Differences are compared with those of a plain row, in which attention crosses documents.

Shape suffixes: b batch (2), t time, v vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from koine.model.lm_head import forward_arguments, forward_logits, probe_tokens

Way = Literal["positions", "masks"]

WAYS: tuple[Way, ...] = ("positions", "masks")
BOUNDARIES = (7 / 16, 10 / 16)
"""Beginning of the second document in each of the two rows, as a share of the row."""
FEWEST_TOKENS = 4
"""Shortest context length that the experiment can be made in."""
WINDOW_FIELDS = ("sliding_window", "attention_chunk_size")
"""Fields that are lowered to `PROBE_WINDOW` in the experiment, so that short documents exceed them."""
PROBE_WINDOW = 3
LEAK = 1e-5
"""Largest change by another document, as a share of that in a plain row. Masks make it exactly 0."""
SHIFT = 1e-4
"""Largest difference from the document alone, as a share of that in a plain row: rounding."""
MASKED_ATTENTION = ("eager", "sdpa")
"""Attention implementations of `transformers` that compute any mask."""


@dataclass(frozen=True)
class DocumentIsolation:
    """How a class keeps packed documents apart.

    way: what does it; None: nothing.
    reason: why nothing does, a clause.
    """

    way: Way | None
    reason: str = ""


def document_positions(document_ids: Tensor) -> Tensor:
    """Return positions `[batch, time]` that begin at 0 in each document; padding counts as a document."""
    columns = torch.arange(document_ids.shape[1], device=document_ids.device).expand(document_ids.shape)
    begins = torch.zeros_like(columns)
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    begins[:, 1:] = torch.where(changes, columns[:, 1:], 0)
    return columns - begins.cummax(dim=1).values


@contextmanager
def isolated_documents(
    inner: Any, arguments: frozenset[str], way: Way, document_ids: Tensor
) -> Iterator[dict[str, Any]]:
    """Yield arguments of `inner.forward` that keep documents apart, for a call inside the context.

    Args:
        inner: the model of `transformers`.
        arguments: `forward_arguments(inner)`.
        way: how its class does it.
        document_ids: `[batch, time]`, equal within a document, -1 for padding.
    """
    positions_bt = document_positions(document_ids)
    inputs: dict[str, Any] = {}
    if "position_ids" in arguments:
        inputs["position_ids"] = positions_bt
    if way == "positions":
        yield inputs
        return
    if "attention_mask" in arguments:
        # Nothing is padding; without a mask some classes would look for documents in the positions.
        inputs["attention_mask"] = torch.ones_like(positions_bt)
    with _masks_of_documents(_attention(inner), document_ids, positions_bt):
        yield inputs


def _attention(inner: Any) -> str:
    """Return the attention implementation of a model, as `transformers` names it."""
    return str(inner.config.get_text_config()._attn_implementation)


@contextmanager
def _masks_of_documents(implementation: str, ids_bt: Tensor, positions_bt: Tensor) -> Iterator[None]:
    """Restrict to documents all masks that `transformers` makes for an attention implementation."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    make_mask = MASKS[implementation]

    def inside_documents(visible: Callable[..., Any]) -> Callable[..., Any]:
        # Windows and chunks are counted from the beginning of the document.
        def inner_mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
            same = ids_bt[batch, query] == ids_bt[batch, key]
            return same & visible(batch, head, positions_bt[batch, query], positions_bt[batch, key])

        return inner_mask

    def make_document_mask(*, mask_function: Callable[..., Any], **more: Any) -> Any:
        more["allow_is_causal_skip"] = False
        return make_mask(mask_function=inside_documents(mask_function), **more)

    MASKS[implementation] = make_document_mask
    try:
        yield
    finally:
        # Assigning and deleting change only what shadows the library's own function.
        del MASKS[implementation]


def inspect_isolation(inner: Any) -> DocumentIsolation:
    """Try each way on two short packed rows and return the first that keeps documents apart.

    A model of less precision than float32 is computed as a copy in float32: its rounding could hide a leak.
    """
    model = inner
    if inner.dtype.itemsize < torch.float32.itemsize:
        model = copy.deepcopy(inner).float()
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _short_windows(model.config.get_text_config()):
            return _first_way(_Probe(model))
    finally:
        model.train(training)


def _first_way(probe: _Probe) -> DocumentIsolation:
    if probe.time < FEWEST_TOKENS:
        return DocumentIsolation(None, f"it reads at most {probe.time} tokens")
    reasons = []
    for way in WAYS:
        if probe.takes(way):
            reason = probe.failure(way)
            if not reason:
                return DocumentIsolation(way)
            reasons.append(reason)
    return DocumentIsolation(None, reasons[-1] if reasons else "it takes neither positions nor masks")


class _Probe:
    """Two packed rows of a model, and the logits of their documents alone."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.arguments = inner, forward_arguments(inner)
        device = next(iter(inner.parameters())).device
        first = probe_tokens(inner)[0].to(device)
        self.time = len(first)
        self.boundaries = [max(1, int(self.time * share)) for share in BOUNDARIES]
        self.tokens = torch.stack([first, first.flip(0)])
        # The same rows with other first documents.
        self.changed = self.tokens.clone()
        self.document_ids = torch.zeros_like(self.tokens)
        for row, begin in enumerate(self.boundaries):
            self.changed[row, :begin] = self.tokens[1 - row, :begin]
            self.document_ids[row, begin:] = 1

    def takes(self, way: Way) -> bool:
        """Return whether a way can be tried on the class."""
        if way == "positions":
            return "position_ids" in self.arguments
        return _attention(self.inner) in MASKED_ATTENTION

    def failure(self, way: Way) -> str:
        """Return why a way does not keep the documents apart; empty where it does."""
        try:
            with isolated_documents(self.inner, self.arguments, way, self.document_ids) as inputs:
                packed, changed = self.logits(self.tokens, inputs), self.logits(self.changed, inputs)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            # What classes raise for arguments that they do not know; plain rows they have computed before.
            return f"its forward pass fails for packed rows ({type(error).__name__}: {error})"
        plain, plain_changed = self.logits(self.tokens, {}), self.logits(self.changed, {})
        alone = self.alone()
        leak, control = self.second(packed - changed), self.second(plain - plain_changed)
        shift, plain_shift = float((packed - alone).abs().max()), float((plain - alone).abs().max())
        rounding = torch.finfo(torch.float32).eps * float(alone.abs().max())
        if control <= 16 * rounding:
            return "its logits hardly depend on earlier tokens, so the experiment says nothing"
        # Comparisons that are false for NaN.
        if not leak <= LEAK * control + 2 * rounding:
            return "a document changes the logits of the next one"
        if not shift <= SHIFT * plain_shift + 8 * rounding:
            return "the logits of a document are not those of the document alone"
        return ""

    def second(self, difference_btv: Tensor) -> float:
        """Return the largest difference in the second documents."""
        return float(difference_btv[self.document_ids == 1].abs().max())

    def logits(self, tokens: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Compute logits `[batch, time, vocab]`, in float64."""
        more = {"use_cache": False} if "use_cache" in self.arguments else {}
        logits_btv = forward_logits(self.inner, {"input_ids": tokens, **more, **inputs})
        # A class may forbid ids by minus infinity.
        return torch.nan_to_num(logits_btv.double(), neginf=0.0)

    def alone(self) -> Tensor:
        """Compute the logits of each document in a row of its own, joined as the documents are packed."""
        rows = []
        for row, begin in enumerate(self.boundaries):
            parts = (self.tokens[row : row + 1, :begin], self.tokens[row : row + 1, begin:])
            rows.append(torch.cat([self.logits(part, {}) for part in parts], dim=1))
        return torch.cat(rows)


@contextmanager
def _short_windows(config: Any) -> Iterator[None]:
    """Lower the windows of a configuration, of which `transformers` makes masks in each forward pass."""
    found = {name: getattr(config, name, None) for name in WINDOW_FIELDS}
    lowered = {
        name: value for name, value in found.items() if isinstance(value, int) and value > PROBE_WINDOW
    }
    try:
        for name in lowered:
            setattr(config, name, PROBE_WINDOW)
        yield
    finally:
        for name, value in lowered.items():
            setattr(config, name, value)
