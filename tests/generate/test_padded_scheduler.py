"""Models of transformers in padded batches: each request's tokens are those of transformers' `generate` alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.errors import UserError
from koine.generate import LocalEngine, Sampling
from koine.generate import padded_scheduler as module
from koine.generate.cache.cached_forward import CachedForward
from koine.generate.cache_support import probe_cache_support, probe_padding
from koine.generate.padded_scheduler import PaddedScheduler
from koine.generate.request import Request
from koine.generate.sequential import SequentialGenerator
from koine.model import CausalLM
from tests.generate.prompts import prompt_of
from tests.generate.test_scheduler import Rules

transformers = pytest.importorskip("transformers", reason="the classes need the extra [hf]")

IDS: dict[str, Any] = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
IDS["tie_word_embeddings"] = False
WIDE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
BLOCKS = {**WIDE, "intermediate_size": 48, "num_key_value_heads": 2}
SMALL = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

PADDED: dict[str, dict[str, Any]] = {
    "GPTNeoX": {**WIDE, "intermediate_size": 48},
    "OPT": {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256},
    "Falcon with rotary positions": {**WIDE},
    "Falcon with alibi": {**WIDE, "alibi": True},
    "GPT2": SMALL,
    "Starcoder2": {**BLOCKS, "sliding_window": 7},
    "GptOss": {
        **BLOCKS, "head_dim": 8, "sliding_window": 7, "layer_types": MIXED,
        "num_local_experts": 2, "num_experts_per_tok": 1,
    },
}  # fmt: skip
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": ("tokens", {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}),
    "OpenAIGPT": ("none", SMALL),
    "Starcoder2 with RoPE by length": (
        "chunks",
        {**BLOCKS, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "Llama4Text": ("chunks", {**BLOCKS, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8}),
}
GREEDY = Sampling(temperature=0, max_new_tokens=12)


def random_model(name: str, settings: dict[str, Any]) -> CausalLM:
    """Return a model with weights so large that its greedy texts differ."""
    config = getattr(transformers, f"{name.partition(' ')[0]}Config")(**{**IDS, **settings})
    torch.manual_seed(0)
    inner = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return CausalLM(inner)


@pytest.fixture(scope="module", params=PADDED)
def model(request: pytest.FixtureRequest) -> CausalLM:
    return random_model(request.param, PADDED[request.param])


@pytest.fixture(scope="module")
def neox() -> CausalLM:
    return random_model("GPTNeoX", PADDED["GPTNeoX"])


def padded(model: CausalLM, **settings: Any) -> PaddedScheduler:
    with torch.inference_mode():
        shapes = probe_padding(model.inner)
    assert shapes is not None
    return PaddedScheduler(model, shapes, **settings)


def by_transformers(model: CausalLM, request: Request) -> list[int]:
    """Greedy tokens of `generate` for the prompt alone, without a cache of ours."""
    out = model.inner.generate(
        torch.tensor([request.prompt]),
        attention_mask=torch.ones(1, len(request.prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=request.sampling.max_new_tokens,
    )
    tokens: list[int] = out[0, len(request.prompt) :].tolist()
    return tokens


def one_by_one(model: CausalLM, prompt: list[int], sampling: Sampling) -> list[int]:
    queue = SequentialGenerator(model)
    request = queue.submit(prompt, sampling)
    queue.run()
    return request.tokens


def test_requests_that_join_and_leave_get_the_tokens_of_transformers(model: CausalLM) -> None:
    """Prompts of other lengths, some longer than a window and than a chunk, begin while others run."""
    scheduler = padded(model, max_batch=4, prefill_chunk=48)
    sizes = [(5, 20), (30, 6), (3, 9), (70, 14), (9, 3), (41, 30), (4, 12), (17, 8)]
    requests = []
    for number, (size, new) in enumerate(sizes):
        requests.append(scheduler.submit(prompt_of(size, number), replace(GREEDY, max_new_tokens=new)))
        scheduler.step()
        scheduler.step()
    assert len(scheduler.running) > 1
    scheduler.run()
    for request in requests:
        assert request.tokens == by_transformers(model, request)
    assert len({token for request in requests for token in request.tokens}) > 4
    text = torch.tensor([requests[3].all_tokens])
    with torch.no_grad():
        logits = model.inner(input_ids=text, use_cache=False).logits[0, len(requests[3].prompt) - 1 : -1]
    chosen = logits.log_softmax(dim=-1)[range(14), requests[3].tokens]
    assert requests[3].log_probabilities == pytest.approx(chosen.tolist(), abs=1e-3)


def test_sampled_tokens_are_those_of_the_request_alone(model: CausalLM) -> None:
    scheduler = padded(model)
    sampling = Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.1, max_new_tokens=10)
    requests = [
        scheduler.submit(prompt_of(size, size), replace(sampling, seed=size)) for size in (3, 19, 8, 11)
    ]
    scheduler.run()
    for request in requests:
        assert request.tokens == one_by_one(model, request.prompt, request.sampling)


@pytest.mark.parametrize("name", ALONE)
def test_other_classes_run_one_by_one(name: str) -> None:
    """Recurrent states, classes without a cache, and what a text's neighbours would change."""
    support, settings = ALONE[name]
    inner = random_model(name, settings).inner
    with torch.inference_mode():
        assert probe_padding(inner) is None
        assert probe_cache_support(inner) == support


def test_a_class_that_counts_padding_as_positions_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 without position ids gives other logits in a padded batch."""
    inner = random_model("GPT2", SMALL).inner
    create = CachedForward.__init__

    def without(self: CachedForward, inner: Any) -> None:
        create(self, inner)
        self._takes_positions = False

    with torch.inference_mode():
        assert probe_padding(inner) is not None
        monkeypatch.setattr(CachedForward, "__init__", without)
        assert probe_padding(inner) is None


def test_short_prompts_share_a_forward_pass(neox: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight prompts and twelve tokens each take twelve forward passes; one by one they take 96."""
    scheduler, calls = padded(neox), 0
    run = CachedForward._run

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return run(*arguments, **named)

    monkeypatch.setattr(CachedForward, "_run", counted)
    for seed in range(8):
        scheduler.submit(prompt_of(10 + seed, seed), GREEDY)
    scheduler.run()
    assert calls == 12


def test_texts_of_very_different_lengths_run_in_batches_of_their_own(
    neox: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORT", 16)
    scheduler = padded(neox)
    requests = [scheduler.submit(prompt_of(size, size), GREEDY) for size in (90, 5, 6, 7, 60)]
    while scheduler.waiting or scheduler.prefilling:
        scheduler.step()
    assert sorted(len(batch.requests) for batch in scheduler.batches) == [2, 3]
    scheduler.run()
    for request in requests:
        assert request.tokens == by_transformers(neox, request)


@pytest.mark.parametrize("name", ["GPTNeoX", "Starcoder2"])
def test_a_text_that_continues_an_earlier_one_reuses_its_cache(name: str) -> None:
    model = random_model(name, PADDED[name])
    scheduler = padded(model)
    first, other = scheduler.submit(prompt_of(9, 1), GREEDY), scheduler.submit(prompt_of(20, 2), GREEDY)
    scheduler.run()
    prompts = [[*first.all_tokens, 7, 8], [*other.all_tokens, 9]]
    continued = [scheduler.submit(prompt, GREEDY) for prompt in (*prompts, prompt_of(9, 3))]
    scheduler.run()
    assert [one.cached_tokens for one in continued] == [20, 31, 0]
    for request in continued:
        assert request.tokens == by_transformers(model, request)


def test_a_long_shared_beginning_is_prefilled_once(neox: CausalLM) -> None:
    scheduler = padded(neox)
    shared = prompt_of(80, 1)
    requests = [scheduler.submit([*shared, *prompt_of(5 + seed, seed)], GREEDY) for seed in range(4)]
    scheduler.run()
    assert [request.cached_tokens for request in requests] == [0, 80, 80, 80]
    for request in requests:
        assert request.tokens == by_transformers(neox, request)


def test_memory_stays_below_its_limit_and_no_request_is_lost(model: CausalLM) -> None:
    limit = padded(model)._empty().allocated_bytes(4, 70)
    scheduler = padded(model, max_bytes=limit, prefill_chunk=32)
    requests = [
        scheduler.submit(prompt_of(size, size), replace(GREEDY, max_new_tokens=25))
        for size in (40, 5, 33, 60, 8, 9, 10, 11)
    ]
    largest = most = 0
    while scheduler.busy:
        scheduler.step()
        largest, most = max(largest, scheduler.bytes()), max(most, len(scheduler.running))
    assert largest <= limit
    assert 1 < most < 8
    for request in requests:
        assert request.tokens == by_transformers(model, request)
    with pytest.raises(UserError, match=r"a prompt of 70 tokens with 12 new ones needs [\d,]+ bytes"):
        padded(model, max_bytes=1000).submit(prompt_of(70, 1), GREEDY)


def test_the_cache_of_a_window_holds_the_window() -> None:
    """A text of 200 tokens keeps 6 in a window of 7."""
    model = random_model("Starcoder2", PADDED["Starcoder2"])
    scheduler = padded(model)
    scheduler.submit(prompt_of(200, 1), replace(GREEDY, max_new_tokens=3))
    scheduler.step()
    [batch] = scheduler.batches
    # 3 layers, 2 heads of 8, keys and values, 4 bytes; 6 tokens and 32 spare columns.
    assert batch.cache.bytes() == 3 * 2 * 8 * 2 * 4 * (6 + 32)


def test_cancelling_changes_no_other_request(neox: CausalLM) -> None:
    scheduler = padded(neox, prefill_chunk=16, max_batch=3)
    stays, running, long, waiting = (
        scheduler.submit(prompt_of(size, size), GREEDY) for size in (6, 5, 40, 12)
    )
    scheduler.step()
    scheduler.step()
    assert scheduler.prefilling is not None
    assert scheduler.prefilling.requests == [long]
    for request in (running, long, waiting):
        scheduler.cancel(request)
    scheduler.run()
    assert [one.finish for one in (running, long, waiting)] == ["cancelled"] * 3
    assert stays.tokens == by_transformers(neox, stays)
    assert 0 < len(running.tokens) < 12
    assert running.tokens == by_transformers(neox, running)[: len(running.tokens)]


def interrupted(
    function: Callable[..., Any], at: tuple[int, ...], error: BaseException
) -> Callable[..., Any]:
    calls = 0

    def sometimes(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in at:
            raise error
        return function(*arguments, **named)

    return sometimes


@pytest.mark.parametrize("where", ["layer", "join", "append"])
def test_an_interruption_anywhere_loses_nothing(
    neox: CausalLM, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from koine.generate.cache.padded_cache import PaddedCache, PaddedLayer

    owner, name = {
        "layer": (PaddedLayer, "update"),
        "join": (PaddedCache, "join"),
        "append": (Request, "append"),
    }[where]
    at = {"layer": (5, 20, 44, 80), "join": (1, 3), "append": (2, 9, 15)}[where]
    scheduler = padded(neox, prefill_chunk=16)
    requests = [
        scheduler.submit(prompt_of(size, size), replace(GREEDY, temperature=0.9, seed=size))
        for size in (3, 30, 12)
    ]
    seen = 0
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted(getattr(owner, name), at, KeyboardInterrupt()))
        while scheduler.busy:
            try:
                scheduler.step()
            except KeyboardInterrupt:
                seen += 1
    assert seen == len(at)
    for request in requests:
        assert request.tokens == one_by_one(neox, request.prompt, request.sampling)


@pytest.mark.parametrize("fails", ["mask", "advance", "nothing allowed"])
def test_a_request_that_fails_fails_alone(neox: CausalLM, fails: str) -> None:
    scheduler = padded(neox)
    sampling = replace(GREEDY, temperature=0.9, seed=4)
    bad = scheduler.submit(prompt_of(5, 2), sampling, grammar=Rules(fails=fails))
    others = [scheduler.submit(prompt_of(size, size), sampling, grammar=Rules()) for size in (7, 8)]
    while bad.finish is None:
        scheduler.step()
    assert bad.finish == "failed"
    scheduler.run()
    for request in others:
        assert request.tokens == one_by_one(neox, request.prompt, sampling)


def test_a_prompt_that_the_model_refuses_fails_alone() -> None:
    """OPT knows no positions beyond its table; requests within them go on, before it and after it."""
    model = random_model("OPT", {**PADDED["OPT"], "max_position_embeddings": 20})
    scheduler = padded(model)
    fine = scheduler.submit(prompt_of(4, 1), GREEDY)
    scheduler.step()
    wrong, *others = (scheduler.submit(prompt_of(size, 2), GREEDY) for size in (30, 8, 6))
    with pytest.raises(IndexError):
        scheduler.run()
    assert wrong.finish == "failed"
    for request in (fine, *others):
        assert request.tokens == by_transformers(model, request)


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX of random weights beside a tokenizer of bytes."""
    tokenizer = LocalEngine(model_folder).tokenizer
    folder = tmp_path_factory.mktemp("neox")
    settings = {**PADDED["GPTNeoX"], "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 1024}
    random_model("GPTNeoX", settings).inner.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_the_engine_runs_conversations_in_one_batch(folder: Path) -> None:
    """Texts, streams and stop strings are those of one conversation after another, also from threads."""
    engine = LocalEngine(folder, max_batch=8)
    assert isinstance(engine.scheduler, PaddedScheduler)
    alone = LocalEngine(folder)
    assert isinstance(alone.model, CausalLM)
    alone.scheduler = SequentialGenerator(alone.model)
    conversations = [[{"role": "user", "content": "Wort " * count}] for count in (1, 9, 4, 2)]
    expected = alone.generate(conversations, GREEDY)
    for one, other in zip(engine.generate(conversations, GREEDY), expected, strict=True):
        assert (one.text, one.tokens, one.finish) == (other.text, other.tokens, other.finish)
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-4)
    with ThreadPoolExecutor(4) as pool:
        streams = list(pool.map(lambda one: "".join(engine.stream_text(one, GREEDY)), conversations))
    assert streams == [one.text for one in expected]
    stop = next(character for character in expected[1].text[1:] if character.isprintable())
    stopped = replace(GREEDY, stop=(stop,))
    assert engine.generate(conversations, stopped)[1].text == expected[1].text.partition(stop)[0]
