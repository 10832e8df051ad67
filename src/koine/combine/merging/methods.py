"""Merge methods: functions of the tensors that have one name in all models.

To add one, write a function here with the decorator `merge_method`; what it may take is described in
`koine.combine.merging.method_registry`. The command line, `koine.combine.merge` and the model card follow
from its signature.

Rules for a method:

- Maths are float32 (float64 stays), whatever the models' dtype. The result has the dtype of the first tensor.
- A method that is not elementwise may be given tensors that lie on the disk
  (`koine.combine.merging.stored_tensor.StoredTensor`). It walks through them with `_blocks` and `_by_blocks`,
  or slices them flattened (`reshape(-1)`).

In formulas, `W_0` is the base, `W_k` model k and `c_k` its weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from koine.combine.merging.method_registry import METHODS as METHODS
from koine.combine.merging.method_registry import MergeMethod as MergeMethod
from koine.combine.merging.method_registry import Option, merge_method
from koine.errors import UserError, did_you_mean

if TYPE_CHECKING:
    # The command line reads its options from these functions: its help must not wait for torch.
    import torch
    from torch import Generator, Tensor

COLLINEAR = 0.9995
"""SLERP interpolates linearly from this cosine on: the sine that it would divide by is nearly 0."""

BLOCK = 2**19
"""Entries that are worked on at once: few enough to stay in a core's caches (docs/explanation/log.md)."""

Share = Annotated[float, Option("Share of the way from the first model to the second.", low=0.0, high=1.0)]
Density = Annotated[float, Option("Share of each difference's entries that is kept.", above=0.0, high=1.0)]
Scale = Annotated[float, Option("Factor on the merged difference (lambda).")]
Normalize = Annotated[
    bool, Option("Divide by the sum of the weights (of the models that take part in an entry).")
]


@merge_method(source="Wortsman et al., Model soups, 2022 (arXiv 2203.05482)", elementwise=True)
def linear(tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: Normalize = True) -> Tensor:
    """Average the models by their weights (model soups).

    The result is `sum_k c_k W_k / sum_k c_k`. Without `normalize` the sum is not divided.
    """
    total = sum(weights) if normalize else 1.0
    return _downcast(_sum(tensors, [weight / total for weight in weights]), tensors)


@merge_method(
    source="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",
    elementwise=False,
    models=(2, 2),
)
def slerp(tensors: Sequence[Tensor], *, t: Share) -> Tensor:
    """Interpolate two models along the arc between them (spherical linear interpolation).

    The result is `sin((1 - t) a) / sin(a) W_1 + sin(t a) / sin(a) W_2`, where `a` is the angle between
    the tensors, each taken as one vector. Norms are not interpolated apart. Nearly collinear tensors
    are interpolated linearly.
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


@merge_method(
    source="Ilharco et al., Editing models with task arithmetic, 2022 (arXiv 2212.04089)", elementwise=True
)
def task_arithmetic(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    *,
    scale: Scale = 1.0,
    normalize: Normalize = False,
) -> Tensor:
    """Add the models' differences to the base, by their weights.

    The result is `W_0 + scale sum_k c_k (W_k - W_0)`.
    """
    return _add(base, _sum(_deltas(tensors, base), weights), scale / sum(weights) if normalize else scale)


@merge_method(source="Yadav et al., TIES-Merging, 2023 (arXiv 2306.01708)", elementwise=False)
def ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    *,
    density: Density = 0.2,
    scale: Scale = 1.0,
    normalize: Normalize = True,
) -> Tensor:
    """Trim the differences, elect a sign for each entry, and add up what agrees with it (TIES).

    Each model's difference to the base keeps its `density` largest entries. Of these take part the ones that
    have the sign of their weighted sum. With `normalize` an entry is divided by the weights of the models
    that take part in it.
    """
    thresholds = [trim_threshold(tensor, base, density) for tensor in tensors]

    def merged(base_block: Tensor, *blocks: Tensor) -> Tensor:
        kept = [
            delta.mul_(delta.abs() >= threshold)
            for delta, threshold in zip(_deltas(blocks, base_block), thresholds, strict=True)
        ]
        return _add(base_block, _agreeing(kept, weights, normalize=normalize), scale)

    return _by_blocks(merged, base, *tensors)


@merge_method(source="Yu et al., Language models are super Mario, 2023 (arXiv 2311.03099)", elementwise=True)
def dare_linear(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    *,
    density: Density = 0.2,
    scale: Scale = 1.0,
    normalize: Normalize = False,
    generator: Generator,
) -> Tensor:
    """Drop entries of the differences at random, rescale the others, and add them up (DARE).

    An entry is kept with probability `density`, and then divided by it.
    """
    kept = _dropped(_deltas(tensors, base), density, generator)
    return _add(base, _sum(kept, weights), scale / sum(weights) if normalize else scale)


@merge_method(
    source="Yu et al., Language models are super Mario, 2023 (arXiv 2311.03099); "
    "Yadav et al., TIES-Merging, 2023 (arXiv 2306.01708)",
    elementwise=True,
)
def dare_ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    *,
    density: Density = 0.2,
    scale: Scale = 1.0,
    normalize: Normalize = False,
    generator: Generator,
) -> Tensor:
    """Drop and rescale as `dare-linear`, then add up the entries with the sign of their weighted sum."""
    kept = _dropped(_deltas(tensors, base), density, generator)
    return _add(base, _agreeing(kept, weights, normalize=normalize), scale)


@merge_method(source="Jang et al., Model Stock, 2024 (arXiv 2403.19522)", elementwise=False, models=(2, None))
def model_stock(tensors: Sequence[Tensor], base: Tensor) -> Tensor:
    """Move the average of the models towards the base, by the angle between their differences.

    The result is `t mean_k(W_k) + (1 - t) W_0` with `t = N cos a / (1 + (N - 1) cos a)` for N models, where
    `a` is the mean angle between their differences to the base (arXiv 2403.19522, equation 3).
    """
    count = len(tensors)
    cosines = [
        _cosine_of_deltas(tensors[one], tensors[other], base) for one in range(count) for other in range(one)
    ]
    cosine = sum(cosines) / len(cosines)
    below = 1.0 + (count - 1) * cosine
    # Differences that cancel out give no estimate: the base stays.
    share = count * cosine / below if abs(below) > 1e-6 else 0.0

    def merged(base_block: Tensor, *blocks: Tensor) -> Tensor:
        average = _sum(blocks, [share / count] * count)
        return _downcast(average.add_(_upcast(base_block), alpha=1.0 - share), blocks)

    return _by_blocks(merged, base, *tensors)


def find_method(name: str) -> MergeMethod:
    """Return a merge method; raise `UserError` with the nearest names for one that does not exist."""
    if name not in METHODS:
        raise UserError(f"unknown method '{name}'", hint=did_you_mean(name, METHODS))
    return METHODS[name]


def trim_threshold(tensor: Tensor, base: Tensor, density: float) -> float:
    """Return the magnitude of the k-th largest entry of `tensor - base`, k = `density` of all (at least 1).

    Entries as large as it are all kept; a sort would keep some of them by chance.

    It is selected a block at a time, without a sort: a sample brackets it, entries above the bracket are
    counted, and only those inside are ordered.
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
    """Count the entries of `|tensor - base|` above `high`; return that and those from `low` to `high`."""
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
    """Return the dtype in which maths on a tensor are done: float32, or a wider one of its own."""
    import torch

    return torch.promote_types(tensor.dtype, torch.float32)


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(_upcast_dtype(tensor))


def _downcast(result: Tensor, like: Sequence[Tensor]) -> Tensor:
    return result.to(like[0].dtype)


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum, in at least float32."""
    total = tensors[0].to(_upcast_dtype(tensors[0]), copy=True).mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _deltas(tensors: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    """Return the differences to the base, in at least float32."""
    origin = _upcast(base)
    return [_upcast(tensor) - origin for tensor in tensors]


def _add(base: Tensor, change: Tensor, scale: float) -> Tensor:
    return _downcast(change.mul_(scale).add_(_upcast(base)), (base,))


def _dropped(deltas: list[Tensor], density: float, generator: torch.Generator) -> list[Tensor]:
    """Set entries to 0 with probability `1 - density` and rescale the others, in place."""
    for delta in deltas:
        keep = delta.new_empty(delta.shape).uniform_(generator=generator) < density
        delta.mul_(keep).div_(density)
    return deltas


def _agreeing(deltas: list[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Return the weighted sum of the entries that have the sign of the weighted sum of all.

    A sum of 0 counts as positive.
    """
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


def _blocks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield the same `BLOCK` entries of every tensor, flattened, until the end."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        yield [part[start : start + BLOCK] for part in flat]


def _by_blocks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply an elementwise `function` to tensors of one shape, block by block, so that little is float32."""
    out = tensors[0].new_empty(tensors[0].shape)
    flat, start = out.view(-1), 0
    for blocks in _blocks(*tensors):
        flat[start : start + blocks[0].numel()] = function(*blocks)
        start += blocks[0].numel()
    return out


def _products(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """Return the dot products of two tensors as vectors: with each other, and of each with itself."""
    dot = one = two = 0.0
    for blocks in _blocks(first, second):
        a, b = (_upcast(block) for block in blocks)
        dot += float(a.dot(b))
        one += float(a.dot(a))
        two += float(b.dot(b))
    return dot, one, two


def _cosine_of_deltas(first: Tensor, second: Tensor, base: Tensor) -> float:
    """Return the cosine of two models' differences to the base."""
    dot = squares = other = 0.0
    for a, b, origin in _blocks(first, second, base):
        one, two = _deltas((a, b), origin)
        dot += float(one.dot(two))
        squares += float(one.dot(one))
        other += float(two.dot(two))
    return max(-1.0, min(1.0, dot / max(1e-30, math.sqrt(squares * other))))
