"""Log-likelihoods, losses and gradients equal those of the class, whatever its head computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from koine.data.batch import Batch
from koine.errors import UserError
from koine.evaluate.log_likelihood import negative_log_likelihoods
from koine.generate.cache_support import probe_cache_support
from koine.generate.sampling import Sampling
from koine.generate.sequential import SequentialGenerator
from koine.model import CausalLM
from koine.model.causal_lm import load_with_transformers
from koine.model.lm_head import LMHead, probe_tokens, shared_columns
from koine.train.objectives import LanguageModelling

transformers = pytest.importorskip("transformers", reason="the classes need the extra [hf]")

VOCABULARY = 120
# Sums of some ten terms in float32 against float64; a wrong head is off by 0.01 at the least.
CLOSE = 1e-5

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA: dict[str, Any] = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# What stands between the last matrix and the logits: scale, cap, and whether the loss may be computed in
# chunks.
HEADS: dict[str, tuple[dict[str, Any], float, float | None, bool]] = {
    "llama": (LLAMA, 1.0, None, True),
    "granite": ({**LLAMA, "logits_scaling": 8.0}, 0.125, None, True),
    "hyperclovax": ({**LLAMA, "logits_scaling": 0.125}, 0.125, None, True),
    "falcon_h1": (
        {
            **LLAMA, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1, "lm_head_multiplier": 0.02,
        },
        0.02, None, True,
    ),
    "gemma2": ({**LLAMA, "head_dim": 8, "final_logit_softcapping": 3.0}, 1.0, 3.0, True),
    "nanochat": (LLAMA, 1.0, 15.0, True),
    "recurrent_gemma": (
        {**LLAMA, "num_hidden_layers": 3, "lru_width": 32, "head_dim": 8,
         "attention_window_size": 16, "logits_soft_cap": 5.0},
        1.0, 5.0, True,
    ),
    "llama4_text": (
        {
            **LLAMA, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
        1.0, None, True,
    ),
    "modernbert-decoder": (LLAMA, 1.0, None, False),
    "phi": (LLAMA, 1.0, None, False),
    "codegen": (GPT, 1.0, None, False),
    "mamba": ({**COMMON, "state_size": 8}, 1.0, None, True),
    "opt": (
        {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64}, 1.0, None, True,
    ),
}  # fmt: skip


def saved(folder: Path, name: str, fields: dict[str, Any]) -> Path:
    """Random weights, scaled up so that the head matters."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[name](**fields)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=HEADS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name: str = request.param
    return name, saved(tmp_path_factory.mktemp("model") / name, name, HEADS[name][0])


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def opened(folder: Path) -> CausalLM:
    return load_with_transformers(folder)


def ids(rows: int = 2, time: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(2))


def test_scale_and_soft_cap_are_found(model: tuple[str, Path]) -> None:
    name, folder = model
    _, scale, cap, chunks = HEADS[name]
    ours = opened(folder)
    assert ours.head.linear
    assert ours.head.causal
    assert ours.head.vocab_size == VOCABULARY
    assert ours.logit_scale == pytest.approx(scale, rel=1e-6)
    assert ours.head.cap == (None if cap is None else pytest.approx(cap, rel=1e-6))
    assert (ours.output_weight is not None) == chunks


def test_logits_and_log_likelihoods_equal_transformers(model: tuple[str, Path]) -> None:
    _, folder = model
    ours, inner, tokens = opened(folder), theirs(folder), ids()
    with torch.no_grad():
        expected = inner(input_ids=tokens, use_cache=False).logits
        assert (ours.logits(ours(tokens)) - expected).abs().max() <= CLOSE * expected.abs().max()
    scores = negative_log_likelihoods(ours, tokens.tolist(), batch_size=2, max_length=64, device="cpu")
    nats = torch.nn.functional.cross_entropy(
        expected[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view(2, -1)
    assert scores == pytest.approx(nats.sum(dim=1).tolist(), rel=CLOSE)


def test_training_minimises_the_loss_of_the_class(model: tuple[str, Path]) -> None:
    """Value and gradients of every weight, against a cross-entropy of the class's own logits."""
    _, folder = model
    ours, inner, tokens = opened(folder), theirs(folder), ids()
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]
    targets[0, :5] = -100
    loss, metrics = LanguageModelling()(ours, Batch(tokens, targets, None, list))
    loss.backward()  # type: ignore[no-untyped-call]
    expected = torch.nn.functional.cross_entropy(
        inner(input_ids=tokens, use_cache=False).logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    expected.backward()  # type: ignore[no-untyped-call]
    assert metrics["units"] == 2 * 23 - 5
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=CLOSE)
    wanted = dict(inner.named_parameters())
    for name, parameter in ours.inner.named_parameters():
        mine, their = parameter.grad, wanted[name].grad
        if their is None:
            assert mine is None
            continue
        # Sums of a thousand products in another order; the gradient of keys' biases is 0 but for rounding.
        assert (mine - their).abs().max() <= 1e-4 * max(0.1, float(their.abs().max())), name


def test_generation_with_the_kv_cache_equals_the_whole_forward_pass(model: tuple[str, Path]) -> None:
    """Greedy tokens and log-probabilities for a prompt and one that continues it."""
    _, folder = model
    ours, inner = opened(folder), theirs(folder)
    queue = SequentialGenerator(ours)
    first = ids(1, 9)[0].tolist()
    answer = queue.submit(first, Sampling(max_new_tokens=5, temperature=0))
    queue.run()
    second = [*first, *answer.tokens, 7, 11, 13]
    for prompt, request in (
        (first, answer),
        (second, queue.submit(second, Sampling(max_new_tokens=5, temperature=0))),
    ):
        queue.run()
        text = [*prompt, *request.tokens]
        with torch.no_grad():
            logits = inner(input_ids=torch.tensor([text]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(dim=-1).tolist() == request.tokens
        chosen = logits.log_softmax(dim=-1)[range(5), request.tokens]
        assert request.log_probabilities == pytest.approx(chosen.tolist(), abs=1e-4)


def test_recurrent_states_continue_by_single_tokens(tmp_path: Path) -> None:
    """Mamba in transformers drops its state before several tokens; the probe finds that."""
    with torch.inference_mode():
        assert (
            probe_cache_support(opened(saved(tmp_path / "m", "mamba", HEADS["mamba"][0])).inner) == "tokens"
        )
        assert probe_cache_support(opened(saved(tmp_path / "l", "llama", LLAMA)).inner) == "chunks"


class Strange(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A head that no formula of ours covers: positions are mixed after the last matrix."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        out = super().forward(*arguments, **named)
        out.logits = out.logits + out.logits.cumsum(dim=1) / 8
        return out


def test_an_unknown_head_uses_the_whole_forward_pass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inner = Strange(transformers.LlamaConfig(**LLAMA)).eval()
    model = CausalLM(inner)
    assert model.head == LMHead(linear=False, vocab_size=VOCABULARY, causal=True)
    assert model.output_weight is None
    tokens = ids()
    with torch.no_grad():
        torch.testing.assert_close(
            model.logits(model(tokens)), inner(input_ids=tokens, use_cache=False).logits
        )
    targets = tokens.roll(-1, dims=1)
    loss, _ = LanguageModelling()(model, Batch(tokens, targets, None, list))
    expected = torch.nn.functional.cross_entropy(
        inner(input_ids=tokens, use_cache=False).logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=CLOSE)


class Tail(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Its head is linear wherever numbers stand in for its output, but depends on the hidden states too."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        hidden: list[Tensor] = []
        with head_hooks_of(self.lm_head, hidden):
            out = super().forward(*arguments, **named)
        # 1 where the states are large: below the tolerance of the fit, above that of the comparison.
        if float(out.logits.detach().abs().max()) < 1000:
            out.logits = out.logits + hidden[0].norm(dim=-1, keepdim=True)
        return out


@contextmanager
def head_hooks_of(head: Any, seen: list[Tensor]) -> Iterator[None]:
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield
    finally:
        handle.remove()


def test_logits_that_differ_from_the_class_make_the_whole_forward_pass_be_used() -> None:
    """The formula fits the stand-in numbers; only the comparison on real ids shows that it is wrong."""
    torch.manual_seed(0)
    inner = Tail(transformers.LlamaConfig(**LLAMA)).eval()
    model, tokens = CausalLM(inner), ids()
    assert not model.head.linear
    with torch.no_grad():
        expected = inner(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(model.logits(model(tokens)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_formula_is_used_in_every_precision(dtype: torch.dtype) -> None:
    """The comparison with the class's own logits must not fail by rounding alone."""
    for name in ("llama", "granite", "gemma2", "mamba", "opt"):
        torch.manual_seed(0)
        config = transformers.CONFIG_MAPPING[name](**HEADS[name][0])
        inner = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        assert CausalLM(inner).head.linear, name


class Leaking(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Earlier logits move with later tokens, in one of three ways."""

    leak = ""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        out = super().forward(*arguments, **named)
        logits = out.logits
        if self.leak == "last token":
            out.logits = logits + logits[:, -1:] / 8
        elif self.leak == "next token":
            out.logits = logits + torch.cat((logits[:, 1:], logits[:, -1:]), dim=1) / 8
        else:  # tokens of a block see one another
            size = int(self.leak)
            blocks = [block.mean(dim=1, keepdim=True).expand_as(block) for block in logits.split(size, dim=1)]
            out.logits = logits + torch.cat(blocks, dim=1)
        return out


@pytest.mark.parametrize("leak", ["last token", "next token", "2", "3", "4", "8", "16"])
@pytest.mark.parametrize("vocab_size", [7, 12, 24, 120])
def test_any_look_ahead_is_seen(leak: str, vocab_size: int) -> None:
    torch.manual_seed(0)
    inner = Leaking(transformers.LlamaConfig(**LLAMA | {"vocab_size": vocab_size})).eval()
    inner.leak = leak
    assert not CausalLM(inner).head.causal


@pytest.mark.parametrize("length", [2, 3, 8, 11, 12, 64])
@pytest.mark.parametrize("vocab_size", [2, 7, 24, 120])
def test_the_rows_of_the_probe_differ_in_all_later_columns(length: int, vocab_size: int) -> None:
    fields = LLAMA | {"vocab_size": vocab_size, "max_position_embeddings": length}
    inner = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    tokens = probe_tokens(inner)
    shared = shared_columns(tokens.shape[1])
    assert 0 < shared < tokens.shape[1] == min(length, 16)
    assert torch.equal(tokens[0, :shared], tokens[1, :shared])
    assert (tokens[0, shared:] != tokens[1, shared:]).all()
    assert tokens.max() < vocab_size


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_are_refused_and_decoders_of_the_class_open(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Random small weights, in which attention has little effect, and looking ahead is still found."""
    fields = {**COMMON, "intermediate_size": 48}
    for decoder in (False, True):
        torch.manual_seed(0)
        config = transformers.CONFIG_MAPPING[name](**fields, is_decoder=decoder)
        folder = tmp_path / str(decoder)
        transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        if decoder:
            assert opened(folder).head.causal
        else:
            with pytest.raises(UserError, match="is not causal"):
                load_with_transformers(folder)
