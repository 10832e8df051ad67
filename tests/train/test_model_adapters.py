"""Models of `transformers` in our loop: loss, files, resuming and gradient checkpointing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from koine.data import DataOrder, Mixture, Phase, Source
from koine.errors import UserError
from koine.model.causal_lm import CausalLM, load_causal_lm, load_with_transformers
from koine.model.packed_documents import DocumentIsolation
from koine.train import LanguageModelling, TrainSettings, train

from .tokens import write_tokens

transformers = pytest.importorskip("transformers", reason="other architectures need the extra [hf]")

SETTINGS = TrainSettings(
    dtype="float32", threads=1, learning_rate=3e-3, schedule="constant", checkpoint_every=4
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def llama(*, tied: bool = False) -> CausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=350,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    return CausalLM(transformers.LlamaForCausalLM(config))


def gpt2() -> CausalLM:
    """A model with learned positions, biases and dropout: a resumed run must draw the same random numbers."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=350, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    assert config.resid_pdrop > 0.0
    return CausalLM(transformers.GPT2LMHeadModel(config))


def order(shards: dict[str, Path], steps: int = 12, **fields: Any) -> DataOrder:
    source = Source(name="short", path=shards["short"], proportion=1.0, max_epochs=99.0)
    phase = Phase(name="p", steps=steps, sources=(source,))
    more = {"sequence_length": 48, "batch_size": 4, "packing": "one_per_row", **fields}
    return DataOrder(Mixture(phases=(phase,), **more))


def run(
    out: Path, model: CausalLM, data: DataOrder, settings: TrainSettings = SETTINGS, **more: Any
) -> CausalLM:
    train(model, LanguageModelling(), data, settings, out=out, progress=False, device="cpu", **more)
    return model


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("tied", [False, True])
def test_trains_and_opens_in_transformers(
    made: tuple[Path, dict[str, Path]], tied: bool, tmp_path: Path
) -> None:
    tokenizer, shards = made
    data, model = order(shards), llama(tied=tied)
    batch = data.batch(0)
    with torch.no_grad():
        first = model.inner(
            input_ids=batch.tokens,
            attention_mask=(batch.document_ids >= 0).long(),
            labels=batch.tokens.masked_fill(batch.document_ids < 0, -100),
        ).loss
    run(tmp_path / "o", model, data, tokenizer=tokenizer)
    found = losses(tmp_path / "o")
    assert found[0] == pytest.approx(float(first), rel=1e-5)
    assert found[-1] < found[0] - 0.3
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o").eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(theirs(batch.tokens).logits, model.eval().inner(batch.tokens).logits)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "o").vocab_size == 350
    about = json.loads((tmp_path / "o" / "training.json").read_text())
    assert about["identity"]["model"]["model_type"] == "llama"
    assert not (tmp_path / "o" / "checkpoints").exists()
    # A complete folder opens again, and goes on in another.
    again = load_with_transformers(tmp_path / "o")
    run(tmp_path / "next", again, order(shards, 2))
    assert losses(tmp_path / "next")[0] < found[0] - 0.3


# Sizes and settings that a class takes beyond those of all; windows are shorter than the rows.
CLASSES: dict[str, dict[str, Any]] = {
    "Cohere": {"logit_scale": 0.5, "attention_bias": True},
    "Cohere2": {"logit_scale": 0.5, "head_dim": 8, "sliding_window": 7, "attention_bias": True},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {
        "head_dim": 8,
        "sliding_window": 7,
        "query_pre_attn_scalar": 8,
        "attn_implementation": "eager",
    },
    "Gemma3": {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8},
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_trains_and_opens_again(
    made: tuple[Path, dict[str, Path]], name: str, tmp_path: Path
) -> None:
    """The loss is its own, a step changes every tensor, and its own files have the trained weights."""
    torch.manual_seed(0)
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))(
        vocab_size=350,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **CLASSES[name],
    )
    model = CausalLM(transformers.AutoModelForCausalLM.from_config(config))
    before = {key: tensor.detach().clone() for key, tensor in model.named_parameters()}
    tokenizer, shards = made
    data = order(shards, 1)
    batch = data.batch(0)
    with torch.no_grad():
        expected = model.inner(
            input_ids=batch.tokens,
            attention_mask=(batch.document_ids >= 0).long(),
            labels=batch.tokens.masked_fill(batch.document_ids < 0, -100),
        ).loss
    run(tmp_path / "o", model, data, tokenizer=tokenizer)
    assert losses(tmp_path / "o") == pytest.approx([float(expected)], rel=1e-5)
    assert all(not torch.equal(tensor, before[key]) for key, tensor in model.named_parameters())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o").eval()
    assert type(theirs) is type(model.inner)
    with torch.no_grad():
        assert torch.equal(theirs(batch.tokens).logits, model.eval().inner(batch.tokens).logits)
    assert load_causal_lm(tmp_path / "o") is not None


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(("make", "dtype"), [(llama, "float32"), (llama, "bfloat16"), (gpt2, "float32")])
def test_resumes_to_the_same_bits(
    made: tuple[Path, dict[str, Path]], make: Callable[[], CausalLM], dtype: Any, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, dtype=dtype, evaluate_every=1)

    def evaluate(model: nn.Module, done: int) -> dict[str, float]:
        if done == 6 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise StoppedError
        return {}

    data = order(made[1], 8)
    with pytest.raises(StoppedError):
        run(tmp_path / "o", make(), data, settings, evaluate=evaluate)
    resumed = run(tmp_path / "o", make(), data, settings, evaluate=evaluate)
    whole = run(tmp_path / "w", make(), data, settings)
    for name, tensor in whole.named_parameters():
        assert tensor.dtype == torch.float32
        assert torch.equal(dict(resumed.named_parameters())[name], tensor)
    assert losses(tmp_path / "o") == losses(tmp_path / "w")
    assert (tmp_path / "o" / "model.safetensors").read_bytes() == (
        tmp_path / "w" / "model.safetensors"
    ).read_bytes()


def test_gradient_checkpointing_is_theirs_and_changes_nothing(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    def counted() -> tuple[CausalLM, list[int]]:
        model, calls = llama(), []
        model.inner.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        return model, calls

    (plain, once), (again, twice) = counted(), counted()
    run(tmp_path / "a", plain, order(made[1], 3))
    run(tmp_path / "b", again, order(made[1], 3), replace(SETTINGS, gradient_checkpointing=True))
    # Three steps, and each of them once more; both models also tried out their head, once.
    assert len(twice) - len(once) == 3
    for name, tensor in plain.named_parameters():
        torch.testing.assert_close(dict(again.named_parameters())[name], tensor, rtol=1e-5, atol=1e-5)


def opt() -> CausalLM:
    """A class whose masks `transformers` does not make of positions."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=350, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0,
    )  # fmt: skip
    return CausalLM(transformers.OPTForCausalLM(config))


def gemma3() -> CausalLM:
    """Windows shorter than the documents."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=350, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **CLASSES["Gemma3"],
    )  # fmt: skip
    return CausalLM(transformers.AutoModelForCausalLM.from_config(config))


def mamba() -> CausalLM:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=350, hidden_size=32, num_hidden_layers=2, state_size=8)
    return CausalLM(transformers.MambaForCausalLM(config))


def losses_in_plain_transformers(inner: Any, data: DataOrder, steps: int) -> list[float]:
    """Train with the library alone, each document computed in a row of its own."""
    optimiser = torch.optim.AdamW(inner.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    found = []
    for step in range(steps):
        batch = data.batch(step)
        units = int((batch.targets != -100).sum())
        total = 0.0
        optimiser.zero_grad()
        for row, spans in enumerate(batch.documents):
            for span in spans:
                columns = slice(span.column, span.column + span.end - span.start)
                logits = inner(input_ids=batch.tokens[row : row + 1, columns], use_cache=False).logits[0]
                targets = batch.targets[row, columns]
                loss = (
                    nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / units
                )
                loss.backward()
                total += float(loss.detach())
        nn.utils.clip_grad_norm_(inner.parameters(), 1.0)
        optimiser.step()
        found.append(total)
    return found


@pytest.mark.parametrize("packing", ["concat", "no_split"])
@pytest.mark.parametrize("make", [llama, gemma3, opt])
def test_packed_rows_train_as_documents_alone_in_plain_transformers(
    made: tuple[Path, dict[str, Path]], make: Callable[[], CausalLM], packing: str, tmp_path: Path
) -> None:
    data = order(made[1], 6, packing=packing, sequence_length=64)
    assert any(len(spans) > 1 for spans in data.batch(0).documents)
    settings = replace(SETTINGS, weight_decay=0.0, micro_batch_size=2)
    run(tmp_path / "o", make(), data, settings)
    expected = losses_in_plain_transformers(make().inner.train(), data, 6)
    assert losses(tmp_path / "o") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("packing", ["concat", "no_split"])
def test_a_class_with_a_state_is_refused_before_the_first_step(
    made: tuple[Path, dict[str, Path]], packing: str, tmp_path: Path
) -> None:
    says = (
        r"MambaForCausalLM cannot keep the documents of a row apart: a document changes the logits of the "
        r"next one; choose --packing one_per_row"
    )
    with pytest.raises(UserError, match=says):
        run(tmp_path / "o", mamba(), order(made[1], 2, packing=packing))
    assert not (tmp_path / "o").exists()
    run(tmp_path / "x", mamba(), order(made[1], 2, packing=packing, cross_document_attention=True))
    run(tmp_path / "y", mamba(), order(made[1], 2))
    assert len(losses(tmp_path / "x")) == len(losses(tmp_path / "y")) == 2


def test_a_resumed_training_tries_the_class_out_again(
    made: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of transformers may no longer keep documents apart."""

    def stop(model: nn.Module, done: int) -> dict[str, float]:
        raise StoppedError

    data = order(made[1], 8, packing="concat")
    settings = replace(SETTINGS, evaluate_every=5)
    with pytest.raises(StoppedError):
        run(tmp_path / "o", llama(), data, settings, evaluate=stop)
    assert (tmp_path / "o" / "checkpoints").exists()
    monkeypatch.setattr(
        "koine.model.causal_lm.inspect_isolation", lambda inner: DocumentIsolation(None, "it leaks")
    )
    with pytest.raises(UserError, match="LlamaForCausalLM cannot keep .* apart: it leaks"):
        run(tmp_path / "o", llama(), data, settings)
    monkeypatch.undo()
    resumed, whole = run(tmp_path / "o", llama(), data), run(tmp_path / "w", llama(), data)
    for name, tensor in whole.named_parameters():
        assert torch.equal(dict(resumed.named_parameters())[name], tensor)


def test_a_model_of_nobody_is_refused(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Linear is neither Koine's decoder nor a model of transformers"):
        run(tmp_path / "y", nn.Linear(2, 2), order(made[1], 2))  # type: ignore[arg-type]
