"""Which weights each method copies, averages and initialises; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from koine.combine import upcycle_bam, upcycle_btx, upcycle_nexus
from koine.errors import UserError
from koine.model import Decoder, load_model, save_model
from tests.combine.models import small_config, write_branches

LAYER = "model.layers.2."


@pytest.fixture
def branches(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    return write_branches(tmp_path, ("code", "law"))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(path / "model.safetensors")
    return found


def test_btx(branches: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    seed, experts = branches
    upcycle_btx(seed, experts, tmp_path / "out")
    got, dense = tensors(tmp_path / "out"), [tensors(path) for path in (seed, *experts.values())]
    for part in ("gate", "up", "down"):
        for number, one in enumerate(dense):
            assert torch.equal(
                got[f"{LAYER}mlp.experts.{number}.{part}_proj.weight"], one[f"{LAYER}mlp.{part}_proj.weight"]
            )
    for name in (f"{LAYER}self_attn.k_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.allclose(got[name], torch.stack([one[name] for one in dense]).mean(0), atol=1e-7)
    model = load_model(tmp_path / "out")
    assert model.config.mixture is not None
    assert model.config.mixture.experts == ("seed", "code", "law")
    assert not torch.equal(got[f"{LAYER}mlp.router.weight"], got["model.layers.0.mlp.router.weight"])
    record = json.loads((tmp_path / "out" / "mixture.json").read_text())
    assert list(record["experts"]) == ["seed", "code", "law"]


@pytest.mark.parametrize("attention", ["kv-experts", "shared-kv"])
def test_bam(branches: tuple[Path, dict[str, Path]], tmp_path: Path, attention: str) -> None:
    seed, experts = branches
    upcycle_bam(seed, experts, tmp_path / "out", attention=attention)
    got, dense = tensors(tmp_path / "out"), [tensors(path) for path in (seed, *experts.values())]
    for part in "qkvo":
        of_all = [one[f"{LAYER}self_attn.{part}_proj.weight"] for one in dense]
        if part in "kv" and attention == "shared-kv":
            shared = got[f"{LAYER}self_attn.{part}_proj.weight"]
            assert torch.allclose(shared, torch.stack(of_all).mean(0), atol=1e-7)
        else:
            for number, one in enumerate(of_all):
                assert torch.equal(got[f"{LAYER}self_attn.experts.{number}.{part}_proj.weight"], one)
    load_model(tmp_path / "out")


def test_nexus_averages_the_experts_alone_and_shares_the_seed(
    branches: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    seed, experts = branches
    domains = torch.randn(2, 6)
    upcycle_nexus(seed, experts, tmp_path / "out", domains=domains)
    got, dense = tensors(tmp_path / "out"), [tensors(path) for path in experts.values()]
    name = f"{LAYER}self_attn.q_proj.weight"
    assert torch.allclose(got[name], torch.stack([one[name] for one in dense]).mean(0), atol=1e-7)
    assert torch.equal(
        got[f"{LAYER}mlp.shared_expert.up_proj.weight"], tensors(seed)[f"{LAYER}mlp.up_proj.weight"]
    )
    assert torch.equal(got[f"{LAYER}mlp.experts.1.up_proj.weight"], dense[1][f"{LAYER}mlp.up_proj.weight"])
    for layer in range(4):
        assert torch.equal(got[f"model.layers.{layer}.mlp.router.domains"], domains)


def test_copies_of_the_seed_do_not_count_in_the_average(
    branches: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    seed, experts = branches
    upcycle_btx(seed, experts, tmp_path / "four")
    upcycle_btx(seed, experts, tmp_path / "six", seed_copies=2, top_k=3)
    four, six = tensors(tmp_path / "four"), tensors(tmp_path / "six")
    assert torch.equal(four["model.norm.weight"], six["model.norm.weight"])
    name = f"{LAYER}mlp.experts.{{}}.up_proj.weight"
    assert torch.equal(six[name.format(4)], six[name.format(0)])
    mixture = load_model(tmp_path / "six").config.mixture
    assert mixture is not None
    assert mixture.experts == ("seed", "code", "law", "seed-2", "seed-3")


def test_the_same_random_seed_gives_the_same_bytes(
    branches: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    for name, random_seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle_bam(*branches, tmp_path / name, random_seed=random_seed)
    first, second, third = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "c"))
    assert first == second
    assert first != third


def test_averages_are_computed_in_float32(tmp_path: Path) -> None:
    seed, experts = write_branches(tmp_path, ("code", "law"), dtype=torch.bfloat16)
    upcycle_btx(seed, experts, tmp_path / "out")
    name = "model.embed_tokens.weight"
    dense = torch.stack([tensors(path)[name].double() for path in (seed, *experts.values())])
    assert torch.equal(tensors(tmp_path / "out")[name], dense.mean(0).to(torch.bfloat16))


def _other_shape(path: Path) -> None:
    tokenizer = path.with_name("tokenizer")
    save_model(Decoder(small_config(intermediate_size=64)), path, tokenizer=tokenizer)


def _unrelated(path: Path) -> None:
    torch.manual_seed(99)
    save_model(Decoder(small_config()), path, tokenizer=path.with_name("tokenizer"))


def _other_tokenizer(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"][0]["content"] = "<other>"
    (path / "tokenizer.json").write_text(json.dumps(content))


def _nan(path: Path) -> None:
    stored = tensors(path)
    stored["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(stored, path / "model.safetensors")


def _mixture(path: Path) -> None:
    seed = path.with_name("seed")
    shutil.rmtree(path)
    upcycle_btx(seed, {"seed-again": seed}, path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_other_shape, "intermediate_size is 64, and 48 in"),
        (_unrelated, "has no common ancestor with"),
        (_other_tokenizer, r"its tokenizer is another than that of .* \(they differ in added_tokens\)"),
        (_nan, "holds NaN or infinity"),
        (_mixture, "is a mixture of experts already"),
        (lambda path: (path / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        (lambda path: (path / "model.safetensors").unlink(), "holds no model.safetensors"),
    ],
)
def test_models_that_are_no_branch_of_the_seed_are_refused(
    branches: tuple[Path, dict[str, Path]], tmp_path: Path, spoil: Callable[[Path], None], says: str
) -> None:
    seed, experts = branches
    spoil(experts["law"])
    with pytest.raises(UserError, match=says):
        upcycle_btx(seed, experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_expert_needs_a_domain_embedding(branches: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 domain embeddings for 2 experts"):
        upcycle_nexus(*branches, tmp_path / "out", domains=torch.randn(3, 6))


def test_a_mixture_generates_and_merges_like_a_dense_model(
    branches: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    """Generation with the KV cache agrees with full forward passes; two mixtures merge."""
    from koine.combine.merging.config import MergeConfig
    from koine.combine.merging.runner import run_merge
    from koine.generate import LocalEngine, Sampling

    for name, random_seed in (("one", 1), ("two", 2)):
        upcycle_bam(*branches, tmp_path / name, random_seed=random_seed)
    engine = LocalEngine(tmp_path / "one", dtype="float32", threads=1)
    conversation = [{"role": "user", "content": "ein Text"}]
    [answer] = engine.generate([conversation], Sampling(max_new_tokens=5, temperature=0))
    model = load_model(tmp_path / "one")
    text, _ = engine.tokenizer.encode_messages(conversation, generation_prompt=True)
    for token in answer.tokens:
        with torch.no_grad():
            assert int(model.logits(model(torch.tensor([text])))[0, -1].argmax()) == token
        text = [*text, token]
    run_merge(
        MergeConfig(method="linear", models=(tmp_path / "one", tmp_path / "two"), weights=(0.5, 0.5)),
        tmp_path / "merged",
    )
    got, one, two = (tensors(tmp_path / name) for name in ("merged", "one", "two"))
    router = "model.layers.0.mlp.router.weight"
    assert torch.allclose(got[router], (one[router] + two[router]) / 2, atol=1e-7)
    assert load_model(tmp_path / "merged").config == model.config


def test_a_folder_with_a_model_is_not_overwritten(
    branches: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    seed, experts = branches
    before = (experts["law"] / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds a model already"):
        upcycle_btx(seed, experts, experts["law"])
    assert (experts["law"] / "config.json").read_bytes() == before
