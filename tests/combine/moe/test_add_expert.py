"""Adding an expert: which weights are averaged, appended and left unchanged; and removing one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from koine.combine import add_expert, fit_encoder, remove_expert, upcycle_bam, upcycle_nexus
from koine.combine.merging.config import MergeConfig
from koine.combine.merging.runner import run_merge
from koine.combine.moe.domain_embeddings import domain_embedding, load_encoder
from koine.combine.moe.upcycle import new_routers
from koine.errors import UserError
from koine.model import load_model
from koine.model.adapt import move_model
from koine.model.formats.mixture_files import DOMAIN_ENCODER, RECORD
from koine.train import LanguageModelling, TrainSettings, train
from tests.combine.models import write_branches
from tests.combine.moe.test_upcycle import tensors
from tests.train.fakes import fake_order

TEXTS = {
    "code": [f"def f{n}(x): return x + {n}" for n in range(9)],
    "law": [f"the court held in section {n} that" for n in range(9)],
}
NEW = [f"eins plus {n} ist {n + 1}" for n in range(9)]
ATTENTION = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """Write a Nexus mixture of two experts to `tmp_path/nexus`; returns all branches."""
    seed, paths = write_branches(tmp_path, ("code", "law", "maths"))
    experts = {name: paths[name] for name in ("code", "law")}
    encoder = fit_encoder("tfidf", TEXTS, seed_model=seed, width=4)
    domains = torch.stack([domain_embedding(encoder, TEXTS[name]) for name in experts])
    upcycle_nexus(seed, experts, tmp_path / "nexus", domains=domains)
    (tmp_path / "nexus" / DOMAIN_ENCODER).mkdir()
    encoder.save(tmp_path / "nexus" / DOMAIN_ENCODER)
    return tmp_path / "nexus", paths


def test_a_nexus_router_needs_no_training(world: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    nexus, paths = world
    add_expert(nexus, paths["maths"], tmp_path / "more", name="maths", texts=NEW)
    before, after, dense = tensors(nexus), tensors(tmp_path / "more"), tensors(paths["maths"])
    # lambda = 1 / (n + 1): the average over three branches.
    assert torch.allclose(after[ATTENTION], before[ATTENTION] * 2 / 3 + dense[ATTENTION] / 3, atol=1e-6)
    all_three = torch.stack([tensors(paths[name])[ATTENTION] for name in ("code", "law", "maths")])
    assert torch.allclose(after[ATTENTION], all_three.mean(0), atol=1e-6)
    assert torch.equal(
        after["model.layers.1.mlp.experts.2.up_proj.weight"], dense["model.layers.1.mlp.up_proj.weight"]
    )
    for name in before:
        if "mlp.experts" in name or "shared_expert" in name or name.endswith(("router.into", "router.out")):
            assert torch.equal(after[name], before[name]), name
    router = load_model(tmp_path / "more").blocks[1].experts.router
    old = load_model(nexus).blocks[1].experts.router
    assert torch.allclose(router.expert_embeddings()[:2], old.expert_embeddings(), atol=1e-6)
    assert (router.expert_embeddings()[2] != 0).any()


def test_removing_an_added_expert_restores_the_mixture(
    world: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    nexus, paths = world
    add_expert(nexus, paths["maths"], tmp_path / "more", name="maths", texts=NEW)
    remove_expert(tmp_path / "more", "maths", tmp_path / "again", dense=paths["maths"])
    before, after = tensors(nexus), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.allclose(before[name], after[name], atol=1e-6), name
    # Without the dense model the averages stay.
    remove_expert(tmp_path / "more", "code", tmp_path / "fewer")
    fewer, more = tensors(tmp_path / "fewer"), tensors(tmp_path / "more")
    assert torch.equal(fewer[ATTENTION], more[ATTENTION])
    for number in (0, 1):
        name = "model.layers.0.mlp.experts.{}.down_proj.weight"
        assert torch.equal(fewer[name.format(number)], more[name.format(number + 1)])
    fewer = load_model(tmp_path / "fewer").config.mixture
    assert fewer is not None
    assert fewer.experts == ("law", "maths")


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_removing_takes_out_the_share_that_was_added(
    world: tuple[Path, dict[str, Path]], tmp_path: Path, share: float
) -> None:
    """Also if another expert was added and removed in between, or removed without its dense model."""
    nexus, paths = world
    remove_expert(nexus, "code", tmp_path / "one")
    add_expert(tmp_path / "one", paths["maths"], tmp_path / "two", name="maths", texts=NEW, share=share)
    add_expert(tmp_path / "two", paths["code"], tmp_path / "three", name="code", texts=NEW, share=0.3)
    remove_expert(tmp_path / "three", "maths", tmp_path / "four", dense=paths["maths"])
    remove_expert(tmp_path / "four", "code", tmp_path / "five", dense=paths["code"])
    before, after = tensors(tmp_path / "one"), tensors(tmp_path / "five")
    for name in before:
        assert torch.allclose(before[name], after[name], atol=1e-5), name


def test_another_dense_model_is_refused(world: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    nexus, paths = world
    with pytest.raises(UserError, match="is not the model that expert 'code' of .* was made of"):
        remove_expert(nexus, "code", tmp_path / "out", dense=paths["law"])
    add_expert(nexus, paths["maths"], tmp_path / "all", name="maths", texts=NEW, share=1.0)
    with pytest.raises(UserError, match="is all that its averages hold"):
        remove_expert(tmp_path / "all", "maths", tmp_path / "out", dense=paths["maths"])


def test_linear_routers_are_reset(tmp_path: Path) -> None:
    seed, paths = write_branches(tmp_path, ("code", "law", "maths"))
    upcycle_bam(seed, {name: paths[name] for name in ("code", "law")}, tmp_path / "bam")
    with pytest.raises(UserError, match="its router is linear"):
        add_expert(tmp_path / "bam", paths["maths"], tmp_path / "out", name="maths", texts=None)
    add_expert(
        tmp_path / "bam", paths["maths"], tmp_path / "out", name="maths", texts=None, reset_router=True
    )
    after, dense = tensors(tmp_path / "out"), tensors(paths["maths"])
    assert after["model.layers.0.mlp.router.weight"].shape[0] == 4
    layer = "model.layers.0.self_attn."
    assert torch.equal(after[f"{layer}experts.3.k_proj.weight"], dense[f"{layer}k_proj.weight"])
    inputs = torch.stack([tensors(path)["model.norm.weight"] for path in (seed, *paths.values())])
    assert torch.allclose(after["model.norm.weight"], inputs.mean(0), atol=1e-6)
    tokens = torch.randint(0, 200, (1, 9))
    assert torch.isfinite(load_model(tmp_path / "out")(tokens)).all()


def test_experts_that_cannot_be_added_or_removed_are_refused(
    world: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    nexus, paths = world
    out = tmp_path / "out"
    with pytest.raises(UserError, match="has an expert 'law' already"):
        add_expert(nexus, paths["law"], out, name="law", texts=NEW)
    with pytest.raises(UserError, match="no text is given"):
        add_expert(nexus, paths["maths"], out, name="maths", texts=None)
    with pytest.raises(UserError, match="share is 2.0"):
        add_expert(nexus, paths["maths"], out, name="maths", texts=NEW, share=2.0)
    with pytest.raises(UserError, match="is a dense model"):
        add_expert(paths["law"], paths["maths"], out, name="maths", texts=NEW)
    with pytest.raises(UserError, match="has no expert 'low'; did you mean 'law'"):
        remove_expert(nexus, "low", out)
    remove_expert(nexus, "law", out)
    with pytest.raises(UserError, match="has 1 experts"):
        remove_expert(out, "code", tmp_path / "none")
    (nexus / DOMAIN_ENCODER / "encoder.json").unlink()
    with pytest.raises(UserError, match="holds no domain_encoder"):
        add_expert(nexus, paths["maths"], tmp_path / "x", name="maths", texts=NEW)


def test_a_mixture_keeps_its_files(world: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    """A Nexus can be extended after training, merging or a change of tokenizer."""
    nexus, paths = world
    model = load_model(nexus)
    settings = TrainSettings(dtype="float32", threads=1)
    order = fake_order(tmp_path / "data", steps=(1,))
    train(model, LanguageModelling(), order, settings, out=tmp_path / "trained", tokenizer=nexus, init_from=nexus,
          progress=False, device="cpu")  # fmt: skip
    run_merge(
        MergeConfig(method="linear", models=(nexus, tmp_path / "trained"), weights=(0.5, 0.5)),
        tmp_path / "merged",
    )
    move_model(tmp_path / "merged", tmp_path / "tokenizer", tmp_path / "moved")
    for name in ("trained", "merged", "moved"):
        assert load_encoder(tmp_path / name).encode(NEW).shape == (9, 4)
        assert (tmp_path / name / RECORD).read_bytes() == (nexus / RECORD).read_bytes()
    add_expert(tmp_path / "trained", paths["maths"], tmp_path / "more", name="maths", texts=NEW)


@pytest.mark.parametrize("random_seed", [0, 7])
def test_reset_routers_follow_the_random_seed(tmp_path: Path, random_seed: int) -> None:
    """Every router of every layer is initialised again for all experts, and nothing else changes."""
    seed, paths = write_branches(tmp_path, ("code", "law", "maths"))
    upcycle_bam(seed, {name: paths[name] for name in ("code", "law")}, tmp_path / "bam", random_seed=3)
    config = add_expert(
        tmp_path / "bam", paths["maths"], tmp_path / "out", name="maths", texts=None, reset_router=True,
        random_seed=random_seed,
    )  # fmt: skip
    before, after = tensors(tmp_path / "bam"), tensors(tmp_path / "out")
    expected = new_routers(config, random_seed, dtype=torch.float32)
    routers = {name for name in after if ".router." in name}
    assert routers == expected.keys()
    assert len(routers) == 2 * len(config.layers)
    for name in routers:
        assert torch.equal(after[name], expected[name]), name
        assert after[name].shape == (4, config.hidden_size)
        assert not torch.isclose(after[name][:3], before[name]).any(), name
        # Normal with the initialiser's deviation: 4 * hidden draws of it.
        assert float(after[name].std()) == pytest.approx(config.initializer_range, rel=0.35)
    for name in before:
        if ".experts." in name:
            assert torch.equal(after[name], before[name]), name


def test_a_nexus_router_that_is_reset_keeps_its_domains(
    world: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    """The projection is initialised again, the domain embeddings stay. Without a reset both stay."""
    nexus, paths = world
    for reset in (False, True):
        out = tmp_path / f"reset-{reset}"
        config = add_expert(
            nexus, paths["maths"], out, name="maths", texts=NEW, reset_router=reset, random_seed=5
        )
        before, after = tensors(nexus), tensors(out)
        expected = new_routers(config, 5, dtype=torch.float32)
        new = domain_embedding(load_encoder(nexus), NEW)
        for layer in range(len(config.layers)):
            router = f"model.layers.{layer}.mlp.router."
            for part in ("into", "out"):
                source = expected if reset else before
                assert torch.equal(after[router + part], source[router + part]), (router, part, reset)
            assert torch.equal(after[router + "domains"][:2], before[router + "domains"])
            assert torch.allclose(after[router + "domains"][2], new, atol=1e-6)
