"""Log-probabilities over shared prompts equal those of separate rows and of transformers, gradients too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from koine.align import completion_log_probabilities
from koine.align.log_probabilities import token_log_probabilities
from koine.data.groups import GroupBatch
from koine.model.attention.segments import SegmentContext
from koine.model.decoder import Decoder
from koine.model.language_model import LanguageModel
from tests.train.models import small_model

from .group_batches import batch_of, conversations, mixed_batch, pair, revised, weights_of

transformers = pytest.importorskip("transformers", reason="the comparison needs the extra [hf]")
from koine.model.causal_lm import CausalLM  # noqa: E402
from koine.model.formats.directory import load_model  # noqa: E402
from tests.model.families.cases import CASES, VOCABULARY, WINDOW, Case  # noqa: E402
from tests.model.families.reference import open_reference, reference_logits, write_checkpoint  # noqa: E402

FLOAT32 = 1e-5
"""Largest error, relative to the largest value of a tensor."""


def error_of(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    return float((got - expected).abs().max()) / max(float(expected.abs().max()), floor, 1e-30)


@pytest.fixture(scope="module", params=CASES, ids=str)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case = request.param
    return case, write_checkpoint(case, tmp_path_factory.mktemp("family"))


def of_transformers(model: Any, batch: GroupBatch) -> Tensor:
    """Return the sums of log-probabilities by the class of `transformers`, one conversation at a time."""
    sums = []
    for ids, counted in conversations(batch):
        logs = torch.log_softmax(reference_logits(model, ids).double(), dim=-1)
        sums.append(sum(logs[position - 1, ids[position]] for position in counted))
    return torch.stack([torch.as_tensor(one) for one in sums])


def with_gradients(model: LanguageModel, batch: GroupBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sums, and the gradients of a weighted sum of them."""
    model.zero_grad()
    sums = completion_log_probabilities(model, batch).sums
    (sums * weights_of(batch.completions)).sum().backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return sums.detach(), gradients


def check_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    most = max(float(one.abs().max()) for one in expected.values())
    assert most > 0
    for name, gradient in expected.items():
        # The bias of a key has a gradient of zero without RoPE: softmax ignores it.
        assert error_of(got[name], gradient, floor=0.01 * most) <= tolerance, name


def test_sharing_equals_separate_rows_and_transformers(opened: tuple[Case, Path]) -> None:
    """Conversations are longer and shorter than the context of the cases whose RoPE depends on their length."""
    _, folder = opened
    model = load_model(folder)
    assert isinstance(model, Decoder)
    batch = mixed_batch(VOCABULARY)
    sums, gradients = with_gradients(model, batch)
    apart, apart_gradients = with_gradients(model, batch.separate())
    expected = of_transformers(open_reference(folder), batch)
    assert error_of(sums, expected) <= FLOAT32
    assert error_of(apart, expected) <= FLOAT32
    assert error_of(sums, apart) <= FLOAT32
    check_gradients(gradients, apart_gradients, 1e-4)


@pytest.mark.parametrize("window", [None, 3, WINDOW])
def test_windows_count_positions_of_the_conversation(window: int | None) -> None:
    """The second answer stands far from its prompt in the row, and sees as much of it as the first."""
    from koine.model.config import ModelConfig, hybrid_layers

    torch.manual_seed(0)
    layers = hybrid_layers(3, window=window or 64, full_every=9)
    model = Decoder(
        ModelConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            layers=layers,
        )
    )
    assert {layer.window for layer in model.config.layers} == {window or 64}
    same = batch_of([[pair(6, 9, 9)]], 24, 64)
    # Both answers are made equal: they must be exactly as probable.
    same.tokens[0, 15:24] = same.tokens[0, 6:15]
    same.predicted[:] = same.tokens.flatten()[same.predicted_at]
    first, second = completion_log_probabilities(model, same).sums.tolist()
    assert second == pytest.approx(first, rel=1e-6)
    # A token of the prompt that is out of the window of all answers changes nothing through one layer.
    changed = copy.deepcopy(same)
    changed.tokens[0, 0] = (changed.tokens[0, 0] + 1) % 64
    model.blocks = model.blocks[:1]
    model.config = _first_layer(model.config)
    before, after = (token_log_probabilities(model, one) for one in (same, changed))
    # Position 5 predicts the first answer token; a window of 3 sees positions 3 to 5.
    seen = window is None or window > 5
    assert bool((before[0] - after[0]).abs() > 1e-6) == seen
    assert bool((before[-1] - after[-1]).abs() > 1e-6) == (window is None)


def _first_layer(config: Any) -> Any:
    import dataclasses

    return dataclasses.replace(config, layers=config.layers[:1])


def test_lengths_count_and_means_divide() -> None:
    batch = mixed_batch(64)
    found = completion_log_probabilities(small_model(), batch)
    lengths = [len(counted) for _, counted in conversations(batch)]
    # The last token of a longer completion does not count (see `RandomSource.mask`).
    assert lengths[:4] == [6, 3, 1, 4]
    assert found.lengths.tolist() == lengths
    assert torch.equal(found.means, found.sums / torch.tensor(lengths))
    tokens = token_log_probabilities(small_model(), batch).detach()
    for number, total in enumerate(found.sums.tolist()):
        assert float(tokens[batch.completion_of == number].sum()) == pytest.approx(total, rel=1e-6)


def test_chunks_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import koine.align.log_probabilities as module

    batch, model = mixed_batch(64), small_model()
    whole, gradients = with_gradients(model, batch)
    monkeypatch.setattr(module, "default_chunk", lambda *shape: 4)
    parts, in_chunks = with_gradients(model, batch)
    assert error_of(parts, whole) <= 1e-6
    check_gradients(in_chunks, gradients, 1e-5)


def test_gradients_equal_differences_in_float64() -> None:
    """The hand-written backward pass of the head, soft cap and scale included, against finite differences."""
    from koine.align.log_probabilities import _ChunkedLogProbabilities

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(11, 5, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.tensor([0, 10, 3, 3, 7, 1, 2])
    for cap in (None, 1.5):
        assert torch.autograd.gradcheck(
            lambda h, w, cap=cap: _ChunkedLogProbabilities.apply(h, w, targets, 0.7, cap, 3), (hidden, weight)
        )


# bfloat16 has 8 bits: logits of a few nats are off by hundredths, and a sum over at most 6 tokens by tenths.
def test_bfloat16_is_near_float32() -> None:
    batch = mixed_batch(64)
    exact = completion_log_probabilities(small_model(), batch).sums.detach()
    model = small_model().to(torch.bfloat16)
    shared = completion_log_probabilities(model, batch).sums
    apart = completion_log_probabilities(model, batch.separate()).sums
    assert shared.dtype == torch.float32
    for found in (shared, apart):
        assert float((found.detach() - exact).abs().max()) < 0.15
        assert float((found.detach() - exact).abs().max()) > 0


@pytest.mark.parametrize(
    "case", [one for one in CASES if one.model_type in ("gemma2", "cohere2", "mixtral")], ids=str
)
def test_the_mask_of_accelerators_equals_the_kernels_of_the_cpu(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(case, tmp_path / "m")
    model, batch = load_model(folder), mixed_batch(VOCABULARY)
    assert isinstance(model, Decoder)
    sums, gradients = with_gradients(model, batch)

    def with_mask(self: SegmentContext, window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend_with_mask(window, q, k, v)

    monkeypatch.setattr(SegmentContext, "_attend_by_segment", with_mask)
    masked, masked_gradients = with_gradients(model, batch)
    assert error_of(masked, sums) <= FLOAT32
    check_gradients(masked_gradients, gradients, 1e-4)


def test_gradient_checkpointing_changes_nothing() -> None:
    batch, model = mixed_batch(64), small_model().train()
    sums, gradients = with_gradients(model, batch)
    model.gradient_checkpointing = True
    again, with_checkpoints = with_gradients(model, batch)
    assert torch.equal(again, sums)
    for name, gradient in gradients.items():
        assert torch.equal(with_checkpoints[name], gradient), name


OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "phi": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_take_separate_rows(name: str) -> None:
    """Position embeddings that are learnt, a state in place of attention, a head with a bias (phi)."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **OTHERS[name]
    )
    inner = transformers.AutoModelForCausalLM.from_config(config).eval()
    model, batch = CausalLM(inner), mixed_batch(VOCABULARY)
    sums, gradients = with_gradients(model, batch)
    weights = weights_of(batch.completions)
    expected = []
    total = torch.zeros(())
    inner.zero_grad()
    for weight, (ids, counted) in zip(weights, conversations(batch), strict=True):
        logs = torch.log_softmax(inner(torch.tensor([ids])).logits[0], dim=-1)
        of_this = torch.stack([logs[position - 1, ids[position]] for position in counted]).sum()
        expected.append(of_this.detach())
        total = total + weight * of_this
    total.backward()
    assert error_of(sums, torch.stack(expected)) <= FLOAT32
    theirs = {f"inner.{key}": one.grad for key, one in inner.named_parameters() if one.grad is not None}
    check_gradients(gradients, theirs, 1e-4)


def test_padding_and_neighbours_do_not_matter() -> None:
    model = small_model()
    tree, other = pair(9, 5, 3), revised(3, 2, 4, 2)
    alone = completion_log_probabilities(model, batch_of([[tree]], 17, 64)).sums
    beside = completion_log_probabilities(model, batch_of([[tree, other], [other]], 50, 64)).sums
    assert error_of(beside[:2], alone) <= FLOAT32
