"""Plans of the experiments, run by the command line as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from koine.files import read_json

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT.parent / "shared" / "data"
NAMES = ("bam", "merging", "nexus", "rope_to_nope", "universal_tokenizer")
WITHOUT_PACK = ("overoptimisation",)
"""Experiments on the sample world alone."""
Test = Callable[..., None]


def needs_pack(test: Test) -> Test:
    """Mark a test that reads the development data pack."""
    reason = "the development data pack is not beside the checkout"
    skipped: Test = pytest.mark.skipif(not PACK.exists(), reason=reason)(test)
    marked: Test = pytest.mark.shared(skipped)
    return marked


def koine_run(name: str, runs: Path, scale: str, *more: str, folder: Path = ROOT) -> str:
    """Run an experiment from `folder`; return its output."""
    plan = Path(os.path.relpath(ROOT / "experiments" / name / "plan.py", folder))
    pack = [] if name in WITHOUT_PACK else ["--set", f"pack={PACK}"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "koine", "run", f"{plan}:{name}"),
            *("--runs", str(runs), "--set", f"scale={scale}", *pack, *more),
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


@needs_pack
@pytest.mark.parametrize("name", NAMES)
def test_dry_run(name: str, tmp_path: Path) -> None:
    assert "verdicts" in koine_run(name, tmp_path, "laptop", "--dry-run")


@needs_pack
@pytest.mark.parametrize("scale", ["gpu", "cluster"])
def test_dry_run_of_a_larger_scale(scale: str, tmp_path: Path) -> None:
    assert "verdicts" in koine_run("merging", tmp_path, scale, "--dry-run")


@needs_pack
def test_dry_run_from_another_folder(tmp_path: Path) -> None:
    assert "verdicts" in koine_run("bam", tmp_path, "smoke", "--dry-run", folder=tmp_path)


@needs_pack
@pytest.mark.slow
def test_smoke_nexus(tmp_path: Path) -> None:
    koine_run("nexus", tmp_path, "smoke", folder=tmp_path)
    results = read_json(tmp_path / "nexus" / "results.json")
    assert set(results["hypotheses"]) == {"NX1", "NX2", "NX3", "NX4"}
    shares = results["share_of_new_tokens_to_the_new_expert"]
    assert all(0.0 <= value <= 1.0 for values in shares.values() for value in values)
    assert (tmp_path / "nexus" / "report.html").exists()


@needs_pack
@pytest.mark.slow
def test_smoke_universal_tokenizer(tmp_path: Path) -> None:
    koine_run("universal_tokenizer", tmp_path, "smoke")
    results = read_json(tmp_path / "universal_tokenizer" / "results.json")
    assert set(results["hypotheses"]) == {f"UT{number}" for number in range(1, 10)}
    for entry in results["hypotheses"].values():
        assert entry["verdict"] in ("reproduced", "not reproduced", "inconclusive")
    assert (tmp_path / "universal_tokenizer" / "report.html").exists()


@pytest.mark.parametrize("scale", ["pilot", "laptop", "gpu"])
def test_dry_run_of_overoptimisation(scale: str, tmp_path: Path) -> None:
    assert "verdicts" in koine_run("overoptimisation", tmp_path, scale, "--dry-run")


@pytest.mark.slow
def test_smoke_overoptimisation(tmp_path: Path) -> None:
    koine_run("overoptimisation", tmp_path, "smoke", folder=tmp_path)
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
