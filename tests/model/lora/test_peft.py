"""An adapter computes and learns in our fused layers as in `peft`'s, and its files are the same thing to both."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koine.combine import merge_adapter
from koine.errors import UserError
from koine.model import Decoder, LoraConfig, add_lora, load_causal_lm, load_model
from koine.model.config import MixtureConfig
from koine.model.formats.directory import save_model
from koine.model.language_model import LanguageModel
from koine.model.lora.adapter import LoraAdapter
from koine.model.lora.layers import LoraLinear, Part

from ...train.models import small_config
from .conftest import MADE, save_random

peft = pytest.importorskip("peft", reason="the reference implementation needs the extra [peft]")
transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")

TOKENS = torch.arange(2 * 20).view(2, 20) * 7 % 90 + 3
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def adapted(base: Path, config: LoraConfig) -> tuple[LanguageModel, LoraAdapter]:
    """Our model with an adapter whose A and B are random."""
    model = load_causal_lm(base)
    adapter = add_lora(model, config, base=base, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model, adapter


def saved(base: Path, folder: Path, config: LoraConfig) -> tuple[LanguageModel, LoraAdapter]:
    model, adapter = adapted(base, config)
    adapter.save(folder, dict(model.named_parameters()))
    return model, adapter


def opened(base: Path, folder: Path, **more: Any) -> Any:
    """The same with `peft`; it must not warn."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # peft's own use of an old name of transformers
        return peft.PeftModel.from_pretrained(model, folder, **more)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("kind", MADE)
def test_logits_and_gradients_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    base = save_random(kind, tmp_path / "base")
    model, adapter = saved(base, tmp_path / "adapter", LoraConfig(rank=3, alpha=12.0))
    theirs = opened(base, tmp_path / "adapter", is_trainable=True)
    assert isinstance(model, Decoder) == (kind != "gpt2")
    ours, reference = model.logits(model(TOKENS)), theirs(TOKENS).logits
    close(ours, reference, 1e-5)
    plain = load_causal_lm(base)
    assert (plain.logits(plain(TOKENS)) - ours).abs().max() > 0.01

    ours.square().mean().backward()
    reference.square().mean().backward()
    parameters = dict(model.named_parameters())
    found = adapter.to_file({name: parameters[name].grad for name in adapter.parameters})
    wanted = {
        name.replace(".default", ""): one.grad for name, one in theirs.named_parameters() if one.requires_grad
    }
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(found[name], gradient, 1e-4)
    assert all(one.grad is None for name, one in parameters.items() if name not in adapter.parameters)


@pytest.mark.parametrize("kind", ["llama", "phi3", "cohere2", "gpt2"])
def test_our_merge_is_that_of_peft(kind: str, tmp_path: Path) -> None:
    base = save_random(kind, tmp_path / "base")
    saved(base, tmp_path / "adapter", LoraConfig(rank=3, alpha=5.0, rslora=True))
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    theirs = opened(base, tmp_path / "adapter").merge_and_unload()
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    wanted = theirs.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


def test_an_adapter_of_peft_with_patterns_is_merged_as_peft_does(tmp_path: Path) -> None:
    base = save_random("qwen3", tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.self_attn.v_proj": 20, "up_proj": 1},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    wanted = theirs.merge_and_unload().state_dict()
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "layers.1.mlp.down_proj", "k_proj,up_proj", "o_proj"])
@pytest.mark.parametrize("kind", ["llama", "cohere"])
def test_targets_are_chosen_as_in_peft(kind: str, targets: str, tmp_path: Path) -> None:
    base = save_random(kind, tmp_path / "base")
    model, _ = saved(base, tmp_path / "adapter", LoraConfig(rank=1, targets=targets))
    theirs = opened(base, tmp_path / "adapter")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name)
    close(model.logits(model(TOKENS)), theirs(TOKENS).logits, 1e-5)


def test_a_new_adapter_changes_nothing(tmp_path: Path) -> None:
    base = save_random("gemma3_text", tmp_path / "base")
    model, plain = load_causal_lm(base), load_causal_lm(base)
    before = plain.logits(plain(TOKENS))
    add_lora(model, LoraConfig(rank=2), base=base)
    torch.testing.assert_close(model.logits(model(TOKENS)), before, rtol=0, atol=0)


def test_dropout_acts_in_training_only(tmp_path: Path) -> None:
    base = save_random("llama", tmp_path / "base")
    model, _ = adapted(base, LoraConfig(rank=2, dropout=0.5))
    plain, _ = adapted(base, LoraConfig(rank=2))
    torch.testing.assert_close(model.eval()(TOKENS), plain.eval()(TOKENS), rtol=0, atol=0)
    assert (model.train()(TOKENS) - plain(TOKENS)).abs().max() > 0.05


@torch.no_grad()
def test_dropout_keeps_the_mean() -> None:
    part = Part("self_attn.q_proj", ("self_attn.q_proj",), (6,), 0)
    layer = LoraLinear(nn.Linear(8, 6), [part], columns=False, rank=2, scale=1.0, dropout=0.25)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(dim=0)
    assert (mean - layer.eval()(x)).abs().max() < 0.05


def test_a_mixture_gets_adapters_on_its_dense_parts(tmp_path: Path) -> None:
    mixture = MixtureConfig(experts=("a", "b"), shared_expert=True)
    torch.manual_seed(0)
    model = Decoder(replace(small_config(), mixture=mixture))
    save_model(model, tmp_path / "base")
    ours, adapter = saved(tmp_path / "base", tmp_path / "adapter", LoraConfig(rank=2))
    assert {name.rpartition(".")[2] for name in adapter.modules} == {*ATTENTION, *FEED_FORWARD}
    assert "model.layers.0.mlp.shared_expert.up_proj" in adapter.modules
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    tokens = TOKENS % 64
    close(load_model(tmp_path / "merged")(tokens), ours.eval()(tokens), 1e-5)


@pytest.mark.parametrize("target", ["router", "experts.0.up_proj"])
def test_experts_and_routers_cannot_have_one(target: str) -> None:
    model = Decoder(replace(small_config(), mixture=MixtureConfig(experts=("a", "b"))))
    with pytest.raises(UserError, match=rf"'{target}'.*not the routers and experts of a mixture"):
        add_lora(model, LoraConfig(rank=2, targets=target))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_unknown_target_is_refused_with_the_possible_ones(kind: str, tmp_path: Path) -> None:
    model = load_causal_lm(save_random(kind, tmp_path / "base"))
    with pytest.raises(UserError, match=r"is called 'q_prj'; possible are: c_attn|down_proj, gate_proj"):
        add_lora(model, LoraConfig(rank=2, targets="q_prj"))


def test_a_merge_in_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    base = save_random("llama", tmp_path / "base")
    half = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    saved(tmp_path / "half", tmp_path / "adapter", LoraConfig(rank=3))
    merge_adapter(tmp_path / "half", tmp_path / "adapter", tmp_path / "merged")
    merge_adapter(tmp_path / "half", tmp_path / "adapter", tmp_path / "wide", dtype=torch.float32)
    narrow, wide = load_model(tmp_path / "merged").state_dict(), load_model(tmp_path / "wide").state_dict()
    for name, tensor in wide.items():
        assert narrow[name].dtype == torch.bfloat16
        torch.testing.assert_close(narrow[name], tensor.to(torch.bfloat16), rtol=0, atol=0)
