"""The verdicts of nexus and merging on made-up measures both ways; the plans of all three experiments, and the smallest run of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.merging import judge as merging_judge
from experiments.nexus import judge as nexus_judge
from koine.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT.parent / "shared" / "data"


Bits = dict[str, dict[str, float]]


def written(tmp_path: Path, bits: Bits) -> dict[str, Path]:
    """Three seeds of each arm, a little apart."""
    folders = {}
    for number, (arm, by_text) in enumerate(bits.items()):
        for seed in range(3):
            folders[f"{arm}/{seed}"] = folder = tmp_path / arm / str(seed)
            folder.mkdir(parents=True)
            shifted = {
                text: value * (1 + 0.01 * seed) + 1e-4 * ((seed * 2 + number) % 3)
                for text, value in by_text.items()
            }
            write_json(
                folder / "evaluation.json",
                {"bits_per_byte": shifted, "routing": {"code": {"chosen": {"code": 0.5}}}},
            )
    return folders


NEXUS: Bits = {
    "seed": {"general": 2.0, "code": 3.0},
    "average": {"general": 2.2, "code": 3.2},
    "nexus": {"general": 1.80, "code": 3.0},
    "linear": {"general": 1.85, "code": 3.0},
    "nexus-low": {"general": 1.80, "code": 3.0},
    "linear-low": {"general": 1.95, "code": 3.0},
    "nexus-20": {"general": 1.9, "code": 2.0},
    "linear-20": {"general": 1.9, "code": 2.3},
}


def test_nexus_verdicts(tmp_path: Path) -> None:
    found = nexus_judge.verdicts(nexus_judge.Runs(written(tmp_path / "a", NEXUS), 3), (20,))
    assert {one["verdict"] for one in found.values()} == {"reproduced"}
    reverse: Bits = NEXUS | {
        "nexus": NEXUS["linear"], "linear": NEXUS["nexus"], "nexus-20": NEXUS["linear-20"], "linear-20": NEXUS["nexus-20"],
        "linear-low": NEXUS["nexus-low"], "average": NEXUS["seed"] | {"general": 1.5},
    }  # fmt: skip
    found = nexus_judge.verdicts(nexus_judge.Runs(written(tmp_path / "b", reverse), 3), (20,))
    assert [found[name]["verdict"] for name in ("NX1", "NX2", "NX4")] == ["not reproduced"] * 3
    assert found["NX3"]["verdict"] != "reproduced"


def merging_bits(*, linear: float, complex_: float, touched: float, small: float, large: float) -> Bits:
    """Two domains and two languages; own experts at 1.0, clusters apart at 2.0, merged by so much better."""
    domains = ("code", "maths")
    bits: Bits = {f"expert-{domain}": dict.fromkeys(domains, 1.0) for domain in domains}
    bits |= {arm: dict.fromkeys(domains, linear) for arm in ("linear", "linear-pair")}
    bits |= {
        arm: dict.fromkeys(domains, complex_)
        for arm in ("task-arithmetic", "ties", "dare-ties", "model-stock", "slerp-pair")
    }
    bits["touched-up"] = dict.fromkeys(domains, touched)
    for size, gain in (("small", small), ("large", large)):
        bits[f"{size}-west"] = bits[f"{size}-east"] = {"en": 2.0, "pl": 2.0, "it": 2.0}
        bits[f"{size}-clusters"] = dict.fromkeys(("en", "pl", "it"), 2.0 - gain)
        bits[f"{size}-languages"] = dict.fromkeys(("en", "pl", "it"), 2.1)
    return bits


def judged(folder: Path, bits: Bits) -> dict[str, str]:
    runs = merging_judge.Runs(written(folder, bits), 3)
    clusters = {"west": ("it",), "east": ("pl",)}
    found = merging_judge.verdicts(runs, ("code", "maths"), clusters, ("en",), ("small", "large"))
    return {name: one["verdict"] for name, one in found.items()}


def test_merging_verdicts(tmp_path: Path) -> None:
    good = merging_bits(linear=1.01, complex_=1.02, touched=0.98, small=0.1, large=0.3)
    assert set(judged(tmp_path / "a", good).values()) == {"reproduced"}
    bad = merging_bits(linear=1.5, complex_=1.2, touched=1.3, small=0.3, large=0.1)
    assert set(judged(tmp_path / "b", bad).values()) == {"not reproduced"}


@pytest.mark.shared
@pytest.mark.skipif(not PACK.exists(), reason="the development data pack is not beside the checkout")
@pytest.mark.parametrize("name", ["bam", "merging"])
def test_the_plan_can_be_made_at_every_scale(name: str, tmp_path: Path) -> None:
    for scale in ("laptop", "cluster"):
        done = koine_run(name, tmp_path, f"scale={scale}", "--dry-run")
        assert "verdicts" in done


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not PACK.exists(), reason="the development data pack is not beside the checkout")
def test_smoke(tmp_path: Path) -> None:
    koine_run("nexus", tmp_path, "scale=smoke")
    results = read_json(tmp_path / "nexus" / "results.json")
    assert set(results["hypotheses"]) == {"NX1", "NX2", "NX3", "NX4"}
    shares = results["share_of_new_tokens_to_the_new_expert"]
    assert all(0.0 <= value <= 1.0 for values in shares.values() for value in values)
    assert (tmp_path / "nexus" / "report.html").exists()


def koine_run(name: str, runs: Path, setting: str, *more: str) -> str:
    """Run an experiment as a user does; its output."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "koine", "run", f"{ROOT / 'experiments' / name / 'plan.py'}:{name}"),
            *("--runs", str(runs), "--set", setting, "--set", f"pack={PACK}", *more),
        ],
        capture_output=True, text=True, timeout=500, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr
