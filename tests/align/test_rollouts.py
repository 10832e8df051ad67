"""Rollouts: the engine's log-probabilities are the trainer's, and a killed draw is repeated exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.align.log_probabilities import token_log_probabilities
from koine.align.online_groups import group_batch, rollout_groups
from koine.align.prompts import encode_prompts
from koine.align.rollouts import Rollout, read_rollouts, rollouts
from koine.align.sampler import inference_copy
from koine.errors import UserError
from koine.generate.request import new_request, sample_next
from koine.generate.sampling import Sampling
from koine.model.causal_lm import CausalLM
from koine.model.decoder import Decoder
from koine.tokenizer import Tokenizer, load_tokenizer
from tests.align.world import VOCABULARY, model_of, write_tokenizer
from tests.data.conftest import document

RECORDS: list[dict[str, Any]] = [
    {"id": f"p{number}", "language": "en", "prompt": document(number, 3 + 2 * number)} for number in range(3)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("rollouts") / "tokenizer"))


def endless(model: Decoder) -> Decoder:
    """Let no token end a completion, so that all have the same length."""
    with torch.no_grad():
        model.embedding.weight[:10] = 0
    return model


def of_transformers() -> CausalLM:
    """Return a small model of `transformers` that our decoder does not compute."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        hidden_dropout=0.1,
    )
    torch.manual_seed(3)
    model = transformers.GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return CausalLM(model)


def trainer_gap(model: Any, found: list[Rollout], tokenizer: Tokenizer, temperature: float) -> float:
    """Return the greatest |log-ratio| of engine to trainer, summed over the tokens of a completion."""
    prompts = encode_prompts(RECORDS, tokenizer)
    scored = [replace(one, score=float(one.sample)) for one in found]
    batch = group_batch([rollout_groups(prompts, scored, kind="scored")])
    own = token_log_probabilities(model, batch, temperature=temperature).double()
    engine = torch.tensor([value for one in found for value in one.log_probabilities]).double()
    gaps = torch.zeros(batch.completions, dtype=torch.float64)
    return float(gaps.index_add(0, batch.completion_of, (own - engine).detach()).abs().max())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_and_trainer_agree_over_256_tokens(
    tokenizer: Tokenizer, tmp_path: Path, temperature: float
) -> None:
    model = endless(model_of()).train()
    sampling = Sampling(temperature=temperature, max_new_tokens=256)
    found = rollouts(model, RECORDS, tokenizer=tokenizer, k=2, sampling=sampling, seed=1, out=tmp_path)
    assert [len(one.tokens) for one in found] == [256] * 6
    assert trainer_gap(model, found, tokenizer, temperature) <= 1e-4
    # A trainer of the distribution before the temperature would be far away.
    if temperature != 1.0:
        assert trainer_gap(model, found, tokenizer, 1.0) > 1.0


def test_a_model_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = of_transformers()
    sampling = Sampling(temperature=0.8, max_new_tokens=24)
    found = rollouts(model, RECORDS, tokenizer=tokenizer, k=2, sampling=sampling, seed=1, out=tmp_path)
    model.eval()
    assert trainer_gap(model, found, tokenizer, 0.8) <= 1e-4


def test_the_copy_is_refreshed_and_the_model_can_still_train(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    more: dict[str, Any] = {
        "tokenizer": tokenizer,
        "k": 2,
        "sampling": Sampling(temperature=1.0, max_new_tokens=8),
    }
    first = rollouts(model, RECORDS, seed=1, out=tmp_path / "first", **more)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    scored = [replace(one, score=float(one.sample)) for one in first]
    batch = group_batch([rollout_groups(encode_prompts(RECORDS, tokenizer), scored, kind="scored")])
    token_log_probabilities(model, batch).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    # The same folder: what was drawn by other weights is drawn again.
    second = rollouts(model, RECORDS, seed=1, out=tmp_path / "first", **more)
    fresh = rollouts(model, RECORDS, seed=1, out=tmp_path / "second", **more)
    assert second == fresh != first


def test_files_are_read_again_and_a_lost_one_is_drawn_bit_for_bit(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koine.align.rollouts.PROMPTS_OF_FILE", 2)
    model = model_of()
    more: dict[str, Any] = {
        "tokenizer": tokenizer,
        "k": 3,
        "sampling": Sampling(temperature=1.0, max_new_tokens=12),
        "seed": 4,
        "out": tmp_path / "run",
    }
    whole = rollouts(model, RECORDS, **more)
    files = sorted((tmp_path / "run").iterdir())
    assert [file.name for file in files] == ["prompts-000000-000002.parquet", "prompts-000002-000003.parquet"]
    content = files[1].read_bytes()
    files[1].unlink()
    assert rollouts(model, RECORDS, **more) == whole
    assert files[1].read_bytes() == content
    monkeypatch.setattr("koine.align.rollouts.sample", None)
    assert rollouts(model, RECORDS, **more) == whole
    assert read_rollouts(files[0]) == whole[:6]


def test_seeds_differ_by_prompt_sample_step_and_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, same = model_of(), [{**RECORDS[0], "id": name} for name in "ab"]
    sampling = Sampling(temperature=1.0, max_new_tokens=12)
    found = [
        one.tokens
        for number, (seed, step) in enumerate([(1, 0), (1, 1), (2, 0)])
        for one in rollouts(
            model,
            same,
            tokenizer=tokenizer,
            k=2,
            sampling=sampling,
            seed=seed,
            step=step,
            out=tmp_path / str(number),
        )
    ]
    assert len(set(found)) == len(found) == 12


def test_bad_input(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of()
    more: dict[str, Any] = {"tokenizer": tokenizer, "k": 2, "seed": 1, "out": tmp_path / "run"}
    with pytest.raises(UserError, match="context"):
        rollouts(model, RECORDS, sampling=Sampling(max_new_tokens=10**6), **more)
    with pytest.raises(UserError, match="stop strings"):
        rollouts(model, RECORDS, sampling=Sampling(stop=("x",)), **more)
    assert not (tmp_path / "run").exists()
    sampling = Sampling(temperature=1.0, max_new_tokens=4)
    rollouts(model, RECORDS, sampling=sampling, **more)
    [file] = (tmp_path / "run").iterdir()
    file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="Parquet"):
        rollouts(model, RECORDS, sampling=sampling, **more)


def test_prepacking_leaves_the_model_as_it_is() -> None:
    model = model_of()
    copied = inference_copy(model)
    assert isinstance(copied, Decoder)
    # Where this processor has a faster layout, the copy has it and the model has not.
    assert model.packed_head is None
    tokens = torch.randint(10, VOCABULARY, (1, 9))
    with torch.inference_mode():
        expected = model.logits(model(tokens))
        assert torch.allclose(copied.logits(copied(tokens)), expected, atol=1e-4)


def test_recorded_log_probabilities_have_no_bias_with_a_large_vocabulary() -> None:
    """Rounding errors of a sum over the vocabulary would add up over the tokens of a completion."""
    torch.manual_seed(0)
    logits = 8 * torch.randn(64, 49_152)
    sampling = Sampling(temperature=0.8, seed=0)
    requests = [
        new_request([1], replace(sampling, seed=seed), vocabulary=49_152, device=torch.device("cpu"))
        for seed in range(64)
    ]
    for request in requests:
        request.tempered = True
    found = [one for one in sample_next(requests, logits) if not isinstance(one, Exception)]
    exact = (logits.double() / 0.8).log_softmax(dim=-1)
    errors = [value - float(exact[row, token]) for row, (token, value) in enumerate(found)]
    assert abs(sum(errors)) / len(errors) < 2e-6
