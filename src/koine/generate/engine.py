"""The engine that answers with a local model: conversations and sampling settings in, completions out."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from koine.errors import UserError
from koine.generate import Request, Scheduler
from koine.generate.cache.paged_cache import PAGE
from koine.generate.cpu.prepacked_linear import pack
from koine.generate.grammar.schema import schema_text
from koine.generate.messages import Message
from koine.generate.sampling import Sampling
from koine.generate.sequential import SequentialGenerator
from koine.generate.stop_strings import StopStrings
from koine.generate.token_sampling import Sampling as TokenSampling
from koine.hardware import check_device
from koine.model import CausalLM, Decoder, LanguageModel, load_causal_lm
from koine.model.counting import page_bytes
from koine.tokenizer import Tokenizer, load_tokenizer

UNLIMITED = 2**30
"""What is taken as the context of a model whose configuration states none (recurrent ones)."""


@dataclass(frozen=True)
class Token:
    """One generated token.

    log_probability: natural, as the model gives it, before any sampling setting.
    stops: whether it ends the answer; it is then no part of the text.
    """

    id: int
    log_probability: float
    stops: bool


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer: its text, its tokens (the one that ended it included) and their log-probabilities."""

    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    prompt_tokens: int
    finish: Literal["stop", "length"]


class Engine(Protocol):
    """Whatever completes conversations: a local model here, an endpoint elsewhere."""

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Completion]:
        """One completion for each conversation, in order."""
        ...


class StreamingEngine(Protocol):
    """What a chat needs: one conversation at a time, token by token."""

    tokenizer: Tokenizer
    context: int

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's ids, the marker before the answer included."""
        ...

    def stream(self, prompt: list[int], sampling: Sampling) -> Iterator[Token]:
        """The answer's tokens as they are drawn; the last one stops or is the `max_new_tokens`-th."""
        ...


class LocalEngine:
    """A model directory of ours, of Cohere's, or (extra `hf`) of any causal LM that transformers opens.

    Our own decoder (Cohere and Cohere2 directories among them) answers many conversations at once, by continuous batching; other models one after
    another. Threads may share an engine: whoever waits for an answer drives the batch for all.

    Attributes:
        tokenizer: the directory's.
        context: positions that the model's configuration allows.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
        max_batch: int = 32,
        cache_bytes: int | None = None,
        prefill_chunk: int = 2048,
    ) -> None:
        """dtype: "float32", "bfloat16", or None for what is stored; threads: of the CPU, None leaves torch's own.
        max_batch: conversations answered at once. cache_bytes: the most that the growing keys and values of full layers may take (None: no
        limit). prefill_chunk: tokens of prompts read between two steps of the running answers.

        Raises `UserError` where the folder holds no whole model with a matching tokenizer, or the device is not here.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError("no such folder", where=path, hint="give the folder of a model")
        check_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        self.path = path
        weights = None if dtype is None else getattr(torch, dtype)
        opened = load_causal_lm(path, dtype=weights, device=device)
        self.model: LanguageModel = opened
        self.tokenizer = load_tokenizer(path)
        if self.tokenizer.vocab_size > opened.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} ids and the model {opened.vocab_size}",
                where=path,
                hint="these are not a pair; put the tokenizer that the model was trained with into its folder",
            )
        self._parameters = sum(parameter.numel() for parameter in opened.parameters())
        self._weight = next(opened.parameters())
        self.stop_ids = opened.eos_ids | {self.tokenizer.end_of_turn_id, self.tokenizer.eos_id}
        self.context = opened.context_length or UNLIMITED
        self.scheduler: Scheduler | SequentialGenerator
        # The two kinds of model have KV caches of different classes: paged ones here, those of transformers there.
        if isinstance(opened, Decoder):
            pack(opened)
            most = None
            if cache_bytes is not None:
                most = cache_bytes // max(1, page_bytes(opened.config, PAGE, self._weight.element_size()))
            self.scheduler = Scheduler(
                opened, max_batch=max_batch, max_pages=most, prefill_chunk=prefill_chunk
            )
        else:
            assert isinstance(opened, CausalLM)
            self.scheduler = SequentialGenerator(opened, prefill_chunk=prefill_chunk)
        self._driving = threading.Lock()
        self._grammar = lru_cache(maxsize=32)(self._new_grammar)

    def described(self) -> str:
        """One line about the model: where it is, parameters, precision, context."""
        precision = str(self._weight.dtype).removeprefix("torch.")
        return f"{self.path}: {self._parameters / 1e6:,.1f}M parameters, {precision} on {self._weight.device}, {self.context:,} tokens of context"

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's ids, the marker before the answer included."""
        return self.tokenizer.encode_messages(messages, generation_prompt=True)[0]

    def submit(self, prompt: list[int], sampling: Sampling) -> Answer:
        """Queue a prompt; the answer grows as somebody drives the batch (`stream`, `wait`)."""
        stops = StopStrings(self.tokenizer.stream_decoder(), sampling.stop)
        grammar = None
        if sampling.json_schema is not None:
            grammar = self._grammar(schema_text(sampling.json_schema)).start()
        with self._driving:
            request = self.scheduler.submit(
                prompt,
                _token_sampling(sampling),
                stop_ids=self.stop_ids,
                on_token=stops.push,
                grammar=grammar,
            )
        return Answer(request, stops)

    def wait(self, answer: Answer) -> None:
        """Drive the batch until this answer is finished. Raises what its own drawing or grammar raised."""
        while answer.request.finish is None:
            self._drive(answer)
        answer.request.raise_error()

    def cancel(self, answer: Answer) -> None:
        """Stop an answer; what was written of it stays."""
        with self._driving:
            self.scheduler.cancel(answer.request)

    def _drive(self, answer: Answer) -> None:
        """One step of the whole batch, unless another thread's step has finished this answer meanwhile."""
        with self._driving:
            if answer.request.finish is None:
                self.scheduler.step()

    def _tokens(self, answer: Answer) -> Iterator[Token]:
        """The answer's tokens as they come; left early, the request is cancelled."""
        request, given = answer.request, 0
        try:
            while True:
                for place in range(given, len(request.tokens)):
                    token = request.tokens[place]
                    last = request.finish == "stop" and place == len(request.tokens) - 1
                    yield Token(token, request.log_probabilities[place], last)
                    given += 1
                if request.finish is not None and given == len(request.tokens):
                    request.raise_error()
                    return
                self._drive(answer)
        finally:
            self.cancel(answer)

    def stream(self, prompt: list[int], sampling: Sampling) -> Iterator[Token]:
        """The answer's tokens as they are drawn; the last one stops or is the `max_new_tokens`-th. Closing the iterator cancels it.

        What an earlier call has read is not read again where `prompt` begins with it.
        """
        yield from self._tokens(self.submit(prompt, sampling))

    def stream_text(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """The answer's text in pieces, never half a character or the beginning of a stop string."""
        prompt = self.encode(messages)
        [room] = self._rooms([prompt], sampling)
        answer = self.submit(prompt, replace(sampling, max_new_tokens=room))
        given = 0
        for _ in self._tokens(answer):
            shown = answer.stops.text
            if len(shown) > given:
                yield shown[given:]
                given = len(shown)
        rest = answer.stops.finish()[given:]
        if rest:
            yield rest

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Completion]:
        """One completion for each conversation, in order; conversation i draws with `seed + i`, so that none depends on
        the others.

        Raises `UserError` for a conversation that leaves no room for an answer.
        """
        prompts = [self.encode(messages) for messages in conversations]
        rooms = self._rooms(prompts, sampling)
        first = secrets.randbelow(2**31) if sampling.seed is None else sampling.seed
        answers = [
            self.submit(prompt, replace(sampling, seed=first + number, max_new_tokens=room))
            for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))
        ]
        try:
            for answer in answers:
                self.wait(answer)
        except BaseException:
            for answer in answers:
                self.cancel(answer)
            raise
        return [answer.completion() for answer in answers]

    def _rooms(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[int]:
        """How long each answer may be. Raises `UserError` where a prompt fills the context."""
        rooms = [min(sampling.max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True), start=1):
            if room < 1:
                raise UserError(
                    f"conversation {number} is {len(prompt)} tokens long and the model's context holds {self.context}",
                    hint="give a shorter one",
                )
        return rooms

    def _new_grammar(self, schema: str) -> Any:
        from koine.generate.grammar.grammar import Grammar

        return Grammar.from_json_schema(json.loads(schema), self.tokenizer)


@dataclass(eq=False)
class Answer:
    """An answer that is being written."""

    request: Request
    stops: StopStrings

    def completion(self) -> Completion:
        """The finished answer."""
        request = self.request
        assert request.finish is not None
        return Completion(
            text=self.stops.finish(),
            tokens=tuple(request.tokens),
            log_probabilities=tuple(request.log_probabilities),
            prompt_tokens=len(request.prompt),
            finish="length" if request.finish == "length" else "stop",
        )


def _token_sampling(sampling: Sampling) -> TokenSampling:
    """The settings as the token loop takes them, with a seed of its own where none was given."""
    return TokenSampling(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=secrets.randbelow(2**31) if sampling.seed is None else sampling.seed,
    )
