"""The plan of the experiment on over-optimisation; it needs no data but the sample world."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from koine.cli.main import cli
from koine.files import read_json
from tests.plan.inline import run_steps_inline

PLAN = Path(__file__).resolve().parents[2] / "experiments" / "overoptimisation" / "plan.py"


def run_here(runs: Path, scale: str, *more: str) -> str:
    """Run the experiment in this process; return the output."""
    command = ["run", f"{PLAN}:overoptimisation", "--runs", str(runs), "--set", f"scale={scale}", *more]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


# The runs of the largest write more than most disks have.
@pytest.mark.filterwarnings("ignore::koine.errors.KoineWarning")
@pytest.mark.parametrize("scale", ["pilot", "laptop", "gpu"])
def test_dry_run(scale: str, tmp_path: Path) -> None:
    assert "verdicts" in run_here(tmp_path, scale, "--dry-run")


# Little text for a tokenizer, windows as long as the rows, and few records that are read often.
@pytest.mark.filterwarnings("ignore::koine.errors.KoineWarning")
@pytest.mark.slow
def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_steps_inline(monkeypatch)
    run_here(tmp_path, "smoke")
    run = tmp_path / "overoptimisation"
    results = read_json(run / "results.json")
    assert set(results["hypotheses"]) == {f"LO{number}" for number in range(1, 10)}
    # Three runs are too few for any verdict.
    assert {entry["verdict"] for entry in results["hypotheses"].values()} == {"inconclusive"}
    assert set(results["runs"]) == {"dpo/0.01/0/0", "dpo/0.01/0.1/0", "slic/0.01/0/0"}
    for rows in results["runs"].values():
        # Every run begins at the same model.
        assert [row["step"] for row in rows] == [0, 2, 4, 6]
        assert rows[0] == results["runs"]["dpo/0.01/0/0"][0]
        assert rows[-1]["chosen"] != rows[0]["chosen"]
        assert all(0.0 < row["p_win"] < 1.0 and 0.0 <= row["gold"] <= 6.0 for row in rows)
        assert rows[0]["l2"] == 0.0 < rows[-1]["l2"]
        assert abs(rows[0]["kl"]) < 1e-6 < rows[-1]["kl"]
    assert not list((run / "run").rglob("*.safetensors"))
    assert (run / "report.html").exists()
