"""Probability that the judge finds an effect, on made-up runs: the figures of EXPECTED.md.

python -m experiments.overoptimisation.power
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from experiments.common.figures import markdown_table
from experiments.common.hypotheses import below
from experiments.overoptimisation import statistics as st
from experiments.overoptimisation.judge import EQUIVALENCE, LENGTH_MARGIN, NLL_MARGIN, inside, sign_of
from experiments.overoptimisation.statistics import Array

TRIALS, DRAWS = 200, 300
NOISE = 0.03
"""Spread of P_win around its curve, as in the pilot's design."""
Draw = Callable[[np.random.Generator], str]


def found(draw: Draw) -> float:
    """Return the share of made-up experiments with the verdict "reproduced"."""
    return float(np.mean([draw(np.random.default_rng(trial)) == "reproduced" for trial in range(TRIALS)]))


def inverted_u(bend: float, runs: int = 54) -> Draw:
    """LO1: P_win bends down by `bend` a squared standard deviation of the likelihood."""

    def draw(generator: np.random.Generator) -> str:
        x = generator.normal(size=runs)
        y = 0.03 * x - bend * x**2 + NOISE * generator.normal(size=runs)
        gain = st.bootstrap(lambda index: st.quadratic_gain(x, y, index), runs, draws=DRAWS)
        curve = st.bootstrap(lambda index: st.curvature(x, y, index), runs, draws=DRAWS)
        return "reproduced" if {sign_of(gain, 1), sign_of(curve, -1)} == {"reproduced"} else "inconclusive"

    return draw


def correlated(generator: np.random.Generator, rho: float, runs: int) -> tuple[Array, Array]:
    """Return two variables with a correlation."""
    x, noise = generator.normal(size=(2, runs))
    return x, rho * x + np.sqrt(1 - rho**2) * noise


def rank(rho: float, runs: int = 54) -> Draw:
    """LO5, LO6."""

    def draw(generator: np.random.Generator) -> str:
        x, y = correlated(generator, rho, runs)
        return sign_of(
            st.bootstrap(lambda index: st.rank_correlation(x[index], y[index]), runs, draws=DRAWS), 1
        )

    return draw


def no_correlation(rho: float, runs: int = 81) -> Draw:
    """LO3."""

    def draw(generator: np.random.Generator) -> str:
        x, y = correlated(generator, rho, runs)
        one = st.bootstrap(
            lambda index: st.correlation(x[index], y[index]), runs, draws=DRAWS, confidence=EQUIVALENCE
        )
        return inside(one, LENGTH_MARGIN)

    return draw


def no_effect(effect: float, runs: int = 36) -> Draw:
    """LO4: the likelihood rises with the NLL (correlation 0.5) and P_win bends with the likelihood."""

    def draw(generator: np.random.Generator) -> str:
        level = np.tile(np.linspace(0, 1, 4), runs // 4)
        x = level + 0.65 * generator.normal(size=runs)
        y = effect * level - 0.03 * (x - x.mean()) ** 2 + 0.015 * generator.normal(size=runs)
        one = st.bootstrap(
            lambda index: st.effect_at_given(x, level, y, index), runs, draws=DRAWS, confidence=EQUIVALENCE
        )
        return inside(one, NLL_MARGIN)

    return draw


def thirds(difference: float, runs: int = 36) -> Draw:
    """LO2: the third with the largest margins is lower than the middle third."""

    def draw(generator: np.random.Generator) -> str:
        x = np.arange(runs, dtype=np.float64)
        y = np.where(x >= 2 * runs // 3, -difference, 0.0) + NOISE * generator.normal(size=runs)

        def largest_less_middle(index: st.Index) -> float:
            order = index[np.argsort(x[index], kind="stable")]
            third = len(order) // 3
            return float(y[order[-third:]].mean() - y[order[third:-third]].mean())

        return sign_of(st.bootstrap(largest_less_middle, runs, draws=DRAWS), -1)

    return draw


def turns(spread: float, runs: int = 24) -> Draw:
    """LO7: peaks of entropy anywhere in the training, P_win's peak within a normal spread of it, on the grid."""

    def draw(generator: np.random.Generator) -> str:
        turn = generator.uniform(0.1, 0.9, size=runs)
        peak = np.clip(turn + spread * generator.normal(size=runs), 0.1, 0.9)
        on_grid = [np.round(12 * one) / 12 for one in (turn, peak)]
        return "reproduced" if st.shuffled_share(*on_grid) <= 0.05 else "inconclusive"

    return draw


def slope(mean: float, runs: int = 6) -> Draw:
    """LO8: the mean change of the mass, in spreads of the runs."""
    return lambda generator: below((generator.normal(size=runs) - mean).tolist())


def main() -> None:
    """Print the table."""
    cases: list[tuple[str, str, Draw]] = [
        *(("LO1", f"curvature {bend}", inverted_u(bend)) for bend in (0.0, 0.01, 0.02, 0.03)),
        *(("LO2", f"{gap} less", thirds(gap)) for gap in (0.0, 0.03, 0.04)),
        *(("LO3", f"correlation {rho}", no_correlation(rho)) for rho in (0.0, 0.1, 0.3)),
        *(("LO4", f"effect {effect}", no_effect(effect)) for effect in (0.0, 0.02)),
        *(("LO5, LO6", f"correlation {rho}", rank(rho)) for rho in (0.0, 0.37, 0.45)),
        *(("LO7", f"gap's spread {spread} of the training", turns(spread)) for spread in (9.0, 0.25, 0.15)),
        *(("LO8", f"{mean} spreads of the runs", slope(mean)) for mean in (0.0, 1.0, 1.5)),
    ]
    rows = [[name, case, f"{found(draw):.2f}"] for name, case, draw in cases]
    print(markdown_table(["", "true effect", "probability of *reproduced*"], rows))


if __name__ == "__main__":
    main()
