"""Over-optimisation: statistics with known answers, verdicts on synthetic courses, data, and measures."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.overoptimisation import judge as judges
from experiments.overoptimisation import statistics as st
from experiments.overoptimisation.blocks import report_blocks
from experiments.overoptimisation.data import preference_data, read_records
from experiments.overoptimisation.measure import rewards, token_f1, win_probability
from experiments.overoptimisation.plan import LOG_SPACED, SCALES, planned_runs
from experiments.overoptimisation.runs import KEPT, LOSSES, Run, Runs
from koine.align.loss_spec import LossSpec
from koine.data.sample.gold import gold_reward
from koine.plan.report.blocks import check_block

EVERY = np.arange(40)


# --- statistics ---


def test_bootstrap_of_a_mean_is_students_interval() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    found = st.bootstrap(lambda index: float(values[index].mean()), 400, draws=4_000)
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_left_out_rmse_is_that_of_fits_without_the_run() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(2, 12))
    index = generator.integers(0, 12, 12)
    # numpy's polynomial fit of all the other draws, for each draw.
    kept = np.unique(index)
    z = (x - x[kept].mean()) / x[kept].std()
    errors = []
    for run in index:
        others = index[index != run]
        fit = np.polyfit(z[others], y[others], 2)
        errors.append((y[run] - np.polyval(fit, z[run])) ** 2)
    assert st.left_out_rmse(x, y, 2, index) == pytest.approx(np.sqrt(np.mean(errors)), rel=1e-5)


def test_a_parabola_is_found() -> None:
    x = np.linspace(-3, 1, 40)
    y = 0.5 - 0.2 * (x + 1.5) ** 2
    assert st.curvature(x, y, EVERY) == pytest.approx(-0.2 * x.std() ** 2)
    assert st.turning_point(x, y) == pytest.approx(1.5 / 4)
    assert st.quadratic_gain(x, y, EVERY) > 0.99
    assert st.quadratic_gain(x, 2 * x + np.random.default_rng(0).normal(size=40), EVERY) < 0.1


def test_rank_correlation() -> None:
    # Values of Spearman's correlation worked out by hand: 1 - 6 * sum d^2 / (n (n^2 - 1)).
    x, y = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2.0, 1.0, 4.0, 3.0, 9.0])
    assert st.rank_correlation(x, y) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert st.rank_correlation(x, np.exp(x)) == pytest.approx(1.0)
    assert st.ranks(np.array([3.0, 1.0, 3.0])).tolist() == [1.5, 0.0, 1.5]
    assert np.isnan(st.correlation(x, np.ones(5)))


def test_slopes_beside_a_break() -> None:
    x = np.linspace(-2, 3, 41)
    y = np.where(x < 1, -2 * (x - 1), 0.5 * (x - 1))
    assert st.side_slope(x, y, 1.0, -1, np.arange(41)) == pytest.approx(-2.0)
    assert st.side_slope(x, y, 1.0, 1, np.arange(41)) == pytest.approx(0.5)
    assert np.isnan(st.side_slope(x, y, 3.0, 1, np.arange(41)))
    # The vertex of a parabola; of a line, and near the ends, an inner place.
    assert st.break_of(x, (x - 1.25) ** 2) == pytest.approx(1.25)
    assert st.break_of(x, (x - 2.9) ** 2) == pytest.approx(np.quantile(x, 0.8))
    assert np.quantile(x, 0.2) <= st.break_of(x, x) <= np.quantile(x, 0.8)


def test_peaks_and_gaps() -> None:
    courses = np.array([[0.0, 1, 2, 3, 2, 1], [5.0, 4, 3, 2, 1, 0]])
    assert st.peaks(courses).tolist() == [3, 0]
    first = np.random.default_rng(2).uniform(size=30)
    near = first + 0.01
    assert st.gap_gain(first, near, EVERY[:30]) < -0.2
    assert st.shuffled_share(first, near) < 0.01
    assert st.shuffled_share(first, np.random.default_rng(3).uniform(size=30)) > 0.01


def test_slope_and_effect() -> None:
    assert st.slopes(np.array([[0.0, 1, 2], [2.0, 1, 0], [1.0, 1, 1]])).tolist() == [2.0, -2.0, 0.0]
    generator = np.random.default_rng(4)
    level = generator.uniform(size=40)
    x = level + generator.normal(size=40)
    y = 1 + x - x**2 + 0.3 * level
    assert st.effect_at_given(x, level, y, EVERY) == pytest.approx(0.3)


# --- verdicts on synthetic runs ---

EVALUATIONS = 13


def triangle(start: float, peak: float, end: float, at: int) -> np.ndarray[Any, Any]:
    """A course that rises to a peak and falls."""
    return np.interp(np.arange(EVALUATIONS), [0, at, EVALUATIONS - 1], [start, peak, end])


def synthetic(fault: str = "") -> Runs:
    """Runs as the paper describes them, or with one finding reversed."""
    generator = np.random.default_rng(5)
    found = {}
    for number, run in enumerate(one for seed in range(3) for one in planned_runs(SCALES["laptop"], seed)):
        drive = 1 - LOG_SPACED.index(run.strength) / 5
        weight = {0.0: 0.0, 0.01: 1 / 3, 0.1: 2 / 3, 1.0: 1.0}[run.nll]
        likelihood = -2 * drive + 1.2 * weight + 0.15 * generator.normal()
        noise = generator.normal(size=6)
        gain = 0.1 - 0.12 * (likelihood + 0.8) ** 2
        gain = 0.1 * likelihood if fault == "LO1" else gain
        gain = -0.15 * likelihood if fault == "LO2" else gain
        gain += 0.1 * weight if fault == "LO4" else 0.0
        gain += 0.01 * noise[0]
        at = 2 + number * 7 % 9
        entropy_at = 12 - at if fault == "LO7" else min(11, max(1, at + number % 2))
        p_win = triangle(0.5, 0.5 + max(gain, 0.0) + 0.08, 0.5 + gain, at)
        hinge, sign = run.loss == "slic", 1 if fault == "LO5" else -1
        ends = {
            "chosen": likelihood,
            "margin": 3 * drive + 0.1 * noise[1],
            "length": likelihood + 0.3 * noise[2] if fault == "LO3" else noise[2],
            "ead": sign * 0.2 * likelihood + 0.05 * noise[3],
            "f1": (-1 if fault == "LO6" else 1) * 0.2 * likelihood + 0.05 * noise[4],
            "l2": -likelihood if fault == "LO9" else abs(likelihood + 0.7),
            "mass": (0.1 if fault == "LO8" else -0.2) * drive + 0.02 * noise[5] if hinge else 0.0,
        }
        courses = {name: np.linspace(0.0, end, EVALUATIONS) for name, end in ends.items()}
        courses["entropy"] = (
            np.linspace(1.0, 1.5, EVALUATIONS) if hinge else triangle(1.0, 1.6, 1.0, entropy_at)
        )
        courses |= {"p_win": p_win, "gold": 6 * p_win, "kl": np.linspace(0, drive, EVALUATIONS)}
        rows = [
            {
                "step": 19 * index,
                **{name: float(courses.get(name, np.zeros(EVALUATIONS))[index]) for name in KEPT[1:]},
            }
            for index in range(EVALUATIONS)
        ]
        found[run] = rows
    return Runs(found)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(st, "DRAWS", 200)


def test_the_papers_findings_are_reproduced() -> None:
    runs = synthetic()
    assert len(runs) == 81
    found = judges.verdicts(runs)
    assert {name: one["verdict"] for name, one in found.items()} == {
        f"LO{number}": "reproduced" for number in range(1, 10)
    }
    assert Runs.from_json(json.loads(json.dumps(runs.to_json()))).rows == dict(sorted(runs.rows.items()))


@pytest.mark.parametrize("fault", ["LO1", "LO2", "LO3", "LO4", "LO5", "LO6", "LO8", "LO9"])
def test_the_reverse_is_not_reproduced(fault: str) -> None:
    runs, alone = synthetic(fault), synthetic(fault).select(nll=False)
    found = {
        "LO1": lambda: judges.likelihood_against_p_win(alone),
        "LO2": lambda: judges.margin_against_p_win(alone.select(losses=("dpo", "ipo"))),
        "LO3": lambda: judges.likelihood_against_length(runs),
        "LO4": lambda: judges.nll_at_given_likelihood(runs.select(losses=("dpo",)), runs),
        "LO5": lambda: judges.likelihood_against("ead", alone, -1, "", ""),
        "LO6": lambda: judges.likelihood_against("f1", alone, 1, "", ""),
        "LO8": lambda: judges.hinge_mass(alone.select(losses=("slic",))),
        "LO9": lambda: judges.likelihood_against_distance(runs),
    }[fault]()
    assert found["verdict"] == "not reproduced", found


def test_an_entropy_that_turns_elsewhere_is_no_sign() -> None:
    found = judges.entropy_turn(synthetic("LO7").select(losses=("dpo", "ipo"), nll=False))
    assert found["verdict"] in ("not reproduced", "inconclusive")
    assert found["series"]["share of shuffles with a smaller gap"]["by_seed"][0] > 0.2


def test_few_runs_are_inconclusive() -> None:
    runs = Runs(dict(list(synthetic().rows.items())[:5]))
    for entry in judges.verdicts(runs).values():
        assert entry["verdict"] == "inconclusive"
        assert entry["measured"] is None


def test_the_pilot_wants_the_strongest_to_lose() -> None:
    runs = synthetic()
    found = judges.pilot(runs)
    assert set(found["lost"]) == {
        f"{loss}/{strength}/0/{seed}" for loss, strength, seed in product(LOSSES, (0.01, 0.03), range(3))
    }
    assert found["enough"] == (min(found["lost"].values()) >= 0.05)
    assert found["enough"]
    flat = Runs({run: [dict(row, p_win=0.5) for row in rows] for run, rows in runs.rows.items()})
    assert not judges.pilot(flat)["enough"]


def test_the_stop_rule_is_measured_on_other_configurations() -> None:
    runs = synthetic().select(losses=("dpo",))
    found = judges.stop_rule(runs)
    assert found is not None
    assert found["chosen_on"] + found["measured_on"] == len(runs)
    # All of them fall by more than 0.05 after the peak, where their entropy turns.
    assert found["over_optimised"] == found["measured_on"]
    assert found["regret"] < 0.6 * found["regret_of_the_last"]
    assert judges.stop_rule(Runs(dict([next(iter(runs.rows.items()))]))) is None


def test_the_report_has_its_plots() -> None:
    runs = synthetic()
    rule = judges.stop_rule(runs.select(losses=("dpo",)))
    blocks = report_blocks(runs, judges.verdicts(Runs(dict(list(runs.rows.items())[:5]))), rule)
    for block in blocks:
        check_block(json.loads(json.dumps(block)), "report")
    titles = " ".join(str(block.get("title")) for block in blocks)
    for wanted in ("Likelihoods and margin", "Entropy", "Mass", "Gold reward against KL", "P_win against"):
        assert wanted in titles
    last = blocks[-1]["series"]
    assert [one["name"] for one in last] == ["DPO", "IPO", "Hinge", "line", "quadratic"]


# --- runs ---


def test_planned_runs() -> None:
    runs = planned_runs(SCALES["laptop"], 1)
    assert len(runs) == 27
    assert len({run.key for run in runs}) == 27
    for run in runs:
        assert Run.parse(run.key) == run
        # What the objective reads.
        spec = LossSpec.parse(run.specification)
        assert [term.name for term in spec.terms] == ([run.loss, "nll"] if run.nll else [run.loss])
    assert Run(loss="dpo", strength=0.01, nll=0.1, seed=0).specification == "dpo:beta=0.01+nll:weight=0.1"


def test_a_run_is_an_epoch_of_equal_spans() -> None:
    for scale in SCALES.values():
        epoch = scale.pairs * len(scale.languages) / scale.batch_size
        assert scale.steps % scale.evaluations == 0
        assert scale.steps <= max(epoch, scale.evaluations)
    assert SCALES["laptop"].evaluations == 12
    assert replace(SCALES["pilot"], seeds=(0, 1, 2)).seeds == SCALES["laptop"].seeds
    assert not set(SCALES["pilot"].seeds) & set(SCALES["laptop"].seeds)


# --- data and measures ---


def test_data_of_a_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        preference_data(
            languages=("en", "zh"),
            chats=40,
            pairs=30,
            heldout_pairs=8,
            prompts=10,
            memory=12,
            styles={"short": 0.5, "sentence": 0.5},
            weights={"short": 1.0, "wrong": 1.0, "sentence": 1.0},
            flipped=0.25,
            seed=seed,
            out=tmp_path / name,
        )
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jsonl"))
    assert all((tmp_path / "a" / one).read_bytes() == (tmp_path / "b" / one).read_bytes() for one in files)
    assert (tmp_path / "a" / "pairs" / "en.jsonl").read_bytes() != (
        tmp_path / "c" / "pairs" / "en.jsonl"
    ).read_bytes()

    def asked(name: str) -> set[str]:
        field = "messages" if name.startswith("chats") else "prompt"
        return {record[field][0]["content"] for record in read_records(tmp_path / "a" / name)}

    taught = (
        asked("chats/en.jsonl") | asked("chats/zh.jsonl") | asked("pairs/en.jsonl") | asked("pairs/zh.jsonl")
    )
    assert not (asked("prompts.jsonl") | asked("heldout.jsonl")) & taught
    assert not any(record["flipped"] for record in read_records(tmp_path / "a" / "heldout.jsonl"))
    memory = read_records(tmp_path / "a" / "memory.jsonl")
    assert len({(one["fact"], one["language"]) for one in memory}) == len(memory) == 24
    for prompt in read_records(tmp_path / "a" / "prompts.jsonl"):
        graded = {name: gold_reward(prompt, text).total for name, text in prompt["rivals"].items()}
        assert graded["strong"] == pytest.approx(6.0)
        assert graded["weak"] < 3.0


def test_win_probability() -> None:
    # Equal rewards win half; ln 3 more wins three in four.
    assert win_probability(4.0, [4.0]) == 0.5
    assert win_probability(4.0, [4.0, 4.0 - np.log(3)]) == pytest.approx((0.5 + 0.75) / 2)
    record = {"language": "en", "fact": "capital:JP", "competitors": [6.0, 2.0]}
    assert rewards()["p_win"]([], "Tokyo", record) == pytest.approx(
        (1 / (1 + np.e) + 1 / (1 + np.exp(-3))) / 2
    )
    assert rewards()["gold"]([], "Tokyo", record) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("answer", "text", "code", "expected"),
    [
        ("Tokyo", "tokyo", "en", 1.0),
        # One word of six: 2 / (1 + 6).
        ("Tokyo", "The capital of Japan is Tokyo.", "en", 2 / 7),
        ("Japanese Yen", "Yen", "en", 2 / 3),
        ("Tokyo", "Paris", "en", 0.0),
        ("Tokyo", "", "en", 0.0),
        # Characters: two of the answer, two more.
        ("东京", "首都东京", "zh", 2 * 2 / (2 + 4)),
        ("2月", "12月", "ja", 2 * 1 / (2 + 2)),
    ],
)
def test_f1_of_words(answer: str, text: str, code: str, expected: float) -> None:
    assert token_f1(answer, text, code) == pytest.approx(expected)
