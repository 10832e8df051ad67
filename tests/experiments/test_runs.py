"""Plans of the experiments, run by the command line as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from koine.cli.main import cli
from koine.files import read_json
from tests.plan.inline import run_steps_inline

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT.parent / "shared" / "data"
NAMES = ("bam", "merging", "nexus", "rope_to_nope", "universal_tokenizer")
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not PACK.exists(), reason="the development data pack is not beside the checkout"),
]


def koine_run(name: str, runs: Path, scale: str, *more: str, folder: Path = ROOT) -> str:
    """Run an experiment from `folder`; return its output."""
    plan = Path(os.path.relpath(ROOT / "experiments" / name / "plan.py", folder))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "koine", "run", f"{plan}:{name}"),
            *("--runs", str(runs), "--set", f"scale={scale}", "--set", f"pack={PACK}", *more),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def run_here(name: str, runs: Path, scale: str, *more: str) -> str:
    """Run an experiment in this process; return the output."""
    plan = ROOT / "experiments" / name / "plan.py"
    settings = ("--set", f"scale={scale}", "--set", f"pack={PACK}")
    done = CliRunner().invoke(
        cli, ["run", f"{plan}:{name}", "--runs", str(runs), *settings, *more], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", NAMES)
def test_dry_run(name: str, tmp_path: Path) -> None:
    assert "verdicts" in run_here(name, tmp_path, "laptop", "--dry-run")


# The runs write more than most disks have.
@pytest.mark.filterwarnings("ignore::koine.errors.KoineWarning")
@pytest.mark.parametrize("scale", ["gpu", "cluster"])
def test_dry_run_of_a_larger_scale(scale: str, tmp_path: Path) -> None:
    assert "verdicts" in run_here("merging", tmp_path, scale, "--dry-run")


def test_dry_run_from_another_folder(tmp_path: Path) -> None:
    assert "verdicts" in koine_run("bam", tmp_path, "smoke", "--dry-run", folder=tmp_path)


@pytest.mark.slow
def test_smoke_nexus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_steps_inline(monkeypatch)
    run_here("nexus", tmp_path, "smoke")
    results = read_json(tmp_path / "nexus" / "results.json")
    assert set(results["hypotheses"]) == {"NX1", "NX2", "NX3", "NX4"}
    shares = results["share_of_new_tokens_to_the_new_expert"]
    assert all(0.0 <= value <= 1.0 for values in shares.values() for value in values)
    assert (tmp_path / "nexus" / "report.html").exists()


# Its rows are as short as its windows.
@pytest.mark.filterwarnings("ignore::koine.errors.KoineWarning")
@pytest.mark.slow
def test_smoke_universal_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_steps_inline(monkeypatch)
    run_here("universal_tokenizer", tmp_path, "smoke")
    results = read_json(tmp_path / "universal_tokenizer" / "results.json")
    assert set(results["hypotheses"]) == {f"UT{number}" for number in range(1, 10)}
    for entry in results["hypotheses"].values():
        assert entry["verdict"] in ("reproduced", "not reproduced", "inconclusive")
    assert (tmp_path / "universal_tokenizer" / "report.html").exists()
