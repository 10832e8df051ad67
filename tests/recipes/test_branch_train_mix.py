"""The recipe on three tiny domains, with each method, and the parameters that it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from koine.data.inspect_step import documents_at_step
from koine.errors import UserError
from koine.files import read_json
from koine.model import read_config
from koine.plan import PlannedInput
from koine.plan.loading import make_plan
from koine.plan.run.scheduler import execute
from koine.recipes.branch_train_mix import branch_train_mix
from koine.steps import checks
from koine.steps.combination import METHODS, combine_branches
from tests.combine.models import write_branches
from tests.combine.moe.families import write_family
from tests.plan.inline import InlineExecutor

SENTENCES = {
    "code": "def f{0}(x): return x + {0}\n",
    "law": "The court held that section {0} of the act applies. ",
    "maths": "{0} plus 1 is more than {0}. ",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("domains")
    write_branches(root, ("code", "law"))
    for name, sentence in SENTENCES.items():
        lines = [
            json.dumps({"id": str(n), "text": sentence.format(n) * 5, "language": "en"}) for n in range(200)
        ]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def settings(world: Path, **more: Any) -> dict[str, Any]:
    return {
        "seed_model": world / "seed",
        "domains": tuple(f"{name}={world / name}.jsonl" for name in ("code", "law")),
        "branch_steps": 3,
        "mixture_steps": 3,
        "extension_steps": 2,
        "sequence_length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_bytes": 50_000,
        "heldout_bytes": 1_000,
        "domain_size": 8,
        **more,
    }


def test_from_a_seed_and_folders_to_a_model_with_one_domain_more(world: Path, tmp_path: Path) -> None:
    given = settings(world, new_domain=f"maths={world / 'maths.jsonl'}", general=world / "law.jsonl")
    plan = make_plan(branch_train_mix, given, name="btm", runs=tmp_path)
    assert plan.nodes["mixed"].parents[0] == "seed-given"
    execute(plan, executor=InlineExecutor())
    results = read_json(tmp_path / "btm" / "results.json")
    assert list(results) == [
        "seed", "expert-code", "expert-law", "mixed", "model", "expert-maths", "grown", "extended",
    ]  # fmt: skip
    assert set(results["seed"]["bits_per_byte"]) == {"code", "law", "maths", "general"}
    assert list(results["extended"]["routing"]["maths"]["chosen"]) == ["code", "law", "maths"]
    mixture = read_config(tmp_path / "btm" / "extended").mixture
    assert mixture is not None
    assert mixture.experts == ("code", "law", "maths")
    assert mixture.shared_expert
    record = read_json(tmp_path / "btm" / "extended" / "mixture.json")
    assert record["method"] == "nexus"
    assert record["changes"][0]["share"] == pytest.approx(1 / 3)
    # Fresh text: each training goes on where those of the models that it starts from stopped.
    seen = {
        name: documents_of_training(tmp_path / "btm" / name)
        for name in ("expert/code", "expert/law", "model", "expert/maths", "extended")
    }
    assert {source for source, _ in seen["model"]} == {"code", "law", "general"}
    for earlier, later in [
        ("expert/code", "model"), ("expert/law", "model"), ("model", "extended"), ("expert/maths", "extended"),
    ]:  # fmt: skip
        assert not seen[earlier] & seen[later], (earlier, later)


def documents_of_training(model: Path) -> set[tuple[str, str]]:
    """Sources and ids of all records that a model's own training saw, as `koine data at-step` tells them."""
    steps = read_json(model / "training.json")["steps"]
    return {
        (span["source"], span["record_id"])
        for step in range(steps)
        for span in documents_at_step(model, step)
    }


def test_an_average_passes_on_the_documents_already_drawn(world: Path, tmp_path: Path) -> None:
    """An average has no record of its own, and its training goes on after those of its branches too."""
    plan = make_plan(branch_train_mix, settings(world, method="average"), name="average", runs=tmp_path)
    execute(plan, executor=InlineExecutor())
    for name in ("code", "law"):
        branch = documents_of_training(tmp_path / "average" / f"expert/{name}")
        assert branch
        assert not branch & documents_of_training(tmp_path / "average" / "model")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_mixes(world: Path, tmp_path: Path, method: str) -> None:
    for name in ("code", "law"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.jsonl").write_text((world / f"{name}.jsonl").read_text())
    (tmp_path / "out").mkdir()
    combine_branches(
        world / "seed",
        {name: world / name for name in ("code", "law")},
        {name: tmp_path / name for name in ("code", "law")},
        method=method, top_k=1, attention_top_k=0, encoder="tfidf", domain_size=8, load_balancing=None, z_loss=None,
        seed=0, out=tmp_path / "out",
    )  # fmt: skip
    mixture = read_config(tmp_path / "out").mixture
    if method == "average":
        assert mixture is None
    else:
        assert mixture is not None
        assert mixture.experts == (("code", "law") if "nexus" in method else ("seed", "code", "law"))
        assert (mixture.domain_size == 8) == (method == "nexus")
        own = (0.05, 0.0) if "nexus" in method else (0.01, 0.001)
        assert (mixture.load_balancing, mixture.z_loss) == own


@pytest.mark.parametrize(("family", "method", "expected"), [
    ("llama", "btx", 1), ("gemma3_text", "btx", 2), ("gemma3_text", "bam", 2), ("gemma3_text", "nexus-linear", 1),
    ("olmo2", "btx", 2),
])  # fmt: skip
def test_without_a_number_a_single_gate_is_chosen_only_where_it_has_an_effect(
    family: str, method: str, expected: int, world: Path, tmp_path: Path
) -> None:
    """A norm after the feed-forward cancels a single gate, unless a shared expert is added before it."""
    plan = make_plan(branch_train_mix, settings(world, method=method), name="defaults", runs=tmp_path)
    given = plan.nodes["mixed"].parameters
    seed, experts = write_family(tmp_path, family, ("code", "law"))
    foreseen = checks.combined(
        PlannedInput(seed, exists=True),
        {name: PlannedInput(path, exists=True) for name, path in experts.items()},
        {},
        **given,
    )
    assert foreseen is not None
    assert foreseen.config is not None
    combine_branches(seed, experts, {}, **given, out=tmp_path / "out")
    for config in (foreseen.config, read_config(tmp_path / "out")):
        assert config.mixture is not None
        assert config.mixture.top_k == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "bams"}, "method is 'bams'; did you mean 'bam'"),
        ({"domains": ("code=x",)}, "1 domains are given"),
        ({"domains": ("code", "law=x")}, "'code' is not NAME=PATH"),
        ({"domains": ("code=x", "code=y")}, "two domains have the name 'code'"),
        ({"general_share": 1.0}, "general_share is 1.0"),
        ({"method": "average", "new_domain": "maths=x"}, "an average has no experts to add to"),
    ],
)
def test_wrong_parameters_are_refused(
    world: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(branch_train_mix, {**settings(world), **change}, runs=tmp_path)
