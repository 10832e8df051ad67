"""BAM: verdicts on made-up measures, and training for equal compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.bam import judge as bam_judge
from experiments.bam import matched
from experiments.common.domains import DomainRuns
from koine.files import read_json
from koine.model.counting import training_flops_per_token
from koine.model.formats.config_json import read_config
from koine.steps.text_mixture import TextMixture, domain_sources
from koine.steps.training import training_settings
from tests.combine.models import write_branches

AS_IN_THE_PAPER = {
    "btx": 10.72,
    "bam": 9.70,
    "bam-shared": 10.32,
    "bam-flops": 10.00,
    "bam-shared-flops": 10.46,
    "bam-seconds": 10.00,
    "bam-shared-seconds": 10.46,
    "shared-top-2": 10.72,
    "shared-top-1": 10.81,
    "btx-6": 11.0,
    "btx-6-top-3": 9.9,
}


def runs(means: dict[str, float]) -> DomainRuns:
    """Three seeds of each arm, a little apart."""
    evaluations = {
        f"{arm}/{seed}": {"mean": mean + 0.1 * seed + 0.001 * ((3 * seed + len(arm)) % 5)}
        for arm, mean in means.items()
        for seed in range(3)
    }
    return DomainRuns(evaluations, range(3))


def test_the_papers_numbers_are_reproduced() -> None:
    seconds = {"btx": [4.81] * 3, "bam-shared": [5.96] * 3, "bam": [6.17] * 3}
    found = bam_judge.verdicts(runs(AS_IN_THE_PAPER), seconds)
    assert {name: one["verdict"] for name, one in found.items()} == dict.fromkeys(
        ("BM1", "BM2", "BM3", "BM4"), "reproduced"
    )


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        ({"bam-shared-flops": 10.9}, "BM1"),
        ({"shared-top-1": 10.1}, "BM2"),
        ({"shared-top-2": 10.5}, "BM2"),
        ({"btx-6": 10.5}, "BM3"),
        ({"btx-6-top-3": 9.5}, "BM3"),
    ],
)
def test_the_reverse_is_not_reproduced(change: dict[str, float], fails: str) -> None:
    seconds = {"btx": [5.0] * 3, "bam-shared": [4.0] * 3, "bam": [6.0] * 3}
    found = bam_judge.verdicts(runs(AS_IN_THE_PAPER | change), seconds)
    assert found[fails]["verdict"] == "not reproduced"
    assert found["BM4"]["verdict"] == "not reproduced"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A BTX and a BAM of one seed, and tokens."""
    from koine.combine import upcycle_bam, upcycle_btx
    from koine.steps.domain_corpora import domain_text, tokenize_domain

    root = tmp_path_factory.mktemp("bam")
    seed, branches = write_branches(root, ("code",))
    lines = [
        json.dumps({"id": str(n), "text": f"{n} plus 1 is more. " * 9, "language": "en"}) for n in range(90)
    ]
    (root / "text.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("corpus", "tokens"):
        (root / name).mkdir()
    domain_text(
        root / "text.jsonl",
        domain="maths",
        fields=(),
        max_bytes=20_000,
        heldout_bytes=500,
        max_bad_share=0.0,
        seed=0,
        out=root / "corpus",
    )
    tokenize_domain(root / "corpus", seed, domain="maths", out=root / "tokens")
    upcycle_btx(seed, branches, root / "btx")
    upcycle_bam(seed, branches, root / "bam")
    return {"btx": root / "btx", "bam": root / "bam", "tokens": root / "tokens"}


@pytest.mark.parametrize("match", ["flops", "seconds"])
def test_training_takes_as_much_compute(world: dict[str, Path], tmp_path: Path, match: str) -> None:
    (tmp_path / "out").mkdir()
    mixture = TextMixture(sources=domain_sources({"maths": 1.0}), steps=20, sequence_length=32, batch_size=2)
    matched.train_matched(
        world["bam"],
        world["btx"],
        {"maths": world["tokens"]},
        match=match,
        mixture=mixture,
        settings=training_settings(steps=20, learning_rate=1e-3, micro_batch_size=2, dtype="bfloat16"),
        out=tmp_path / "out",
    )
    about = read_json(tmp_path / "out" / "matched.json")
    steps = sum(
        "loss" in json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    )
    assert steps == about["steps"] == round(20 * about["ratio"])
    if match == "flops":
        ratio = training_flops_per_token(read_config(world["btx"]), 32) / training_flops_per_token(
            read_config(world["bam"]), 32
        )
        assert about["ratio"] == pytest.approx(ratio)
        assert ratio < 1.0


def test_latency_has_an_entry_a_mixture(world: dict[str, Path], tmp_path: Path) -> None:
    matched.latency(
        {name: world[name] for name in ("btx", "bam")}, prompt=16, new=2, rounds=2, threads=1, out=tmp_path
    )
    found = read_json(tmp_path / "latency.json")
    assert set(found) == {"btx", "bam"}
    assert all(value > 0 for value in found.values())
