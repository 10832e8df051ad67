"""Find out by experiment how a causal LM of `transformers` computes its logits, and whether it is causal.

| head | logits | computed for |
|---|---|---|
| linear | `scale * head(hidden)`, or `cap * tanh(scale * head(hidden) / cap)` (soft cap) | some positions |
| own | anything else, by the whole forward pass | all positions |

Fields of the configuration decide nothing. Numbers are put in place of the head's output, and the logits that
the class makes of them are compared with the two formulas. Then the logits of a few ids by the formula are
compared with those of the class's own forward pass.

Shape suffixes: b batch (2), t time, d hidden, v vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROBE_ROWS, PROBE_TIME = 2, 16
"""Shape of the probe's ids; fewer tokens where a model allows fewer."""
PROBE_SHARED = 11
"""Tokens that both rows begin with. A prime, so that no block of positions ends there."""
LENGTH_FIELDS = ("max_position_embeddings", "max_seq_len")
"""Fields of a configuration that hold the context length."""
LEAK = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest change of earlier positions, as a share of that of the changed ones.

Expert matmuls round differently with other rows.
"""


@dataclass(frozen=True)
class LMHead:
    """The output head of a model: from hidden states to logits.

    linear: `scale` and `cap` describe it; else only the model's own forward pass computes logits.
    vocab_size: count of ids that it scores.
    causal: whether later tokens leave earlier logits unchanged.
    finite: whether ordinary ids give neither NaN nor infinity.
    """

    linear: bool
    vocab_size: int
    causal: bool
    finite: bool = True
    scale: float = 1.0
    cap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """Compute logits from the output of the head's matrix."""
        if self.scale != 1.0:
            raw = raw * self.scale
        return raw if self.cap is None else torch.tanh(raw / self.cap) * self.cap


def forward_arguments(inner: Any) -> frozenset[str]:
    """Return the keyword arguments that a model's `forward` takes or passes on to its base model."""
    parameters = inspect.signature(inner.forward).parameters
    names = set(parameters)
    base = inner.base_model
    if base is not inner and any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        names |= set(inspect.signature(base.forward).parameters)
    return frozenset(names)


def forward_logits(inner: Any, inputs: dict[str, Any]) -> Tensor:
    """Compute the logits of the model's own forward pass. Raises `TypeError` where it gives none."""
    logits = getattr(inner(**inputs), "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{type(inner).__name__} gives no logits")
    return logits


@contextmanager
def head_hooks(head: nn.Module, inputs_seen: list[Tensor], output: Tensor | None = None) -> Iterator[None]:
    """Record the head's inputs.

    Args:
        head: the module of `linear_head`.
        inputs_seen: receives the input of each call.
        output: replaces the head's output. None: the head computes only the last position, to save time.
    """

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        inputs_seen.append(inputs[0])
        return None if output is not None else (inputs[0][:, -1:], *inputs[1:])

    def after(module: nn.Module, inputs: tuple[Any, ...], computed: Tensor) -> Tensor | None:
        return output

    handles = [head.register_forward_pre_hook(before)]
    if output is not None:
        handles.append(head.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear_head(inner: Any) -> nn.Module | None:
    """Return the linear layer that scores the vocabulary; None without one."""
    head = inner.get_output_embeddings()
    return head if isinstance(head, nn.Linear) else None


def probe_tokens(inner: Any) -> Tensor:
    """Return `[2, 16]` ordinary ids: equal in the first 11 columns, different in each of the others.

    Shorter where the model allows only fewer; then the last column differs.
    """
    config = inner.config.get_text_config()
    known = [getattr(config, name, None) for name in LENGTH_FIELDS]
    time = min([PROBE_TIME, *(one for one in known if isinstance(one, int) and one >= 2)])
    special: set[int] = set()
    for name, value in (*inner.config.to_dict().items(), *config.to_dict().items()):
        if name.endswith(("token_id", "token_index", "token_ids")):
            values = value if isinstance(value, list) else [value]
            special |= {one for one in values if isinstance(one, int)}
    size = int(inner.get_input_embeddings().weight.shape[0])
    ordinary = [token for token in range(max(0, size // 3), size) if token not in special]
    ordinary = ordinary[:: max(1, len(ordinary) // (3 * PROBE_TIME))]
    if len(ordinary) < 2:
        ordinary = list(range(size))
    count, shared = len(ordinary), shared_columns(time)
    first = [ordinary[place % count] for place in range(time)]
    second = [ordinary[(place + max(1, count // 2)) % count] for place in range(time)]
    return torch.tensor([first, first[:shared] + second[shared:]])


def shared_columns(time: int) -> int:
    """Return how many columns of `probe_tokens` are equal in both rows."""
    return PROBE_SHARED if time > PROBE_SHARED else time - 1


def inspect_head(inner: Any) -> LMHead:
    """Run a model of `transformers` on two short rows of ids and describe its head.

    Raises what the model raises where it cannot read text alone, `TypeError` where it gives no logits.
    """
    training, weight = inner.training, next(iter(inner.parameters()))
    inner.eval()
    try:
        with torch.no_grad():
            inputs: dict[str, Any] = {"input_ids": probe_tokens(inner).to(weight.device)}
            if "use_cache" in forward_arguments(inner):
                inputs["use_cache"] = False
            module = linear_head(inner)
            found = None if module is None else _inspect_linear(inner, module, inputs)
            return found or _inspect_own(inner, inputs)
    finally:
        inner.train(training)


def _inspect_linear(inner: Any, module: nn.Module, inputs: dict[str, Any]) -> LMHead | None:
    """Describe a head that is linear up to a soft cap.

    None for any other: one that a formula does not fit, that is not called once with all positions, or whose
    logits for the probe's ids are not those of the class.
    """
    weight_vd = module.weight
    assert isinstance(weight_vd, Tensor)
    vocab_size, hidden_size = weight_vd.shape
    time = int(inputs["input_ids"].shape[1])
    raw_btv = _stand_in((PROBE_ROWS, time, vocab_size)).to(weight_vd.device)
    seen: list[Tensor] = []
    with head_hooks(module, seen, raw_btv):
        logits_btv = forward_logits(inner, inputs)
    if len(seen) != 1 or tuple(seen[0].shape) != (PROBE_ROWS, time, hidden_size):
        return None
    if logits_btv.shape != raw_btv.shape:
        return None
    rounding = 8 * torch.finfo(logits_btv.dtype).eps
    fitted = _fit(raw_btv.double().cpu(), logits_btv.double().cpu(), rounding)
    if fitted is None:
        return None
    finite = bool(torch.isfinite(seen[0]).all())
    head = LMHead(
        linear=True,
        vocab_size=int(vocab_size),
        causal=_is_causal(inner, seen[0]),
        finite=finite,
        scale=fitted[0],
        cap=fitted[1],
    )
    return head if not finite or _gives_own_logits(inner, module, head, inputs) else None


def _gives_own_logits(inner: Any, module: nn.Module, head: LMHead, inputs: dict[str, Any]) -> bool:
    """Return whether the logits by the head's formula are those of the class's own forward pass.

    The hidden states are taken as later: while the head computes the last position only.
    """
    seen: list[Tensor] = []
    with head_hooks(module, seen):
        forward_logits(inner, inputs)
    own_btv = forward_logits(inner, inputs)
    if len(seen) != 1 or seen[0].shape[:-1] != own_btv.shape[:-1]:
        return False
    ours_btv = head.apply(module(seen[0]))
    if ours_btv.shape != own_btv.shape:
        return False
    eps = max(torch.finfo(ours_btv.dtype).eps, torch.finfo(own_btv.dtype).eps)
    allowed = max(16 * eps, 1e-5) * float(own_btv.abs().max())
    return float((ours_btv.double() - own_btv.double()).abs().max()) <= allowed


def _stand_in(shape: tuple[int, int, int]) -> Tensor:
    """Return numbers in place of a head's output: both signs, 2^-10 to 2^14, half of them powers of two."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(-10, 14, shape, generator=generator)
    mantissas = 1.0 + torch.rand(shape, generator=generator)
    signs = torch.where(torch.rand(shape, generator=generator) < 0.5, 1.0, -1.0)
    return signs * torch.exp2(powers.float()) * torch.where(powers % 2 == 0, 1.0, mantissas)


def _fit(raw: Tensor, logits: Tensor, tolerance: float) -> tuple[float, float | None] | None:
    """Return `scale` and `cap` such that the logits are `scale * raw`, soft-capped; None where none fit."""
    tolerance = max(tolerance, 1e-5)

    def equal(expected: Tensor) -> bool:
        return bool(((logits - expected).abs() <= tolerance * expected.abs()).all())

    # The quotient of a power of two is exact, and a small number is far below a cap. Logits of a class that
    # rounds them give the scale in the mean.
    small = raw.abs() < 2**-6 if tolerance > 1e-5 else raw.abs() == raw.abs().min()
    scale = float((logits[small] / raw[small]).mean())
    if not 0 < abs(scale) < float("inf"):
        return None
    if equal(scale * raw):
        return scale, None
    cap = float(logits.abs().max())
    # A cap changes even the smallest number a little; the fit is checked on all of them.
    if 0 < cap < float("inf") and equal(cap * torch.tanh(scale * raw / cap)):
        return scale, cap
    return None


def _inspect_own(inner: Any, inputs: dict[str, Any]) -> LMHead:
    """Describe a head that only the model's own forward pass computes."""
    logits_btv = forward_logits(inner, inputs)
    shape = tuple(inputs["input_ids"].shape)
    if logits_btv.dim() != 3 or tuple(logits_btv.shape[:2]) != shape:
        raise TypeError(
            f"{type(inner).__name__} gives logits of shape {list(logits_btv.shape)} for {list(shape)} ids"
        )
    return LMHead(
        linear=False,
        vocab_size=int(logits_btv.shape[-1]),
        causal=_is_causal(inner, logits_btv),
        # A class may forbid ids by minus infinity.
        finite=not torch.isnan(logits_btv).any(),
    )


def _is_causal(inner: Any, states_btd: Tensor) -> bool:
    """Return whether states or logits are equal in the columns where the tokens of both rows are."""
    upcast = torch.nan_to_num(states_btd.double())
    difference = (upcast[0] - upcast[1]).abs()
    shared = shared_columns(states_btd.shape[1])
    early, late = float(difference[:shared].max()), float(difference[shared:].max())
    if early == 0.0:
        return True
    # Classes that are encoders by default get a small tolerance for rounding.
    encoder = getattr(inner.config.get_text_config(), "is_decoder", None) is False
    leak = LEAK[torch.float32] if encoder else LEAK.get(states_btd.dtype, 3e-2)
    rounding = 0.0 if encoder and states_btd.dtype.itemsize < 4 else 8 * torch.finfo(states_btd.dtype).eps
    return early <= leak * late + rounding * float(upcast.abs().max())
