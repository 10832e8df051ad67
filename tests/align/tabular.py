"""A tabular policy: five answers to one prompt, and optimisation of it in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ANSWERS = 5


def random(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def reference() -> Tensor:
    """Log-probabilities of a reference policy, `[5]`."""
    return torch.log_softmax(random(ANSWERS, seed=0), dim=0)


def pairs_of(log_probabilities: Tensor) -> Tensor:
    """Log-probabilities of all pairs of different answers, `[20, 2]`."""
    first, second = ordered_pairs()
    return torch.stack((log_probabilities[first], log_probabilities[second]), dim=1)


def ordered_pairs() -> tuple[Tensor, Tensor]:
    """All ordered pairs of different answers."""
    grid = torch.cartesian_prod(torch.arange(ANSWERS), torch.arange(ANSWERS))
    grid = grid[grid[:, 0] != grid[:, 1]]
    return grid[:, 0], grid[:, 1]


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Return the point where `loss` is smallest, by L-BFGS from `start`."""
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [point], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(point)
        value.backward()
        return value

    optimiser.step(closure)
    return point.detach()
