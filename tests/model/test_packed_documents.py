"""Documents of a packed row against the same documents alone, in many classes of `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from koine.errors import UserError
from koine.model.causal_lm import CausalLM
from koine.model.packed_documents import document_positions, inspect_isolation

transformers = pytest.importorskip("transformers", reason="other architectures need the extra [hf]")

VOCABULARY = 99
USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FEW: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
GPT2_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
}  # fmt: skip
# Windows are shorter than the documents below.
WINDOW: dict[str, Any] = {"head_dim": 8, "sliding_window": 5}

PACKING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("Llama", "positions", USUAL),
    "Mistral": ("Mistral", "positions", USUAL | WINDOW),
    "Qwen2": ("Qwen2", "positions", USUAL),
    "Qwen2 with windows": (
        "Qwen2",
        "positions",
        USUAL | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "Qwen3": ("Qwen3", "positions", USUAL | {"head_dim": 8}),
    "Gemma2": ("Gemma2", "positions", USUAL | WINDOW | {"query_pre_attn_scalar": 8}),
    "Gemma3": ("Gemma3Text", "positions", USUAL | WINDOW | {"query_pre_attn_scalar": 8}),
    "Cohere2": ("Cohere2", "positions", USUAL | WINDOW),
    "Phi3": ("Phi3", "positions", USUAL | {"pad_token_id": 0}),
    "GPT2": ("GPT2", "positions", GPT2_LIKE),
    "GPTNeoX": ("GPTNeoX", "positions", USUAL),
    "Mixtral": ("Mixtral", "positions", USUAL | {"num_local_experts": 4}),
    "GptOss": ("GptOss", "masks", USUAL | WINDOW | {"num_local_experts": 4}),
    "OPT": (
        "OPT",
        "masks",
        FEW
        | {"ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "Bloom": ("Bloom", "masks", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Mpt": (
        "Mpt",
        "masks",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
    "Falcon": ("Falcon", "masks", FEW | {"num_attention_heads": 4}),
    "Falcon with ALiBi": ("Falcon", "masks", FEW | {"num_attention_heads": 4, "alibi": True}),
}
STATEFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": ("Mamba", FEW | {"state_size": 8}),
    "Rwkv": ("Rwkv", FEW | {"attention_hidden_size": 32, "context_length": 64}),
    # Every second layer is attention.
    "Jamba": (
        "Jamba",
        USUAL
        | {
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    # Convolutions over three tokens between layers of attention.
    "Lfm2": ("Lfm2", USUAL | {"layer_types": ["conv", "full_attention"] * 2}),
    # A recurrence and attention in each layer.
    "FalconH1": (
        "FalconH1",
        USUAL | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
}


def build(kind: str, fields: dict[str, Any], attention: str = "eager") -> CausalLM:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    inner = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        # Random weights of the usual size hardly let tokens see each other.
        for parameter in inner.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return CausalLM(inner).eval()


EAGER_ONLY = ("Gemma2", "GptOss", "Bloom", "Mpt")
IMPLEMENTATIONS = [(name, "eager") for name in PACKING] + [
    (name, "sdpa") for name in PACKING if name not in EAGER_ONLY
]

DOCUMENTS = ((9, 1, 12), (6, 7, 2))
"""Tokens of the documents of each row; the second row ends in padding."""


def packed_rows() -> tuple[Tensor, Tensor]:
    time = max(sum(row) for row in DOCUMENTS)
    torch.manual_seed(1)
    ids = torch.full((len(DOCUMENTS), time), -1)
    for row, lengths in enumerate(DOCUMENTS):
        ids[row, : sum(lengths)] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.randint(3, VOCABULARY, (len(DOCUMENTS), time)), ids


def alone(model: CausalLM, tokens: Tensor, ids: Tensor) -> Tensor:
    """The logits of all documents, each computed by the class in a row of its own."""
    found = []
    for row in range(len(tokens)):
        for number in range(int(ids[row].max()) + 1):
            found.append(model.inner(input_ids=tokens[row, ids[row] == number][None], use_cache=False).logits)
    return torch.cat(found, dim=1)[0]


@pytest.mark.parametrize(("name", "attention"), IMPLEMENTATIONS)
def test_logits_and_gradients_are_those_of_the_documents_alone(name: str, attention: str) -> None:
    kind, way, fields = PACKING[name]
    model = build(kind, fields, attention)
    tokens, ids = packed_rows()
    assert model.isolates_documents
    assert model.isolation.way == way
    model.inner.zero_grad()
    expected = alone(model, tokens, ids)
    # Each token's loss with a fixed other token as target.
    targets = tokens[ids >= 0].roll(1)
    F.cross_entropy(expected, targets, reduction="sum").backward()
    wanted = {key: weight.grad for key, weight in model.named_parameters()}
    model.inner.zero_grad()
    logits = model.logits(model(tokens, document_ids=ids))[ids >= 0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    F.cross_entropy(logits, targets, reduction="sum").backward()
    for key, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, wanted[key], rtol=1e-3, atol=1e-3, msg=key)
    # A plain row is another thing: the test can fail.
    with torch.no_grad():
        plain = model.inner(input_ids=tokens, use_cache=False).logits[ids >= 0]
    assert float((plain - expected.detach()).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["Llama", "OPT", "Bloom"])
def test_gradient_checkpointing_recomputes_the_same_masks(name: str) -> None:
    kind, _, fields = PACKING[name]
    tokens, ids = packed_rows()
    gradients = []
    for enabled in (False, True):
        model = build(kind, fields | {"attention_dropout": 0.0, "dropout": 0.0, "hidden_dropout": 0.0})
        model.train()
        model.set_gradient_checkpointing(enabled)
        model.logits(model(tokens, document_ids=ids)).logsumexp(-1).sum().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_class_with_a_state_is_refused(name: str) -> None:
    model = build(*STATEFUL[name])
    assert not model.isolates_documents
    assert model.isolation.reason == "a document changes the logits of the next one"
    tokens, ids = packed_rows()
    with pytest.raises(
        UserError, match=f"{name}ForCausalLM cannot keep packed documents apart: a document changes"
    ):
        model(tokens, document_ids=ids)
    # One document a row, with padding behind it, is no packed row.
    with torch.no_grad():
        padded = model(tokens, document_ids=torch.where(ids == 0, 0, -1))
        first = model(tokens[:1, :9])
    torch.testing.assert_close(padded[:1, :9], first, rtol=1e-4, atol=1e-4)


def ignoring(inner: Any, *names: str) -> Any:
    """A model whose forward takes some arguments and ignores them."""
    forward: Callable[..., Any] = type(inner).forward

    def without(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        return forward(self, input_ids=input_ids, **{k: v for k, v in given.items() if k not in names})

    inner.forward = MethodType(without, inner)
    return inner


def test_learned_positions_that_go_on_over_documents_are_found() -> None:
    """Masks alone keep attention apart, but GPT-2 then counts the second document's tokens from 7 on."""
    kind, _, fields = PACKING["GPT2"]
    found = inspect_isolation(ignoring(build(kind, fields).inner, "position_ids"))
    assert found.way is None
    assert found.reason == "the logits of a document are not those of the document alone"


def test_relative_positions_need_masks_only() -> None:
    kind, _, fields = PACKING["Llama"]
    assert inspect_isolation(ignoring(build(kind, fields).inner, "position_ids")).way == "masks"


def test_a_class_that_fails_with_positions_gives_its_error() -> None:
    inner = build(*STATEFUL["Mamba"]).inner
    forward = inner.forward

    def failing(
        input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Any:
        if position_ids is not None:
            raise ValueError("positions are not for me")
        return forward(input_ids=input_ids)

    inner.forward = failing
    found = inspect_isolation(inner)
    assert found.way is None
    assert "fails for packed rows (ValueError: positions are not for me)" in found.reason


@pytest.mark.parametrize("name", ["Gemma3", "OPT"])
def test_the_experiment_leaves_no_trace(name: str) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    kind, _, fields = PACKING[name]
    model = build(kind, fields).to(torch.bfloat16)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    described = model.describe()
    functions = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    model.train()
    assert model.isolates_documents
    assert model.training
    assert model.inner.training
    assert model.describe() == described
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == functions
    assert all(weight.grad is None for weight in model.parameters())
    for key, weight in model.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, before[key])


def test_a_leak_that_bfloat16_would_hide_is_found() -> None:
    assert not build(*STATEFUL["FalconH1"]).to(torch.bfloat16).isolates_documents


def test_positions_begin_at_each_document_and_at_padding() -> None:
    ids = torch.tensor([[0, 0, 1, 2, 2, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0], [-1, -1, 3, 3, 3, 4, 4, 5]])
    assert document_positions(ids).tolist() == [
        [0, 1, 0, 0, 1, 2, 0, 1],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 0, 1, 2, 0, 1, 0],
    ]


def test_padding_by_a_mask_in_a_packed_row() -> None:
    """Padding on the left, by `attention_mask`, and two documents after it."""
    kind, _, fields = PACKING["GPT2"]
    model = build(kind, fields)
    tokens, ids = packed_rows()
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    with torch.no_grad():
        found = model.logits(model(tokens, document_ids=ids, attention_mask=mask))
        first = model.inner(input_ids=tokens[:1, 3:9]).logits
    torch.testing.assert_close(found[:1, 3:9], first, rtol=1e-4, atol=1e-4)
