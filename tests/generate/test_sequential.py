"""Models of Cohere, Llama, Qwen and Gemma in every step that takes a model, against transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from koine.cli.main import cli
from koine.errors import UserError
from koine.evaluate.runner import evaluate_model
from koine.generate import LocalEngine, Sampling
from koine.model import CausalLM, Decoder, load_causal_lm
from koine.model.adapt.vocabulary_transfer import match_tokenizers
from koine.tokenizer import load_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers", reason="the classes need the extra [hf]")

# float32, sums of some hundred terms in another order.
FLOAT32 = 1e-5
TEXT = "Ein Fluss fließt, a river runs, une rivière coule; नदी बहती है। 12 345"
OTHER = "Das Wetter ist heute schön, the weather is fine, il fait beau; मौसम अच्छा है।"

# Windows, where a class has them, are shorter than the texts. Sizes that a class takes beyond those of all.
OWN: dict[str, dict[str, Any]] = {
    "Cohere": {"logit_scale": 0.5},
    "Cohere with biases": {"logit_scale": 0.5, "attention_bias": True},
    "Cohere2": {"logit_scale": 0.5, "sliding_window": 7, "head_dim": 8},
    "Llama": {"tie_word_embeddings": False},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {
        "head_dim": 8,
        "sliding_window": 7,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
    },
    "Gemma3Text": {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8},
}


def tokenizer_folder(folder: Path, text: str) -> Path:
    tokenizer = train_tokenizer(
        {"de": lambda: [text] * 4}, vocab_size=330, scheme="natural", english_share=None, min_frequency=1
    )
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module", params=OWN)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `save_pretrained` leaves it, with random weights and a tokenizer beside them."""
    name: str = request.param
    folder = tmp_path_factory.mktemp(name.partition(" ")[0])
    tokenizer = load_tokenizer(tokenizer_folder(folder, TEXT))
    config = getattr(transformers, f"{name.partition(' ')[0]}Config")(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        **OWN[name],
    )
    torch.manual_seed(0)
    inner = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in inner.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) / 2)
    inner.save_pretrained(folder)
    return folder


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(folder: Path, ids: list[int]) -> Tensor:
    """Ours, `[time, vocab]`."""
    opened = load_causal_lm(folder)
    assert isinstance(opened, Decoder | CausalLM)
    with torch.no_grad():
        return opened.logits(opened(torch.tensor([ids])))[0]


def test_logits(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode_document(TEXT)
    assert len(ids) > 20
    assert isinstance(load_causal_lm(model), Decoder)
    with torch.no_grad():
        expected = theirs(model)(torch.tensor([ids])).logits[0]
    assert (logits(model, ids) - expected).abs().max() <= FLOAT32


def test_evaluate(model: Path, tmp_path: Path) -> None:
    """Bits per byte is transformers' own loss over the text's bytes."""
    data = tmp_path / "text.jsonl"
    texts = [TEXT, OTHER, "a"]
    data.write_text("".join(json.dumps({"text": text, "language": "de"}) + "\n" for text in texts))
    measured = evaluate_model(model, data=[data])["overall"]
    tokenizer, inner, nats = load_tokenizer(model), theirs(model), 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
        with torch.no_grad():
            nats += float(inner(ids, labels=ids).loss) * (ids.shape[1] - 1)
    size = sum(len(text.encode()) for text in texts)
    assert measured["bytes"] == size
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_evaluate_reads_the_context_and_the_vocabulary(model: Path, tmp_path: Path) -> None:
    """A text longer than the context is scored in windows; another model's tokenizer is refused."""
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": OTHER * 8, "language": "de"}) + "\n")
    assert len(load_tokenizer(model).encode(OTHER * 8)) > 256
    whole = evaluate_model(model, data=[data])["overall"]["bits_per_byte"]
    assert whole == evaluate_model(model, data=[data], max_length=256)["overall"]["bits_per_byte"]
    mixed = tmp_path / "mixed"
    theirs(model).save_pretrained(mixed)
    large = train_tokenizer(
        {"de": lambda: [OTHER, TEXT] * 4},
        vocab_size=380,
        scheme="natural",
        english_share=None,
        min_frequency=1,
    )
    large.save(mixed)
    with pytest.raises(UserError, match="the tokenizer has 380 ids and the model 330"):
        evaluate_model(mixed, data=[data])


def test_generation(model: Path) -> None:
    """The chat engine's greedy tokens, with its caches, are those of `generate`."""
    engine = LocalEngine(model)
    conversations = [[{"role": "user", "content": text}] for text in (TEXT, "नदी")]
    answers = engine.generate(conversations, Sampling(temperature=0, max_new_tokens=24))
    inner = theirs(model)
    for conversation, answer in zip(conversations, answers, strict=True):
        prompt = engine.encode(conversation)
        out = inner.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=sorted(engine.stop_ids)
        )
        assert list(answer.tokens) == out[0, len(prompt) :].tolist()


def test_adapt(model: Path, tmp_path: Path) -> None:
    """After a change of tokenizer, the model scores tokens of both vocabularies exactly as before."""
    target = tokenizer_folder(tmp_path / "target", OTHER)
    moved = tmp_path / "moved"
    arguments = ["tokenizer", "adapt", str(model), "--tokenizer", str(target), "--out", str(moved)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    shared = match_tokenizers(model, target).shared
    new, old = torch.tensor(list(shared)), torch.tensor(list(shared.values()))
    assert len(new) >= 256
    order = torch.randperm(len(new))[:30]
    before = logits(model, old[order].tolist())[:, old]
    after = logits(moved, new[order].tolist())[:, new]
    assert (before - after).abs().max() <= FLOAT32
    tokenizer, inner = load_tokenizer(moved), theirs(moved)
    assert tokenizer.fingerprint == load_tokenizer(target).fingerprint
    config = inner.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    answer = LocalEngine(moved).generate(
        [[{"role": "user", "content": OTHER}]], Sampling(temperature=0, max_new_tokens=4)
    )
    assert len(answer[0].tokens) >= 1
