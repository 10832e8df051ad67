"""Mixtures of branches of every dense family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from koine.combine import add_expert, remove_expert, upcycle_bam, upcycle_btx, upcycle_nexus
from koine.combine.moe.upcycle import average
from koine.errors import UserError
from koine.model import Decoder, load_model, save_model
from koine.model.formats.directory import open_canonical
from koine.model.formats.stored_tensors import layer_of
from tests.combine.moe.families import dense_configs, noisy, write_family

FAMILIES = sorted(dense_configs())
TOKENS = torch.randint(0, 200, (2, 19), generator=torch.Generator().manual_seed(3))
METHODS = ("btx", "bam", "bam-shared-kv", "nexus")


def upcycle(method: str, seed: Path, experts: dict[str, Path], out: Path, **options: Any) -> None:
    if method == "btx":
        upcycle_btx(seed, experts, out, **options)
    elif method == "nexus":
        domains = torch.randn(len(experts), 6, generator=torch.Generator().manual_seed(1))
        upcycle_nexus(seed, experts, out, domains=domains, **options)
    else:
        attention = "kv-experts" if method == "bam" else "shared-kv"
        upcycle_bam(seed, experts, out, attention=attention, **options)


def logits(path: Path, tokens: Tensor = TOKENS) -> Tensor:
    model = load_model(path, dtype=torch.float64)
    with torch.no_grad():
        return model.logits(model(tokens))


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_identical_branches_are_the_dense_model(tmp_path: Path, family: str, method: str) -> None:
    """Where the gates of a token sum to 1. Nexus adds the shared expert: the feed-forward's output doubles."""
    seed, paths = write_family(tmp_path, family, ("code", "law"), spread=0.0, dtype=torch.float64)
    upcycle(method, seed, paths, tmp_path / "out", top_k=2, normalise_top_k=True)
    wanted = seed
    if method == "nexus":
        dense = load_model(seed)
        stored = dense.stored_tensors()
        for name in stored:
            if name.endswith("mlp.down_proj.weight"):
                stored[name] = 2 * stored[name]
        dense.load_stored_tensors(stored)
        wanted = tmp_path / "doubled"
        save_model(dense, wanted)
    assert relative(logits(tmp_path / "out"), logits(wanted)) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_a_copy_an_average_or_a_router(tmp_path: Path, family: str, method: str) -> None:
    """By our stored names, whatever the names, the rotary order and the fused projections of the class."""
    seed, paths = write_family(tmp_path, family, ("code", "law"))
    upcycle(method, seed, paths, tmp_path / "out", top_k=2)
    config = load_model(tmp_path / "out").config
    assert config.mixture is not None
    got = open_canonical(tmp_path / "out", config)
    dense = [open_canonical(path, load_model(path).config) for path in (seed, *paths.values())]
    members = dense[1:] if method == "nexus" else dense
    seen = set()
    for name in got:
        prefix, rest = layer_of(name)
        if ".router." in rest:
            continue
        if ".experts." in rest:
            module, _, after = rest.partition(".experts.")
            number, _, part = after.partition(".")
            source = f"{prefix}{module}.{part}"
            assert torch.equal(got[name], members[int(number)][source]), name
        elif ".shared_expert." in rest:
            source = name.replace("shared_expert.", "")
            assert torch.equal(got[name], dense[0][source]), name
        else:
            source = name
            mean = torch.stack([one[name] for one in members]).double().mean(0)
            assert torch.allclose(got[name].double(), mean, atol=1e-6), name
        seen.add(source)
    assert seen == set(dense[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["btx", "nexus"])
def test_an_expert_is_added_and_removed_again(tmp_path: Path, family: str, method: str) -> None:
    seed, paths = write_family(tmp_path, family, ("code", "law", "maths"))
    two = {name: paths[name] for name in ("code", "law")}
    upcycle(method, seed, two, tmp_path / "out", top_k=2)
    before = open_canonical(tmp_path / "out", load_model(tmp_path / "out").config)
    if method == "nexus":
        upcycle_nexus(seed, paths, tmp_path / "all", domains=None, top_k=2)
        remove_expert(tmp_path / "all", "maths", tmp_path / "again", dense=paths["maths"])
        grown = tmp_path / "all"
    else:
        grown = tmp_path / "more"
        add_expert(tmp_path / "out", paths["maths"], grown, name="maths", texts=None, reset_router=True)
        remove_expert(grown, "maths", tmp_path / "again", dense=paths["maths"])
    new = open_canonical(grown, load_model(grown).config)
    dense = open_canonical(paths["maths"], load_model(paths["maths"]).config)
    number = 2 if method == "nexus" else 3
    for part in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.experts.{number}.{part}_proj.weight"
        assert torch.equal(new[name], dense[f"model.layers.1.mlp.{part}_proj.weight"])
    again = open_canonical(tmp_path / "again", load_model(tmp_path / "again").config)
    for name in again:
        if ".router." not in name:
            assert torch.allclose(again[name], before[name], atol=1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_average_is_a_model_of_the_family(tmp_path: Path, family: str) -> None:
    seed, paths = write_family(tmp_path, family, ("code",))
    average(seed, paths, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family
    one, two, got = (load_model(path).state_dict() for path in (seed, paths["code"], tmp_path / "out"))
    for name in got:
        assert torch.allclose(got[name], (one[name] + two[name]) / 2, atol=1e-6), name


def test_branches_of_two_families_are_refused(tmp_path: Path) -> None:
    seed, _ = write_family(tmp_path / "llama", "llama", ())
    other, _ = write_family(tmp_path / "qwen3", "qwen3", ())
    with pytest.raises(UserError, match="is a qwen3 model, and .* a llama model .qk_norm of layer 0 is head"):
        upcycle_btx(seed, {"other": other}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_branches_in_two_dtypes_are_stored_in_the_wider(tmp_path: Path) -> None:
    seed, paths = write_family(tmp_path, "llama", ("code",))
    narrow = tmp_path / "narrow"
    save_model(load_model(seed), narrow, dtype=torch.bfloat16, tokenizer=seed)
    upcycle_btx(narrow, paths, tmp_path / "out")
    got = open_canonical(tmp_path / "out", load_model(tmp_path / "out").config)
    assert {got.dtype(name) for name in got} == {torch.float32}
    dense = [load_model(path, dtype=torch.float32) for path in (narrow, paths["code"])]
    mean = (dense[0].embedding.weight + dense[1].embedding.weight) / 2
    assert torch.allclose(got["model.embed_tokens.weight"], mean)


def test_ids_of_special_tokens_may_differ(tmp_path: Path) -> None:
    """A fine-tuned branch often names a padding token that its seed lacks; the mixture has the seed's."""
    seed, paths = write_family(tmp_path, "llama", ("code",))
    content = json.loads((paths["code"] / "config.json").read_text())
    content |= {"pad_token_id": 5, "attention_dropout": 0.1}
    (paths["code"] / "config.json").write_text(json.dumps(content))
    upcycle_btx(seed, paths, tmp_path / "out")
    assert load_model(tmp_path / "out").config.pad_token_id == 0


@pytest.mark.parametrize(("family", "top_k"), [("llama", 1), ("gemma3_text", 2), ("olmo2", 2)])
def test_the_router_gets_a_gradient_by_default(tmp_path: Path, family: str, top_k: int) -> None:
    """A norm after the feed-forward cancels the gate of a single expert."""
    seed, paths = write_family(tmp_path, family, ("code",))
    gradients = {}
    for name, given in (("default", None), ("one", 1)):
        upcycle_btx(seed, paths, tmp_path / name, top_k=given)
        model = load_model(tmp_path / name, dtype=torch.float64)
        assert model.config.mixture is not None
        assert model.config.mixture.top_k == (given or top_k)
        model.logits(model(TOKENS)).logsumexp(-1).mean().backward()
        gradients[name] = max(float(block.experts.router.weight.grad.abs().max()) for block in model.blocks)  # type: ignore[union-attr]
    assert (gradients["one"] < 1e-3 * gradients["default"]) == (top_k == 2)
    with pytest.raises(UserError, match="the only gate is always 1"):
        upcycle_btx(seed, paths, tmp_path / "no", top_k=1, normalise_top_k=True)


def test_plain_feed_forwards_are_refused_by_name(tmp_path: Path) -> None:
    seed, _ = write_family(tmp_path, "llama", ())
    config = load_model(seed).config
    save_model(noisy(Decoder(replace(config, mlp_bias=True)), 0.1), tmp_path / "biased", tokenizer=seed)
    with pytest.raises(UserError, match="the feed-forward is plain or has biases"):
        upcycle_btx(tmp_path / "biased", {"one": tmp_path / "biased"}, tmp_path / "out")
