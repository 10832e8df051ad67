"""Search the weights of a merge: a coarse grid over the simplex, then finer steps around the best.

The evaluation is any function from weights to scores of which lower is better. No merge needs to be written:
see `InMemoryMerge`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koine.combine.merging.config import MergeConfig
from koine.combine.merging.methods import find_method
from koine.combine.merging.plan import plan_merge
from koine.errors import UserError
from koine.model import LanguageModel, load_causal_lm
from koine.model.causal_lm import load_as_stored

Evaluate = Callable[[tuple[float, ...]], Mapping[str, float]]


@dataclass(frozen=True)
class Trial:
    """Weights and their scores; lower is better."""

    weights: tuple[float, ...]
    scores: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Return the mean of all scores."""
        return sum(self.scores.values()) / len(self.scores)


def simplex_grid(count: int, parts: int) -> Iterator[tuple[float, ...]]:
    """Yield all weights of `count` models that are multiples of `1 / parts` and sum to 1."""

    def split(left: int, places: int) -> Iterator[tuple[int, ...]]:
        if places == 1:
            yield (left,)
            return
        for first in range(left + 1):
            for rest in split(left - first, places - 1):
                yield (first, *rest)

    for numbers in split(parts, count):
        yield tuple(number / parts for number in numbers)


def search_weights(
    evaluate: Evaluate,
    count: int,
    *,
    parts: int = 4,
    rounds: int = 2,
    budget: int = 200,
    score: Callable[[Trial], float] = lambda trial: trial.mean,
) -> list[Trial]:
    """Search the weights of a merge; return every trial in the order in which it was made.

    Args:
        evaluate: From weights to scores, lower is better.
        count: The number of models.
        parts: The grid's step is `1 / parts`.
        rounds: After the grid, rounds of moving weight between two models around the best: by half the grid's
            step, a quarter, and so on.
        budget: Evaluations at most.
        score: What decides; default: the mean of the scores.

    Raises:
        UserError: The grid alone has more points than `budget`.
    """
    grid = list(simplex_grid(count, parts))
    if len(grid) > budget:
        raise UserError(
            f"the grid has {len(grid)} points and the budget is {budget}",
            hint="take fewer parts, or a larger budget",
        )
    trials: dict[tuple[float, ...], Trial] = {}

    def run(weights: tuple[float, ...]) -> None:
        key = tuple(round(weight, 6) for weight in weights)
        if key not in trials and len(trials) < budget:
            trials[key] = Trial(key, evaluate(key))

    for point in grid:
        run(point)
    step = 1.0 / parts
    for _ in range(rounds):
        step /= 2
        best = min(trials.values(), key=score)
        for gains in range(count):
            for loses in range(count):
                if gains != loses and best.weights[loses] >= step - 1e-9:
                    moved = list(best.weights)
                    moved[gains] += step
                    moved[loses] -= step
                    run(tuple(moved))
    return list(trials.values())


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the Pareto front: trials that no other equals in all scores and beats in one."""

    def beaten(one: Trial) -> bool:
        return any(
            all(other.scores[name] <= one.scores[name] for name in one.scores)
            and any(other.scores[name] < one.scores[name] for name in one.scores)
            for other in trials
        )

    return [trial for trial in trials if not beaten(trial)]


def leave_one_out(evaluate: Evaluate, weights: tuple[float, ...]) -> list[dict[str, float | None]]:
    """Compute for each model how much each score rises when it is left out (Command A, arXiv 2504.00698).

    The other models keep their proportions. Below 0, the model collides with the others. None where the model
    has all the weight, so that nothing is left.
    """
    with_all = evaluate(weights)
    found: list[dict[str, float | None]] = []
    for gone, weight in enumerate(weights):
        rest = 1.0 - weight / sum(weights)
        if rest < 1e-9:
            found.append(dict.fromkeys(with_all))
            continue
        others = tuple(
            0.0 if index == gone else one / (rest * sum(weights)) for index, one in enumerate(weights)
        )
        scores = evaluate(others)
        found.append({name: scores[name] - with_all[name] for name in with_all})
    return found


class InMemoryMerge:
    """A model that is set to one merge after another. All models' weights stay in memory, in their own dtype.

    SLERP's `t` is searched as the second model's weight.

    Args:
        paths: The models' folders.
        method, base, options, tokenizer, unrelated: As in `MergeConfig`.

    Raises:
        UserError: The method has nothing to search, a tensor holds NaN or infinity, or the models do not fit
            together (see `plan_merge`).
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        method: str = "linear",
        base: Path | None = None,
        options: Mapping[str, Any] | None = None,
        tokenizer: str = "",
        unrelated: bool = False,
    ) -> None:
        self.method = find_method(method)
        if not self.method.takes("weights") and "t" not in self.method.parameters:
            raise UserError(
                f"{method} has no weights to search",
                hint="take linear, slerp, task-arithmetic, ties or a dare method",
            )
        self.options = dict(options or {})
        equal = (1.0 / len(paths),) * len(paths)
        plan = plan_merge(
            MergeConfig(
                method=method,
                models=tuple(paths),
                base=base,
                weights=equal if self.method.takes("weights") else (),
                options=self.options if self.method.takes("weights") else {**self.options, "t": 0.5},
                tokenizer=tokenizer,
                unrelated=unrelated,
            )
        )
        plan.close()
        if plan.vocabularies_differ:
            raise UserError(
                "the models' vocabularies differ",
                hint="a search needs one: move the models to one tokenizer with `koine tokenizer adapt`",
            )
        inputs = [*paths, *([] if base is None else [base])]
        # As they are saved: a method that works on a whole tensor must not see several fused into one.
        self.states = [load_as_stored(path).stored_tensors() for path in inputs]
        for path, state in zip(inputs, self.states, strict=True):
            for name, tensor in state.items():
                if not torch.isfinite(tensor).all():
                    raise UserError(
                        f"{name} holds NaN or infinity",
                        where=path,
                        hint="this checkpoint is broken; use an earlier one",
                    )
        self.with_base = base is not None
        self.model: LanguageModel = load_causal_lm(paths[0], dtype=torch.float32)

    @torch.no_grad()
    def set(self, weights: tuple[float, ...]) -> LanguageModel:
        """Set the model to the merge of these weights, in float32, and return it."""
        # All weights have one seed, so that DARE methods are compared on the same mask.
        searched: dict[str, Any] = {"weights": weights} if self.method.takes("weights") else {"t": weights[1]}
        arguments = self.options | searched
        merged: dict[str, Tensor] = {}
        for name, first in self.states[0].items():
            if not first.is_floating_point():
                merged[name] = first
                continue
            tensors = [state[name].float() for state in self.states]
            if self.with_base:
                arguments["base"] = tensors.pop()
            if self.method.takes("generator"):
                arguments["generator"] = torch.Generator().manual_seed(0)
            merged[name] = self.method.function(tensors, **arguments)
        self.model.load_stored_tensors(merged)
        return self.model
