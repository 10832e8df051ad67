"""Find out by experiment what a causal LM of `transformers` does between its last matrix and its logits, and
that it is causal.

| head | logits | how it is used |
|---|---|---|
| linear | `scale * head(hidden)`, or that soft-capped: `cap * tanh(scale * head(hidden) / cap)` | logits are made for a part of the positions at a time |
| own | anything else | the model's own forward pass makes all logits |

The class's own forward pass decides, not fields of its configuration: numbers are put in place of the head's
output, and what the class makes of them is compared with the formulas.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROWS, TIME = 2, 16
"""Shape of the short reading; fewer tokens where a model allows fewer."""
LENGTHS = ("max_position_embeddings", "max_seq_len")
LEAK = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest change of earlier positions, as a share of that of the changed ones.

Expert matmuls round otherwise with other rows.
"""


@dataclass(frozen=True)
class Head:
    """The output head of a model: from hidden states to logits.

    linear: `scale` and `cap` say it all; else only the model's own forward pass knows.
    rows: how many ids are scored.
    causal: whether later tokens leave earlier logits as they are.
    finite: whether ordinary ids give neither NaN nor infinity.
    """

    linear: bool
    rows: int
    causal: bool
    finite: bool = True
    scale: float = 1.0
    cap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """Logits from the output embedding's products."""
        if self.scale != 1.0:
            raw = raw * self.scale
        return raw if self.cap is None else torch.tanh(raw / self.cap) * self.cap


def accepted(inner: Any) -> frozenset[str]:
    """The keyword arguments that a model's `forward` takes or passes on to its base model."""
    parameters = inspect.signature(inner.forward).parameters
    names = set(parameters)
    base = inner.base_model
    if base is not inner and any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        names |= set(inspect.signature(base.forward).parameters)
    return frozenset(names)


def read_logits(inner: Any, inputs: dict[str, Any]) -> Tensor:
    """The logits of the model's own forward pass. Raises `TypeError` where it gives none."""
    logits = getattr(inner(**inputs), "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{type(inner).__name__} gives no logits")
    return logits


@contextmanager
def hooked(head: nn.Module, seen: list[Tensor], instead: Tensor | None = None) -> Iterator[None]:
    """Record the input of the head.

    instead: replaces its output; None: only its last position is computed.
    """

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        seen.append(inputs[0])
        return None if instead is not None else (inputs[0][:, -1:], *inputs[1:])

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return instead

    handles = [head.register_forward_pre_hook(before)]
    if instead is not None:
        handles.append(head.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_head(inner: Any) -> nn.Module | None:
    """The module whose product with a hidden state scores the vocabulary; None without one."""
    head = inner.get_output_embeddings()
    return head if isinstance(head, nn.Linear) else None


def probe_tokens(inner: Any) -> Tensor:
    """`[2, 16]` ordinary ids: the rows share their first half and differ in the second.

    Shorter where the model allows only fewer.
    """
    config = inner.config.get_text_config()
    known = [getattr(config, name, None) for name in LENGTHS]
    time = min([TIME, *(one for one in known if isinstance(one, int) and one >= 2)])
    special: set[int] = set()
    for value in (*inner.config.to_dict().items(), *config.to_dict().items()):
        if value[0].endswith(("token_id", "token_index", "token_ids")):
            special |= {
                one
                for one in (value[1] if isinstance(value[1], list) else [value[1]])
                if isinstance(one, int)
            }
    size = int(inner.get_input_embeddings().weight.shape[0])
    ordinary = [token for token in range(max(0, size // 3), size) if token not in special]
    ordinary = ordinary[:: max(1, len(ordinary) // (3 * TIME))] or [0]
    places = range(time)
    first = [ordinary[place % len(ordinary)] for place in places]
    second = first[: time // 2] + [ordinary[(place + time) % len(ordinary)] for place in places[time // 2 :]]
    return torch.tensor([first, second])


def inspect_head(inner: Any) -> Head:
    """Run a model of `transformers` on two short rows of ids and say what its head is.

    Raises whatever the model raises where it cannot read text alone, `TypeError` where it gives no logits.
    """
    training, weight = inner.training, next(iter(inner.parameters()))
    inner.eval()
    try:
        with torch.no_grad():
            names = accepted(inner)
            inputs: dict[str, Any] = {"input_ids": probe_tokens(inner).to(weight.device)}
            if "use_cache" in names:
                inputs["use_cache"] = False
            module = output_head(inner)
            found = None if module is None else _linear(inner, module, inputs)
            return found or _own(inner, inputs)
    finally:
        inner.train(training)


def _linear(inner: Any, module: nn.Module, inputs: dict[str, Any]) -> Head | None:
    """The head where it is linear up to a soft cap, else None.

    None also where it is not called once with all positions.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    time = int(inputs["input_ids"].shape[1])
    raw = _numbers((ROWS, time, weight.shape[0])).to(weight.device)
    seen: list[Tensor] = []
    with hooked(module, seen, raw):
        logits = read_logits(inner, inputs)
    shape = (ROWS, time, weight.shape[1])
    if len(seen) != 1 or tuple(seen[0].shape) != shape or logits.shape != raw.shape:
        return None
    fitted = _fit(raw.double().cpu(), logits.double().cpu(), 8 * torch.finfo(logits.dtype).eps)
    if fitted is None:
        return None
    # What is used later must be what was seen now: the same states where the head computes one position only.
    again: list[Tensor] = []
    with hooked(module, again):
        read_logits(inner, inputs)
    if len(again) != 1 or again[0].shape != seen[0].shape:
        return None
    finite = bool(torch.isfinite(seen[0]).all())
    rounding = 16 * torch.finfo(seen[0].dtype).eps * float(seen[0].abs().max())
    if finite and not float((again[0] - seen[0]).abs().max()) <= rounding:
        return None
    return Head(
        linear=True,
        rows=int(weight.shape[0]),
        causal=_is_causal(inner, seen[0]),
        finite=finite,
        scale=fitted[0],
        cap=fitted[1],
    )


def _numbers(shape: tuple[int, int, int]) -> Tensor:
    """Stand-in for a head's output: both signs, 2^-10 to 2^14, half of them powers of two."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(-10, 14, shape, generator=generator)
    mantissas = 1.0 + torch.rand(shape, generator=generator)
    signs = torch.where(torch.rand(shape, generator=generator) < 0.5, 1.0, -1.0)
    return signs * torch.exp2(powers.float()) * torch.where(powers % 2 == 0, 1.0, mantissas)


def _fit(raw: Tensor, logits: Tensor, tolerance: float) -> tuple[float, float | None] | None:
    """`scale` and `cap` such that the logits are `scale * raw`, soft-capped; None where there are none."""
    tolerance = max(tolerance, 1e-5)

    def equal(expected: Tensor) -> bool:
        return bool(((logits - expected).abs() <= tolerance * expected.abs()).all())

    # Of a power of two the quotient is exact, and for a small one a cap is far away. Logits of a class that
    # rounds them give it in the mean.
    small = raw.abs() < 2**-6 if tolerance > 1e-5 else raw.abs() == raw.abs().min()
    scale = float((logits[small] / raw[small]).mean())
    if not 0 < abs(scale) < float("inf"):
        return None
    if equal(scale * raw):
        return scale, None
    cap = float(logits.abs().max())
    # The smallest is capped already by a little; the fit is checked on all of them.
    if 0 < cap < float("inf") and equal(cap * torch.tanh(scale * raw / cap)):
        return scale, cap
    return None


def _own(inner: Any, inputs: dict[str, Any]) -> Head:
    logits = read_logits(inner, inputs)
    shape = tuple(inputs["input_ids"].shape)
    if logits.dim() != 3 or tuple(logits.shape[:2]) != shape:
        raise TypeError(
            f"{type(inner).__name__} gives logits of shape {list(logits.shape)} for {list(shape)} ids"
        )
    return Head(
        linear=False,
        rows=int(logits.shape[-1]),
        causal=_is_causal(inner, logits),
        # A class may forbid ids by minus infinity.
        finite=not torch.isnan(logits).any(),
    )


def _is_causal(inner: Any, states: Tensor) -> bool:
    """Return whether rows `[2, time, width]` are equal where the tokens are: in their first half."""
    wide = torch.nan_to_num(states.double())
    difference = (wide[0] - wide[1]).abs()
    half = states.shape[1] // 2
    early, late = float(difference[:half].max()), float(difference[half:].max())
    if early == 0.0:
        return True
    # Classes that are encoders unless they are told otherwise get little allowance for rounding.
    encoder = getattr(inner.config.get_text_config(), "is_decoder", None) is False
    leak = LEAK[torch.float32] if encoder else LEAK.get(states.dtype, 3e-2)
    rounding = 0.0 if encoder and states.dtype.itemsize < 4 else 8 * torch.finfo(states.dtype).eps
    return early <= leak * late + rounding * float(wide.abs().max())
