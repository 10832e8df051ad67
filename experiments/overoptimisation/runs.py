"""Runs by loss, strength, weight of the NLL and seed, and the figures of their evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.overoptimisation.data import read_records

LOSSES = {"dpo": "beta", "ipo": "tau", "slic": "alpha"}
"""Losses and the name of their strength. SLiC is the paper's Hinge."""
START, P_WIN, LIKELIHOOD = 0, "p_win", "chosen"
KEPT = (
    "step", "p_win", "gold", "fact", "language", "form", "brevity", "chosen", "rejected", "margin",
    "accuracy", "kl", "entropy", "entropy_raw", "mass", "ead", "length", "repetition", "cut_off", "f1", "l2",
)  # fmt: skip
"""Figures of an evaluation that are in `results.json`."""
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, order=True)
class Run:
    """One training."""

    loss: str
    strength: float
    nll: float
    seed: int

    @property
    def configuration(self) -> str:
        """Name of loss, strength and NLL."""
        return f"{self.loss}/{self.strength:g}/{self.nll:g}"

    @property
    def key(self) -> str:
        """Name of the run."""
        return f"{self.configuration}/{self.seed}"

    @property
    def specification(self) -> str:
        """The loss as `koine.align.loss_spec` reads it; a smaller strength regularises less."""
        alone = f"{self.loss}:{LOSSES[self.loss]}={self.strength:g}"
        return f"{alone}+nll:weight={self.nll:g}" if self.nll else alone

    @classmethod
    def parse(cls, key: str) -> Run:
        """Return the run of a name."""
        loss, strength, nll, seed = key.split("/")
        return cls(loss=loss, strength=float(strength), nll=float(nll), seed=int(seed))


Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Runs:
    """The evaluations of all runs; the first of each is that of its seed before any step."""

    rows: Mapping[Run, Rows]

    @classmethod
    def read(cls, folders: Mapping[str, Path]) -> Runs:
        """Read the outputs of `preference_run`."""
        found = {}
        for key, folder in folders.items():
            lines = read_records(folder / "figures.jsonl")
            found[Run.parse(key)] = [{name: round(line[name], 6) for name in KEPT} for line in lines]
        return cls(found)

    @classmethod
    def from_json(cls, runs: Mapping[str, Any]) -> Runs:
        """Return the runs of `to_json`."""
        return cls({Run.parse(key): rows for key, rows in runs.items()})

    def to_json(self) -> dict[str, Any]:
        """Return the rows by the name of the run."""
        return {run.key: list(rows) for run, rows in sorted(self.rows.items())}

    def select(self, *, losses: Sequence[str] | None = None, nll: bool | None = None) -> Runs:
        """Return the runs of some losses, with or without NLL."""
        return Runs(
            {
                run: rows
                for run, rows in sorted(self.rows.items())
                if (losses is None or run.loss in losses) and (nll is None or (run.nll > 0) == nll)
            }
        )

    def strongest(self, count: int) -> Runs:
        """Return the runs of the `count` smallest strengths of each loss: they regularise least."""
        wanted = {
            (loss, strength)
            for loss in {run.loss for run in self.rows}
            for strength in sorted({run.strength for run in self.rows if run.loss == loss})[:count]
        }
        return Runs({run: rows for run, rows in self.rows.items() if (run.loss, run.strength) in wanted})

    def __len__(self) -> int:
        return len(self.rows)

    def final(self, name: str) -> Array:
        """Return a figure after the last step of each run."""
        return np.array([rows[-1][name] for rows in self.rows.values()])

    def change(self, name: str) -> Array:
        """Return a figure after the last step, less that of the same seed before the first."""
        return np.array([rows[-1][name] - rows[0][name] for rows in self.rows.values()])

    def courses(self, name: str) -> Array:
        """Return a figure at each evaluation, `[runs, evaluations]`."""
        return np.array([[row[name] for row in rows] for rows in self.rows.values()])

    def steps(self) -> Array:
        """Return the steps of the evaluations, the same in all runs."""
        [steps] = {tuple(row["step"] for row in rows) for rows in self.rows.values()}
        return np.array(steps, dtype=np.float64)
