"""Upcycle, train, evaluate, generate, extend and remove, on branches of three shapes; and saved classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.combine import add_expert, fit_encoder, remove_expert, upcycle_btx, upcycle_nexus
from koine.combine.moe.domain_embeddings import domain_embedding
from koine.evaluate import bits_per_byte
from koine.generate import LocalEngine, Sampling
from koine.model import load_model
from koine.model.formats.config_json import model_type
from koine.model.formats.mixture_files import DOMAIN_ENCODER
from koine.tokenizer import load_tokenizer
from koine.train import LanguageModelling, TrainSettings, train
from tests.combine.moe.families import write_family
from tests.combine.moe.test_add_expert import NEW, TEXTS
from tests.combine.moe.test_families import METHODS, TOKENS, logits, relative, upcycle
from tests.train.fakes import fake_order

SHAPES = ("llama", "qwen3", "gemma3_text")
CONVERSATION = [{"role": "user", "content": "ein Text, der länger ist als das Fenster"}]


def make(method: str, seed: Path, experts: dict[str, Path], out: Path) -> None:
    """Make a mixture; that of Nexus has its encoder beside it."""
    if method != "nexus":
        upcycle(method, seed, experts, out)
        return
    encoder = fit_encoder("tfidf", TEXTS, seed_model=seed, width=4)
    domains = torch.stack([domain_embedding(encoder, TEXTS[name]) for name in experts])
    upcycle_nexus(seed, experts, out, domains=domains)
    (out / DOMAIN_ENCODER).mkdir()
    encoder.save(out / DOMAIN_ENCODER)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_from_branches_to_answers(tmp_path: Path, family: str, method: str) -> None:
    seed, paths = write_family(tmp_path, family, ("code", "law", "maths"))
    make(method, seed, {name: paths[name] for name in ("code", "law")}, tmp_path / "mixture")
    folder = trained(tmp_path / "mixture", tmp_path)
    check_generation(folder)
    scores = bits_per_byte(load_model(folder), load_tokenizer(folder), [{"text": "ein Text"}])
    assert 0 < scores["overall"]["bits_per_byte"] < 50
    reset = {} if method == "nexus" else {"reset_router": True}
    add_expert(folder, paths["maths"], tmp_path / "grown", name="maths", texts=NEW, **reset)
    check_generation(tmp_path / "grown")
    config = remove_expert(tmp_path / "grown", "code", tmp_path / "fewer")
    assert config.mixture is not None
    assert config.mixture.experts == (("law", "maths") if method == "nexus" else ("seed", "law", "maths"))
    check_generation(tmp_path / "fewer")


def trained(folder: Path, work: Path) -> Path:
    """Train a mixture for a few steps; the router losses are in the metrics and routers and experts move."""
    model = load_model(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = TrainSettings(dtype="float32", threads=1, learning_rate=0.01, warmup_steps=0)
    order = fake_order(work / "data", steps=(3,))
    train(model, LanguageModelling(), order, settings, out=work / "trained", tokenizer=folder, init_from=folder,
          progress=False, device="cpu")  # fmt: skip
    lines = [json.loads(line) for line in (work / "trained" / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "load_balancing_loss" in line]
    assert losses
    assert all(line["load_balancing_loss"] >= 0.9 and line["router_z_loss"] >= 0 for line in losses)
    after = load_model(work / "trained").state_dict()
    for name in before:
        if "experts" in name and not name.endswith("domains"):
            assert not torch.equal(before[name], after[name]), name
    return work / "trained"


def check_generation(folder: Path) -> None:
    """The engine's tokens, with a KV cache past the window, are those of full forward passes."""
    engine = LocalEngine(folder, dtype="float32", threads=1)
    [answer] = engine.generate([CONVERSATION], Sampling(max_new_tokens=6, temperature=0))
    model = load_model(folder)
    text, _ = engine.tokenizer.encode_messages(CONVERSATION, generation_prompt=True)
    for token in answer.tokens:
        with torch.no_grad():
            assert int(model.logits(model(torch.tensor([text])))[0, -1].argmax()) == token
        text = [*text, token]


@pytest.mark.parametrize(
    ("family", "options", "kind"),
    [
        ("qwen3", {}, "qwen3_moe"),
        ("qwen3", {"top_k": 2, "normalise_top_k": True}, "qwen3_moe"),
        ("llama", {"top_k": 2, "normalise_top_k": True}, "mixtral"),
        ("mistral", {"top_k": 2, "normalise_top_k": True}, "mixtral"),
        ("phi3", {"top_k": 2, "normalise_top_k": True}, "mixtral"),
        ("olmo2", {}, "flex_olmo"),
        ("llama", {}, "koine"),
        ("gemma3_text", {}, "koine"),
        ("cohere2", {}, "koine"),
    ],
)
def test_a_mixture_is_saved_as_a_class_that_computes_it(
    tmp_path: Path, family: str, options: dict[str, Any], kind: str
) -> None:
    """Equal logits in `transformers`, also after an expert is added there; no class, no wrong class."""
    transformers = pytest.importorskip("transformers")
    seed, paths = write_family(tmp_path, family, ("code", "law"))
    config = upcycle_btx(seed, {"code": paths["code"]}, tmp_path / "two", **options)
    add_expert(tmp_path / "two", paths["law"], tmp_path / "three", name="law", texts=None, reset_router=True)
    for name in ("two", "three"):
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == kind
        assert model_type(load_model(tmp_path / name).config) == kind
        if kind != "koine":
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
            assert type(theirs).__module__.startswith("transformers.")
            with torch.no_grad():
                found = theirs(TOKENS).logits
            assert relative(found.double(), logits(tmp_path / name)) < 1e-5
    assert config.mixture is not None
    assert load_model(tmp_path / "three").config.mixture.experts == ("seed", "code", "law")  # type: ignore[union-attr]


@pytest.mark.parametrize("form", [True, False])
def test_a_mixture_made_elsewhere_is_extended(tmp_path: Path, form: bool) -> None:
    """A checkpoint of `transformers`, its experts apart or fused, gets a branch as one more expert."""
    transformers = pytest.importorskip("transformers")
    seed, paths = write_family(tmp_path, "llama", ("code", "law"))
    upcycle_btx(seed, {"code": paths["code"]}, tmp_path / "two", top_k=2, normalise_top_k=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    del model.config.expert_names
    model.save_pretrained(tmp_path / "theirs", save_original_format=form)
    for file in (tmp_path / "two").glob("*token*"):
        (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    add_expert(
        tmp_path / "theirs", paths["law"], tmp_path / "more", name="law", texts=None, reset_router=True
    )
    add_expert(tmp_path / "two", paths["law"], tmp_path / "same", name="law", texts=None, reset_router=True)
    more, same = (load_model(tmp_path / name) for name in ("more", "same"))
    assert more.config.mixture is not None
    assert more.config.mixture.experts == ("expert-0", "expert-1", "law")
    assert all(torch.equal(one, same.state_dict()[name]) for name, one in more.state_dict().items())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    with torch.no_grad():
        assert relative(theirs(TOKENS).logits.double(), logits(tmp_path / "more")) < 1e-5
