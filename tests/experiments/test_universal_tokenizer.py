"""Universal tokenizer: statistics against numbers worked out by hand, and the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.common.hypotheses import below, interval
from experiments.universal_tokenizer.derived import (
    better_languages,
    chats_gap,
    forgetting,
    statements,
    text_of_a_step,
)
from experiments.universal_tokenizer.judge import Runs, Settings, at_bytes, speed_entry, verdicts
from experiments.universal_tokenizer.plots import table

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "universal_tokenizer"


def test_values_at_equal_bytes_and_ratios() -> None:
    assert at_bytes(([0, 10, 20], [3.0, 2.0, 1.0]), budget=30.0, bytes_per_step=2.0) == pytest.approx(1.5)
    entry = speed_entry(
        [{"per_step": value, "per_byte": value / 2, "lower_bound": False} for value in (4.0, 5.0, 6.25)]
    )
    assert entry["measured"] == pytest.approx(5.0)
    assert entry["per_byte"]["measured"] == pytest.approx(2.5)
    assert entry["verdict"] == "reproduced"
    assert speed_entry([{"per_step": None, "per_byte": None}])["verdict"] == "not reproduced"


def test_the_manual_has_the_table_of_the_committed_results() -> None:
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


@pytest.mark.parametrize("path", FOLDER.glob("results/*.json"), ids=lambda path: path.stem)
def test_the_committed_verdicts_follow_from_the_committed_runs(path: Path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    languages = {name: tuple(codes) for name, codes in results["languages"].items()}
    settings = Settings(
        chat_languages=languages.pop("chats"),
        sweep=tuple(map(int, results["hypotheses"]["UT9"]["measured"])),
        seeds=len(results["seeds"]),
        primary_seeds=len(results["primary_seeds"]),
        **languages,
    )
    runs = {
        name: {int(step): values for step, values in tracked.items()}
        for name, tracked in results["runs"].items()
    }
    again = verdicts(Runs(runs), settings, results["training_bytes_per_token"])
    for name, entry in results["hypotheses"].items():
        assert entry["verdict"] == again[name]["verdict"], name
        assert entry.keys() == again[name].keys(), name
        if name not in ("UT5", "UT9"):
            assert entry["by_seed"] == pytest.approx(again[name]["by_seed"]), name


def test_the_manual_states_what_follows_from_the_committed_results() -> None:
    results = json.loads((FOLDER / "results" / "laptop.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "explanation" / "universal-tokenizer.md").read_text(encoding="utf-8")
    assert forgetting(results) in page
    for name, text in statements(results).items():
        assert text in page, name


def test_gaps_shares_and_counts_by_hand() -> None:
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
