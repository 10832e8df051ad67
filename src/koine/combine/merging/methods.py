"""Ways to merge checkpoints, each one a function of the tensors that have one name in all models.

A method takes `tensors` (one a model, of equal shape), and of these parameters those that it has: `weights` (one a model), `base` (the common ancestor's tensor) and numbers of its own,
which become options of `koine merge`. A method that is not elementwise walks through its tensors by `_blocks` and `_by_blocks`, or slices them as one line of numbers
(`reshape(-1)`): what it is given may be on the disk (`koine.combine.safetensors_stream.StoredTensor`). The maths are float32 (float64 stays) whatever the models' dtype; the result has the dtype of the first. To add a method, write a
function and name it in `METHODS`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # The command reads its options off these functions: its help must not wait for torch.
    import torch
    from torch import Tensor

COLLINEAR = 0.9995
"""Cosine from which on SLERP interpolates on a line: the sine that it would divide by is nearly 0."""

BLOCK = 2**19
"""Entries that are worked on at once: few enough to stay in a core's caches (docs/explanation/log.md)."""


def linear(tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    """`sum_k c_k W_k / sum_k c_k`: the weighted average, model soups (arXiv 2203.05482); with `normalize` off, not divided."""
    total = sum(weights) if normalize else 1.0
    return _downcast(_sum(tensors, [weight / total for weight in weights]), tensors)


def slerp(tensors: Sequence[Tensor], *, t: float) -> Tensor:
    """Of two models, the point at share `t` of the arc between them (spherical linear interpolation); on a line where they are nearly collinear.

    The angle is that of the whole tensor as one vector, norms are not kept apart: `sin((1 - t) a) / sin(a) W_0 + sin(t a) / sin(a) W_1`.
    """
    first, second = tensors
    product, one, two = _products(first, second)
    dot = product / max(1e-30, math.sqrt(one * two))
    if abs(dot) > COLLINEAR:
        parts = (1.0 - t, t)
    else:
        angle = math.acos(dot)
        parts = (math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    return _by_blocks(lambda a, b: _downcast(_sum((a, b), parts), (a,)), first, second)


def task_arithmetic(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    *,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """`W_0 + scale sum_k c_k (W_k - W_0)` (arXiv 2212.04089)."""
    return _add(base, _sum(_deltas(tensors, base), weights), scale / sum(weights) if normalize else scale)


def ties(
    tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor, *, density: float = 0.2, scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Trim, elect sign, merge (arXiv 2306.01708): of each difference to the base keep the `density` largest entries, and of those the ones whose sign
    is that of their weighted sum.

    normalize: divide by the weights of the models that take part in an entry.
    """
    least = [smallest_kept(tensor, base, density) for tensor in tensors]

    def merged(block_of_base: Tensor, *blocks: Tensor) -> Tensor:
        kept = [
            delta.mul_(delta.abs() >= limit)
            for delta, limit in zip(_deltas(blocks, block_of_base), least, strict=True)
        ]
        return _add(block_of_base, _agreeing(kept, weights, normalize=normalize), scale)

    return _by_blocks(merged, base, *tensors)


def dare_linear(
    tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor, *, density: float = 0.2, scale: float = 1.0,
    normalize: bool = False, generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Drop and rescale (arXiv 2311.03099): entries of each difference are kept with probability `density`, divided by it, and added up."""
    kept = _dropped(_deltas(tensors, base), density, generator)
    return _add(base, _sum(kept, weights), scale / sum(weights) if normalize else scale)


def dare_ties(
    tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor, *, density: float = 0.2, scale: float = 1.0,
    normalize: bool = False, generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """As `dare_linear`, and of what is left only the entries that agree in sign with their weighted sum take part."""
    kept = _dropped(_deltas(tensors, base), density, generator)
    return _add(base, _agreeing(kept, weights, normalize=normalize), scale)


def model_stock(tensors: Sequence[Tensor], base: Tensor) -> Tensor:
    """`t mean_k(W_k) + (1 - t) W_0` with `t = N cos a / (1 + (N - 1) cos a)`, where `a` is the mean angle between the differences to the base (arXiv
    2403.19522, equation 3)."""
    count = len(tensors)
    cosines = [
        _cosine_of_deltas(tensors[one], tensors[other], base) for one in range(count) for other in range(one)
    ]
    cosine = sum(cosines) / len(cosines)
    below = 1.0 + (count - 1) * cosine
    # Differences that cancel out have no estimate: the base stays.
    share = count * cosine / below if abs(below) > 1e-6 else 0.0

    def merged(block_of_base: Tensor, *blocks: Tensor) -> Tensor:
        average = _sum(blocks, [share / count] * count)
        return _downcast(average.add_(_upcast(block_of_base), alpha=1.0 - share), blocks)

    return _by_blocks(merged, base, *tensors)


Method = Callable[..., "Tensor"]


@dataclass(frozen=True)
class MergeMethod:
    """A method as `koine merge` offers it.

    elementwise: an entry of the result depends on the same entry of the inputs alone, so that a tensor may be worked on in pieces.
    models: the least and the most that it takes. source: for the model card.
    """

    function: Method
    elementwise: bool
    models: tuple[int, int | None]
    source: str

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The method's own numbers and switches, by name."""
        known = {"tensors", "weights", "base", "generator"}
        signature = inspect.signature(self.function).parameters
        return {name: parameter for name, parameter in signature.items() if name not in known}

    def takes(self, name: str) -> bool:
        """Whether the function has a parameter `name`."""
        return name in inspect.signature(self.function).parameters


METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod(
        linear, True, (1, None), "Wortsman et al., Model soups, 2022 (arXiv 2203.05482)"
    ),
    "slerp": MergeMethod(slerp, False, (2, 2), "Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985"),
    "task-arithmetic": MergeMethod(
        task_arithmetic, True, (1, None), "Ilharco et al., Editing models with task arithmetic, 2022 (arXiv 2212.04089)"
    ),
    "ties": MergeMethod(ties, False, (1, None), "Yadav et al., TIES-Merging, 2023 (arXiv 2306.01708)"),
    "dare-linear": MergeMethod(
        dare_linear, True, (1, None), "Yu et al., Language models are super Mario, 2023 (arXiv 2311.03099)"
    ),
    "dare-ties": MergeMethod(
        dare_ties, True, (1, None),
        "Yu et al., Language models are super Mario, 2023 (arXiv 2311.03099); Yadav et al., TIES-Merging, 2023 (arXiv 2306.01708)",
    ),
    "model-stock": MergeMethod(model_stock, False, (2, None), "Jang et al., Model Stock, 2024 (arXiv 2403.19522)"),
}  # fmt: skip


def smallest_kept(tensor: Tensor, base: Tensor, density: float) -> float:
    """The magnitude of the `k`-th largest entry of `tensor - base`, `k` the `density`'s share of all, at least one. Entries as large as it are kept
    too, where sorting would keep some of them by chance.

    Selected, not sorted, a block at a time: a sample brackets it, the entries above the bracket are counted, and only those inside are put in order.
    """
    total = tensor.numel()
    if density >= 1.0:
        return 0.0
    keep = max(1, int(density * total))
    # An odd stride, so that no column of a matrix is preferred.
    stride = max(1, total // 16_384) | 1
    [delta] = _deltas([tensor.reshape(-1)[::stride]], base.reshape(-1)[::stride])
    sample = delta.abs().sort(descending=True).values
    at, slack = keep / total * len(sample), 4.0 * len(sample) ** 0.5
    high = float(sample[int(at - slack)]) if at > slack else math.inf
    low = float(sample[int(at + slack)]) if at + slack < len(sample) else -1.0
    above, inside = _bracketed(tensor, base, low, high)
    if not above < keep <= above + len(inside):
        above, inside = _bracketed(tensor, base, -1.0, math.inf)
    return float(inside.kthvalue(len(inside) - (keep - above) + 1).values)


def _bracketed(tensor: Tensor, base: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many entries of `|tensor - base|` are above `high`, and those from `low` to `high`."""
    import torch

    above, inside = 0, []
    for mine, theirs in _blocks(tensor, base):
        [delta] = _deltas([mine], theirs)
        delta.abs_()
        larger = delta > high
        above += int(larger.sum())
        inside.append(delta[larger.logical_or_(delta < low).logical_not_()])
    return above, torch.cat(inside)


def _upcast_dtype(tensor: Tensor) -> torch.dtype:
    import torch

    return torch.promote_types(tensor.dtype, torch.float32)


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(_upcast_dtype(tensor))


def _downcast(result: Tensor, like: Sequence[Tensor]) -> Tensor:
    return result.to(like[0].dtype)


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum, wide."""
    total = tensors[0].to(_upcast_dtype(tensors[0]), copy=True).mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _deltas(tensors: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    wide = _upcast(base)
    return [_upcast(tensor) - wide for tensor in tensors]


def _add(base: Tensor, change: Tensor, scale: float) -> Tensor:
    return _downcast(change.mul_(scale).add_(_upcast(base)), (base,))


def _dropped(deltas: list[Tensor], density: float, generator: torch.Generator) -> list[Tensor]:
    for delta in deltas:
        keep = delta.new_empty(delta.shape).uniform_(generator=generator) < density
        delta.mul_(keep).div_(density)
    return deltas


def _agreeing(deltas: list[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """The weighted sum of the entries whose sign is that of the weighted sum of all; a sum of 0 counts as positive."""
    majority = _sum(deltas, weights) >= 0
    shape = deltas[0].shape
    total, taken = deltas[0].new_zeros(shape), deltas[0].new_zeros(shape)
    for delta, weight in zip(deltas, weights, strict=True):
        weighted = delta * weight
        agrees = ((weighted > 0) & majority) | ((weighted < 0) & ~majority)
        total.add_(delta * agrees, alpha=weight)
        if normalize:
            taken.add_(agrees, alpha=weight)
    if normalize:
        total.div_(taken.masked_fill_(taken.abs() < 1e-8, 1.0))
    return total


def _blocks(*tensors: Tensor) -> Any:
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        yield [part[start : start + BLOCK] for part in flat]


def _by_blocks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """An elementwise `function` over tensors of one shape, a block at a time, so that little is wide at once."""
    out = tensors[0].new_empty(tensors[0].shape)
    flat, start = out.view(-1), 0
    for blocks in _blocks(*tensors):
        flat[start : start + blocks[0].numel()] = function(*blocks)
        start += blocks[0].numel()
    return out


def _products(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """The dot products of two tensors as vectors: of one with the other, and of each with itself."""
    dot = one = two = 0.0
    for blocks in _blocks(first, second):
        a, b = (_upcast(block) for block in blocks)
        dot += float(a.dot(b))
        one += float(a.dot(a))
        two += float(b.dot(b))
    return dot, one, two


def _cosine_of_deltas(first: Tensor, second: Tensor, base: Tensor) -> float:
    dot = squares = other = 0.0
    for a, b, origin in _blocks(first, second, base):
        one, two = _deltas((a, b), origin)
        dot += float(one.dot(two))
        squares += float(one.dot(one))
        other += float(two.dot(two))
    return max(-1.0, min(1.0, dot / max(1e-30, math.sqrt(squares * other))))
