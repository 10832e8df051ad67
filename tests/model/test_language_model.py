"""Our decoder and a model of `transformers` behind one interface."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.errors import UserError
from koine.model import CausalLM, Decoder, LanguageModel, ModelConfig, hybrid_layers, load_causal_lm
from koine.model.causal_lm import load_with_transformers
from koine.model.language_model import VocabularyTensors

transformers = pytest.importorskip("transformers")

VOCABULARY, CONTEXT = 64, 48
KINDS = ("decoder", "transformers")


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "decoder":
        config = ModelConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2,
            head_dim=8,
            layers=hybrid_layers(2, window=4, full_every=2), max_position_embeddings=CONTEXT,
            initializer_range=0.2,
        )  # fmt: skip
        return Decoder(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return CausalLM(transformers.LlamaForCausalLM(config)).eval()


def logits_of(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(torch.arange(12).view(2, 6)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_member_is_there(kind: str) -> None:
    """Python does not check a protocol at run time: compare names, and parameters of methods."""
    model = make(kind)
    for name, member in inspect.getmembers(LanguageModel):
        if name.startswith("_"):
            continue
        assert hasattr(model, name), name
        if inspect.isfunction(member) and member.__module__ == LanguageModel.__module__:
            wanted = [one.name for one in inspect.signature(member).parameters.values()][1:]
            found = inspect.signature(getattr(model, name)).parameters
            assert any(one.kind is one.VAR_KEYWORD for one in found.values()) or set(wanted) <= set(found), (
                name
            )
    assert (model.vocab_size, model.context_length) == (VOCABULARY, CONTEXT)
    assert model.isolates_documents
    assert model.architecture == ("Decoder" if kind == "decoder" else "LlamaForCausalLM")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_opened_again(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    model.save(tmp_path)
    again = load_causal_lm(tmp_path) if kind == "decoder" else load_with_transformers(tmp_path)
    assert type(again) is type(model)
    assert again.describe() == model.describe()
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_place_of_its_own_are_saved(kind: str, tmp_path: Path) -> None:
    """Training saves its float32 masters, by the names of the model's parameters."""
    model, other = make(kind), make(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model.save(tmp_path, weights=dict(other.named_parameters()))
    again = load_causal_lm(tmp_path) if kind == "decoder" else load_with_transformers(tmp_path)
    assert torch.equal(logits_of(again), logits_of(other))


@pytest.mark.parametrize("kind", KINDS)
def test_stored_tensors_are_loaded_again(kind: str) -> None:
    model, other = make(kind), make(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    stored = {name: tensor.clone() for name, tensor in other.stored_tensors().items()}
    model.load_stored_tensors(stored)
    assert torch.equal(logits_of(model), logits_of(other))
    assert not any("in_proj" in name for name in stored)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_in_another_order(kind: str) -> None:
    """Rows in reverse order: the logits of reversed ids are the old ones, reversed."""
    model = make(kind)
    before = logits_of(model)
    old = model.vocabulary_tensors()
    assert old.head is None
    special = {"bos_token_id": 9, "eos_token_id": 10, "pad_token_id": 11}
    model.set_vocabulary(VocabularyTensors(old.embedding.detach().flip(0)), special, lambda ids, own: own)
    with torch.no_grad():
        after = model.logits(model(VOCABULARY - 1 - torch.arange(12).view(2, 6)))
    assert torch.allclose(after.flip(-1), before, atol=1e-5)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (9, 10, 11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_vocabulary(kind: str) -> None:
    model = make(kind)
    old = model.vocabulary_tensors().embedding.detach()
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model.set_vocabulary(VocabularyTensors(torch.cat((old, old[:6]))), special, lambda ids, own: own)
    assert model.vocab_size == VOCABULARY + 6
    assert logits_of(model).shape == (2, 6, VOCABULARY + 6)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    for kind in KINDS:
        gradients = []
        for enabled in (False, True):
            model = make(kind).train()
            model.set_gradient_checkpointing(enabled)
            model.logits(model(torch.arange(12).view(2, 6))).square().mean().backward()
            gradients.append(model.input_embedding.weight.grad.clone())
        assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7)


def test_a_class_that_cannot_recompute_says_so() -> None:
    model = make("transformers")
    model.inner.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="LlamaForCausalLM has no gradient checkpointing"):
        model.set_gradient_checkpointing(True)


def test_alibi_models_name_their_limit_otherwise() -> None:
    """MPT calls it `max_seq_len`: its biases are made for so many positions."""
    config = transformers.MptConfig(d_model=32, n_layers=1, n_heads=4, max_seq_len=24, vocab_size=VOCABULARY)
    assert CausalLM(transformers.MptForCausalLM(config)).context_length == 24


def test_state_space_models_have_no_limit() -> None:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4
    )
    assert CausalLM(transformers.MambaForCausalLM(config)).context_length is None
