"""RoPE whose frequencies depend on the length of the text: greedy tokens are those of transformers' `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from koine.generate import Sampling, Scheduler
from koine.generate.cpu.prepacked_linear import can_prepack, prepack
from koine.model import Decoder, load_model
from koine.model.causal_lm import load_with_transformers
from koine.steps.training import extend_context
from tests.generate.prompts import prompt_of

transformers = pytest.importorskip("transformers", reason="the comparison needs the extra [hf]")

CONTEXT = 48
"""Length up to which the frequencies are those without scaling; longer than the shortest prefix kept."""
FACTOR = 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with dynamic scaling."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3, eos_token_id=None,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": FACTOR},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dynamic")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def expected(folder: Path, prompt: list[int], count: int) -> list[int]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([prompt])
    rows = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = rows[0, len(prompt) :].tolist()
    return tokens


def opened(folder: Path, packed: bool) -> Decoder:
    model = load_model(folder).eval()
    assert isinstance(model, Decoder)
    if packed and not can_prepack(model):
        pytest.skip("this build of torch packs no weights")
    return prepack(model) if packed else model


def logits_of_the_class(folder: Path, ids: list[int], **changes: Any) -> torch.Tensor:
    """Return the logits `[time, vocab]` of the class of `transformers`, with other RoPE parameters."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.rope_parameters = {**config.rope_parameters, **changes}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def logits_of_ours(model: Decoder, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(torch.tensor([ids])))[0]


def test_the_context_is_the_trained_one_times_the_factor(folder: Path) -> None:
    """A text of that length has the logits of the class."""
    model = opened(folder, False)
    assert model.config.max_position_embeddings == CONTEXT
    assert model.context_length == load_with_transformers(folder).context_length == CONTEXT * FACTOR
    ids = prompt_of(model.context_length, 4)
    torch.testing.assert_close(
        logits_of_ours(model, ids), logits_of_the_class(folder, ids), rtol=1e-4, atol=1e-4
    )


def test_a_longer_context_grows_the_factor(folder: Path) -> None:
    """A short text keeps its logits; those of a long one are the class's with the larger factor."""
    model = opened(folder, False)
    short, long = prompt_of(CONTEXT, 5), prompt_of(300, 6)
    before = logits_of_ours(model, short)
    extend_context(model, CONTEXT * 2, 0.0)
    assert model.context_length == CONTEXT * FACTOR
    extend_context(model, len(long), 0.0)
    assert model.context_length == len(long)
    assert torch.equal(logits_of_ours(model, short), before)
    expected = logits_of_the_class(folder, long, factor=len(long) / CONTEXT)
    torch.testing.assert_close(logits_of_ours(model, long), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_prompts_within_and_beyond_the_context(folder: Path, packed: bool) -> None:
    """Chunks would be shorter than the prompts; texts that share a prefix reach beyond the context or do not."""
    shared = prompt_of(40, 0)
    prompts = [
        shared[:36],
        prompt_of(75, 1),
        shared + prompt_of(30, 2),
        [*shared, 9],
        prompt_of(5, 3),
        [*shared, 7],
    ]
    wanted = [expected(folder, prompt, 20) for prompt in prompts]
    scheduler = Scheduler(opened(folder, packed), max_batch=3, prefill_chunk=7, page=4)
    sampling = Sampling(max_new_tokens=20, temperature=0)
    requests = [scheduler.submit(prompt, sampling) for prompt in prompts]
    scheduler.run()
    assert [request.tokens for request in requests] == wanted
    again = scheduler.submit(prompts[2], sampling)
    scheduler.run()
    assert again.tokens == wanted[2]


def test_preempted_requests_go_on_with_the_same_tokens(folder: Path) -> None:
    """The cache is too small for all: some are prefilled again, the prompt at once and the tokens one by one."""
    prompts = [prompt_of(size, size) for size in (60, 44, 70)]
    wanted = [expected(folder, prompt, 24) for prompt in prompts]
    scheduler = Scheduler(opened(folder, True), max_batch=3, page=4, max_pages=50, prefixes=0)
    requests = [scheduler.submit(prompt, Sampling(max_new_tokens=24, temperature=0)) for prompt in prompts]
    went_back = False
    while scheduler.busy:
        before = len(scheduler.waiting)
        scheduler.step()
        went_back |= len(scheduler.waiting) > before
    assert went_back
    assert [request.tokens for request in requests] == wanted
