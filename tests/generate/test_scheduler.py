"""Continuous batching gives each request the same tokens as alone, whatever happens around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from koine.errors import UserError
from koine.generate import Request, Scheduler, generate
from koine.generate.cache.prefix_cache import common_length
from koine.generate.sampling import Sampling
from koine.model import Decoder, LayerSpec, ModelConfig

from .prompts import prompt_of


def alone(model: Decoder, prompt: list[int], sampling: Sampling) -> list[int]:
    """The greedy or drawn answer by whole forward passes, without any cache."""
    from koine.generate.token_sampling import choose

    text, generator = list(prompt), torch.Generator().manual_seed(sampling.seed or 0)
    with torch.inference_mode():
        for _ in range(sampling.max_new_tokens):
            logits = model.logits(model(torch.tensor([text]))[:, -1])
            seen = torch.zeros(1, 99, dtype=torch.bool)
            seen[0, text] = True
            text.append(int(choose(logits, sampling, [generator], seen)))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "layers",
    [
        None,
        (LayerSpec(),) * 3,
        (LayerSpec(window=5),) * 2,
        (LayerSpec(qk_norm="heads"), LayerSpec(window=3, rope=False)),
    ],
    ids=["hybrid", "full", "windowed", "qk-norm"],
)
@pytest.mark.parametrize(("max_batch", "chunk", "page"), [(1, 64, 8), (3, 5, 4), (8, 64, 16)])
def test_every_request_gets_the_same_tokens_as_alone(
    tiny: ModelConfig, layers: tuple[LayerSpec, ...] | None, max_batch: int, chunk: int, page: int
) -> None:
    """Requests of many lengths arrive while others run; settings differ from row to row."""
    model = Decoder(tiny if layers is None else replace(tiny, layers=layers)).eval()
    scheduler = Scheduler(model, max_batch=max_batch, prefill_chunk=chunk, page=page)
    requests: list[Request] = []
    for number, size in enumerate((1, 19, 3, 40, 8, 8, 27)):
        sampling = Sampling(
            max_new_tokens=4 + 3 * (number % 3),
            temperature=0.0 if number % 2 else 1.0,
            repetition_penalty=1.3 if number % 3 == 0 else 1.0,
            seed=number,
        )
        requests.append(scheduler.submit(prompt_of(size, number), sampling))
        scheduler.step()
    scheduler.run()
    for request in requests:
        assert request.tokens == alone(model, request.prompt, request.sampling)
        assert request.finish == "length"


def test_a_full_cache_loses_no_request(tiny: ModelConfig) -> None:
    """Eight requests that do not fit together: some are preempted, prefilled again, and end the same."""
    model = Decoder(tiny).eval()
    scheduler = Scheduler(model, max_batch=8, page=4, max_pages=14, prefixes=2)
    went_back = 0
    requests = [
        scheduler.submit(
            prompt_of(9 + number, number), Sampling(max_new_tokens=20, temperature=0.7, seed=number)
        )
        for number in range(8)
    ]
    while scheduler.busy:
        before = len(scheduler.waiting)
        scheduler.step()
        went_back += max(0, len(scheduler.waiting) - before)
        assert scheduler.cache.pages_in_use <= 14
    assert went_back > 0
    for request in requests:
        assert request.tokens == alone(model, request.prompt, request.sampling)


def test_a_request_that_can_never_fit_is_refused(tiny: ModelConfig) -> None:
    scheduler = Scheduler(Decoder(tiny).eval(), page=4, max_pages=10)
    with pytest.raises(UserError, match="needs 11 pages and the cache has 10"):
        scheduler.submit(prompt_of(30, 0), Sampling(max_new_tokens=11, temperature=0))
    scheduler.submit(prompt_of(30, 0), Sampling(max_new_tokens=10, temperature=0))
    scheduler.run()


def test_a_shared_prefix_is_prefilled_once(tiny: ModelConfig) -> None:
    """The first of three prompts with a shared prefix pauses there; the others, and a next turn, reuse it."""
    model = Decoder(tiny).eval()
    scheduler = Scheduler(model, page=8)
    common = prompt_of(45, 1)
    first, second, third = (
        scheduler.submit(common + prompt_of(7, seed), Sampling(max_new_tokens=6, temperature=0))
        for seed in (2, 3, 4)
    )
    scheduler.run()
    assert [first.cached_tokens, second.cached_tokens, third.cached_tokens] == [0, 45, 45] or [
        first.cached_tokens,
        third.cached_tokens,
    ] == [
        0,
        45,
    ]
    turn = scheduler.submit(first.all_tokens + prompt_of(5, 9), Sampling(max_new_tokens=6, temperature=0))
    scheduler.run()
    assert turn.cached_tokens == len(first.all_tokens) - 1
    for request in (first, second, third, turn):
        assert request.tokens == alone(model, request.prompt, request.sampling)
    # Two answers from one kept beginning whose last page is not full: neither writes into the other's.
    twins = [
        scheduler.submit([*turn.all_tokens, token], Sampling(max_new_tokens=9, temperature=0))
        for token in (7, 8)
    ]
    scheduler.run()
    # That the second has one token more in common with the first is not worth a stop.
    assert [twin.cached_tokens for twin in twins] == [len(turn.all_tokens) - 1] * 2
    for twin in twins:
        assert twin.tokens == alone(model, twin.prompt, twin.sampling)


@pytest.mark.parametrize(("prefixes", "shared", "most"), [(0, 64, 2), (16, 64, 2), (16, 0, 2)])
@pytest.mark.parametrize("layers", [None, (LayerSpec(),) * 2], ids=["hybrid", "full"])
def test_prompts_with_a_shared_prefix_are_packed(
    tiny: ModelConfig, layers: tuple[LayerSpec, ...] | None, prefixes: int, shared: int, most: int
) -> None:
    """32 prompts of 84 tokens take two chunks of 2,048, or one for their prefix and one for the rest."""
    model = Decoder(tiny if layers is None else replace(tiny, layers=layers)).eval()
    scheduler = Scheduler(model, prefixes=prefixes, page=8)
    common, sampling = prompt_of(shared, 99), Sampling(max_new_tokens=4, temperature=0)
    requests = [scheduler.submit(common + prompt_of(84 - shared, seed), sampling) for seed in range(1, 33)]
    steps = 0
    while scheduler.waiting or scheduler.prefilling:
        scheduler.step()
        steps += 1
    assert steps <= most
    scheduler.run()
    assert [request.cached_tokens for request in requests] == [0] + [shared if prefixes else 0] * 31
    for request in requests[:2] + requests[-2:]:
        assert request.tokens == alone(model, request.prompt, sampling)


def test_a_long_queue_is_not_compared_with_itself(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons grow with the number of prompts, not with its square."""
    from koine.generate.cache import prefix_cache as module

    calls = 0

    def counted(first: list[int], second: list[int]) -> int:
        nonlocal calls
        calls += 1
        return common_length(first, second)

    monkeypatch.setattr(module, "common_length", counted)
    scheduler = Scheduler(Decoder(tiny).eval())
    count = 400
    for seed in range(count):
        scheduler.submit(prompt_of(3, seed), Sampling(max_new_tokens=1, temperature=0))
    scheduler.run()
    assert 0 < calls <= 2 * module.COMPARED_PROMPTS * count


def test_cancelling_frees_pages_and_changes_no_other_request(tiny: ModelConfig) -> None:
    model = Decoder(tiny).eval()
    scheduler = Scheduler(model, max_batch=2, page=4, prefixes=0, prefill_chunk=8)
    sampling = Sampling(max_new_tokens=10, temperature=0)
    stays, running, context, waiting = (
        scheduler.submit(prompt_of(size, size), sampling) for size in (6, 5, 40, 12)
    )
    scheduler.step()
    scheduler.cancel(running)
    scheduler.step()
    assert context in scheduler.prefilling
    scheduler.cancel(context)
    scheduler.cancel(waiting)
    scheduler.run()
    assert [one.finish for one in (running, context, waiting)] == ["cancelled"] * 3
    assert stays.tokens == alone(model, stays.prompt, sampling)
    assert running.tokens == alone(model, running.prompt, sampling)[: len(running.tokens)]
    assert scheduler.cache.pages_in_use == 0
    assert scheduler.cache.sequences == []


def test_an_interruption_anywhere_loses_nothing(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Decoder(tiny).eval()
    scheduler = Scheduler(model, max_batch=4, page=4, prefill_chunk=8)
    requests = [
        scheduler.submit(prompt_of(size, size), Sampling(max_new_tokens=8, temperature=0.9, seed=size))
        for size in (3, 30, 12)
    ]
    forward, calls = model.blocks[-1].forward, 0

    def sometimes(*arguments: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        # Ever further apart, since what is read again must get a little further each time.
        if calls in (3, 7, 12, 18, 25, 33):
            raise KeyboardInterrupt
        return forward(*arguments, **named)

    interrupted = 0
    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[-1], "forward", sometimes)
        while scheduler.busy:
            try:
                scheduler.step()
            except KeyboardInterrupt:
                interrupted += 1
    assert interrupted > 2
    for request in requests:
        assert request.tokens == alone(model, request.prompt, request.sampling)


class Rules:
    """A grammar that allows everything, and raises where it is told to."""

    def __init__(self, *, fails: str | None = None, after: int = 3) -> None:
        self.fails, self.after, self.calls = fails, after, 0

    def mask(self) -> torch.Tensor:
        self.calls += 1
        if self.fails == "mask" and self.calls > self.after:
            raise UserError("the grammar is too complex")
        return torch.full((99,), self.fails != "nothing allowed" or self.calls <= self.after)

    def advance(self, token: int) -> None:
        if self.fails == "advance" and self.calls > self.after:
            raise ValueError(f"token {token} is not allowed")


@pytest.mark.parametrize("fails", ["mask", "advance", "watch", "nothing allowed"])
def test_a_request_that_fails_fails_alone(tiny: ModelConfig, fails: str) -> None:
    """Its neighbours of equal settings, drawn in the same go, get what they would have got without it."""
    model = Decoder(tiny).eval()
    scheduler = Scheduler(model, page=4)
    sampling = Sampling(max_new_tokens=9, temperature=0.9, seed=4)

    def on_token(token: int) -> bool:
        if fails == "watch" and len(bad.tokens) > 3:
            raise RuntimeError("watching failed")
        return False

    first = scheduler.submit(prompt_of(6, 1), sampling)
    bad = scheduler.submit(
        prompt_of(5, 2), sampling, on_token=on_token, grammar=None if fails == "watch" else Rules(fails=fails)
    )
    others = [
        scheduler.submit(prompt_of(7, 3), sampling, grammar=Rules()),
        scheduler.submit(prompt_of(8, 4), Sampling(max_new_tokens=9, temperature=0)),
    ]
    while bad.finish is None:
        scheduler.step()
    assert bad.finish == "failed"
    with pytest.raises((UserError, ValueError, RuntimeError)) as raised:
        bad.raise_error()
    assert raised.value is bad.error
    scheduler.run()
    for request in (first, *others):
        assert (request.finish, request.error) == ("length", None)
        assert request.tokens == alone(model, request.prompt, request.sampling)
    assert bad.tokens[:3] == alone(model, bad.prompt, sampling)[:3]
    assert not scheduler.cache.sequences
    # What runs to the end by itself has nobody else to tell.
    scheduler.submit([5, 7], sampling, grammar=Rules(fails="mask", after=1))
    with pytest.raises(UserError, match="too complex"):
        scheduler.run()


@pytest.mark.parametrize("where", ["drawing", "taking"])
def test_an_interrupt_between_sampling_and_appending_changes_no_token(
    tiny: ModelConfig, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows are drawn before any token is taken: the draws that come to nothing are undone."""
    from koine.generate import request as module

    model = Decoder(tiny).eval()
    scheduler = Scheduler(model, page=4)
    asked = [
        scheduler.submit(prompt_of(5 + seed, seed), Sampling(max_new_tokens=8, temperature=0.9, seed=seed))
        for seed in range(3)
    ]
    calls = 0

    def interrupted(function: Callable[..., object]) -> Callable[..., object]:
        def sometimes(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls in (2, 5, 8):
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return sometimes

    if where == "drawing":
        # After the draws, before the first token is taken.
        monkeypatch.setattr(module, "log_probabilities", interrupted(module.log_probabilities))
    else:
        # After some of the tokens are taken.
        monkeypatch.setattr(Request, "append", interrupted(Request.append))
    seen = 0
    while scheduler.busy:
        try:
            scheduler.step()
        except KeyboardInterrupt:
            seen += 1
    assert seen == 3
    for request in asked:
        assert request.tokens == alone(model, request.prompt, request.sampling)


def test_a_grammar_and_on_token(tiny: ModelConfig) -> None:
    """Only allowed tokens are sampled, each row has its own grammar, log-probabilities are the model's."""

    class Odd:
        def __init__(self) -> None:
            self.taken: list[int] = []

        def mask(self) -> torch.Tensor:
            return torch.arange(90) % 2 == 1

        def advance(self, token: int) -> None:
            self.taken.append(token)

    model, odd = Decoder(tiny).eval(), Odd()
    scheduler = Scheduler(model)
    sampling = Sampling(max_new_tokens=12, temperature=1.5, seed=3)
    free = scheduler.submit([5, 9], sampling)
    bound = scheduler.submit([5, 9], sampling, grammar=odd)
    scheduler.run()
    watched = scheduler.submit([5, 9], sampling, on_token=lambda token: token == free.tokens[3])
    scheduler.run()
    assert free.tokens == alone(model, [5, 9], sampling)
    assert bound.tokens == odd.taken
    assert all(token % 2 and token < 90 for token in bound.tokens)
    with torch.inference_mode():
        scores = model.logits(model(torch.tensor([bound.all_tokens])))[0, 1:-1].log_softmax(-1)
    own = scores.gather(1, torch.tensor(bound.tokens)[:, None])[:, 0]
    assert bound.log_probabilities == pytest.approx(own.tolist(), abs=1e-4)
    assert watched.tokens == free.tokens[: free.tokens.index(free.tokens[3]) + 1]
    assert watched.finish == "stop"


def test_generate_keeps_the_order(tiny: ModelConfig) -> None:
    model = Decoder(tiny).eval()
    prompts = [prompt_of(size, size) for size in (20, 3, 11)]
    answers = generate(model, prompts, Sampling(max_new_tokens=5, temperature=1.0, seed=7), max_batch=2)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.prompt == prompt
        assert answer.tokens == alone(
            model, prompt, Sampling(max_new_tokens=5, temperature=1.0, seed=7 + row)
        )


def test_a_request_that_leaves_moves_only_the_last_one(tiny: ModelConfig) -> None:
    """The last one takes the place of the one that left, and no other."""
    windowed = replace(tiny, layers=(LayerSpec(window=7),) * 2)
    scheduler = Scheduler(Decoder(windowed).eval(), prefixes=0)
    requests = [
        scheduler.submit(prompt_of(4, seed), Sampling(max_new_tokens=2 if seed == 1 else 9, temperature=0))
        for seed in range(6)
    ]
    while requests[1].finish is None:
        scheduler.step()
    changes = scheduler.cache.changes
    scheduler.step()
    assert scheduler.cache.changes == changes
    slots = [request.sequence.slot for request in requests if request.sequence is not None]
    assert slots == [0, 2, 3, 4, 1]
    scheduler.run()
    for request in requests:
        assert request.tokens == alone(scheduler.model, request.prompt, request.sampling)
