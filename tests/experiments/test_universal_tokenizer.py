"""The experiment at its smallest, whole, and its statistics against numbers worked out by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.common.hypotheses import below, interval, together, within
from experiments.universal_tokenizer.judge import at_bytes, speed_entry

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "universal_tokenizer"
PACK = ROOT.parent / "shared" / "data"


def test_students_interval_by_hand() -> None:
    # mean 2, standard deviation 1, three seeds: 2 ± 4.302653 / sqrt(3)
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_verdicts() -> None:
    assert below([-0.10, -0.11, -0.12]) == "reproduced"
    assert below([0.10, 0.11, 0.12]) == "not reproduced"
    assert below([-0.10, 0.11, 0.02]) == "inconclusive"
    assert within([0.01, 0.012, 0.011], 0.05) == "reproduced"
    assert within([0.11, 0.112, 0.111], 0.05) == "not reproduced"
    assert within([0.01, 0.10, 0.02], 0.05) == "inconclusive"
    assert together(["reproduced", "inconclusive"]) == "inconclusive"
    assert together(["reproduced", "not reproduced", "inconclusive"]) == "not reproduced"


def test_values_at_equal_bytes_and_ratios() -> None:
    assert at_bytes(([0, 10, 20], [3.0, 2.0, 1.0]), budget=30.0, bytes_per_step=2.0) == pytest.approx(1.5)
    entry = speed_entry(
        [{"per_step": value, "per_byte": value / 2, "lower_bound": False} for value in (4.0, 5.0, 6.25)]
    )
    assert entry["measured"] == pytest.approx(5.0)
    assert entry["per_byte"]["measured"] == pytest.approx(2.5)
    assert entry["verdict"] == "reproduced"
    assert speed_entry([{"per_step": None, "per_byte": None}])["verdict"] == "not reproduced"


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not PACK.exists(), reason="the development data pack is not beside the checkout")
def test_smoke(tmp_path: Path) -> None:
    arguments = [
        *(sys.executable, "-m", "koine", "run", f"{FOLDER / 'plan.py'}:universal_tokenizer"),
        *("--runs", str(tmp_path), "--set", "scale=smoke", "--set", f"pack={PACK}"),
    ]
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "universal_tokenizer" / "results.json").read_text(encoding="utf-8"))
    assert set(results["hypotheses"]) == {f"UT{number}" for number in range(1, 10)}
    for entry in results["hypotheses"].values():
        assert entry["verdict"] in ("reproduced", "not reproduced", "inconclusive")
    assert (tmp_path / "universal_tokenizer" / "report.html").exists()


def test_the_manual_has_the_table_of_the_committed_results() -> None:
    from experiments.universal_tokenizer.plots import table

    page = (ROOT / "docs" / "explanation" / "universal-tokenizer.md").read_text(encoding="utf-8")
    assert table(json.loads((FOLDER / "results" / "laptop.json").read_text(encoding="utf-8"))) in page


def test_the_committed_results_are_what_the_statistics_make_of_them() -> None:
    """Each committed verdict on a difference follows from the seeds beside it."""
    for path in FOLDER.glob("results/*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        for name in ("UT3", "UT4"):
            entry = results["hypotheses"][name]
            assert entry["verdict"] == below(entry["by_seed"]), (path.name, name)
            # The quantile was a table's, of three decimals: 1e-4 of the half width.
            half = (entry["interval"][1] - entry["interval"][0]) / 2
            assert entry["interval"] == pytest.approx(interval(entry["by_seed"]), abs=1e-4 * half)
        assert len(results["seeds"]) >= 3
        assert len(results["primary_seeds"]) >= 5


def test_the_manual_states_what_follows_from_the_committed_results() -> None:
    from experiments.universal_tokenizer.derived import forgetting, statements

    results = json.loads((FOLDER / "results" / "laptop.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "explanation" / "universal-tokenizer.md").read_text(encoding="utf-8")
    assert forgetting(results) in page
    for name, text in statements(results).items():
        assert text in page, name


def test_gaps_shares_and_counts_by_hand() -> None:
    from experiments.universal_tokenizer.derived import better_languages, chats_gap, text_of_a_step

    runs = {
        "chats/universal/0": {"-1": {"th": 3.0}, "10": {"th": 2.0}},
        "chats/cluster/0": {"-1": {"th": 8.0}, "10": {"th": 2.5}},
        "continued/universal/0": {"10": {"en": 1.0, "th": 2.0}},
        "continued/data-mass/0": {"10": {"en": 1.2, "th": 2.0}},
        "continued/uniform/0": {"10": {"en": 1.1, "th": 2.5}},
    }
    results = {
        "runs": runs,
        "seeds": [0],
        "languages": {"primary": ["en"], "expanded": ["th"], "chats": ["th"]},
        "training_bytes_per_token": {"universal": 4.0, "cluster": 1.0},
        "bytes_per_token": {"universal": {"en": 2.0}, "cluster": {"en": 3.0}},
    }
    assert chats_gap(results, first=True) == [-5.0]
    assert chats_gap(results, first=False) == [-0.5]
    assert better_languages(results) == {"uniform": 2, "data": 1}
    # 0.8 x 4 + 0.2 x 2 over 0.8 x 1 + 0.2 x 3
    assert text_of_a_step(results) == pytest.approx({"expanded": 4.0, "all": 3.6 / 1.4})
