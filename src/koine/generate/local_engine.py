"""Generate with a model on this machine: batches, streams, stop strings and JSON schemas."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from koine.errors import UserError
from koine.generate.cache.paged_cache import PAGE
from koine.generate.cache_support import probe_padding
from koine.generate.cpu.prepacked_linear import prepack
from koine.generate.engine import Completion, Token
from koine.generate.grammar.schema import schema_text
from koine.generate.messages import Message
from koine.generate.padded_scheduler import PaddedScheduler
from koine.generate.request import Request
from koine.generate.sampling import Sampling
from koine.generate.scheduler import Scheduler
from koine.generate.sequential import SequentialGenerator
from koine.generate.stop_strings import StopStrings
from koine.hardware import check_device
from koine.hub import model_folder, shown_name
from koine.model import CausalLM, Decoder, LanguageModel, load_causal_lm
from koine.model.counting import page_bytes
from koine.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from koine.generate.grammar.grammar import Grammar

UNLIMITED = 2**30
"""Context length of a model whose configuration states none (recurrent models)."""


class LocalEngine:
    """Generate with a model directory of Koine, of Cohere, or (extra `hf`) of any causal LM of transformers.

    Many conversations run at once by continuous batching. Models of transformers whose batches would change
    their logits, such as recurrent ones, run one after another (`koine.generate.cache_support`). Threads may
    share an engine: each waiting thread steps the batch for all.

    Attributes:
        tokenizer: the directory's tokenizer.
        context: maximum number of tokens of prompt and completion together, from the model's configuration.
    """

    tokenizer: Tokenizer
    context: int

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
        """Load the model and its tokenizer.

        Args:
            path: the model directory, or `OWNER/NAME` of the hub.
            dtype: "float32", "bfloat16", or None for the stored dtype.
            device: where to compute: "cpu", "cuda", "cuda:1", "mps".
            threads: CPU threads; None leaves torch's setting.
            max_batch: conversations that run at once.
            cache_bytes: most bytes for the KV cache (of Koine's decoder: of its layers with full attention); None
                sets no limit.
            prefill_chunk: prompt tokens processed between two decode steps of the running batch.

        Raises:
            UserError: the folder holds no complete model with a matching tokenizer, or the device does not
                exist.
        """
        path = model_folder(path)
        if not path.is_dir():
            raise UserError("no such folder", where=path, hint="give the folder of a model")
        check_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        self.path = path
        weights = None if dtype is None else getattr(torch, dtype)
        model = load_causal_lm(path, dtype=weights, device=device)
        self.model: LanguageModel = model
        self.tokenizer = load_tokenizer(path)
        if self.tokenizer.vocab_size > model.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} ids and the model {model.vocab_size}",
                where=path,
                hint="these are not a pair; put the tokenizer that the model was trained with "
                "into its folder",
            )
        # Counted before prepacking replaces the parameters.
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self._weight = next(model.parameters())
        self.stop_ids = model.eos_ids | {self.tokenizer.end_of_turn_id, self.tokenizer.eos_id}
        self.context = model.context_length or UNLIMITED
        self.scheduler: Scheduler | PaddedScheduler | SequentialGenerator
        # The two kinds of model have KV caches of different classes: paged here, those of transformers there.
        if isinstance(model, Decoder):
            prepack(model)
            max_pages = None
            if cache_bytes is not None:
                max_pages = cache_bytes // max(1, page_bytes(model.config, PAGE, self._weight.element_size()))
            self.scheduler = Scheduler(
                model, max_batch=max_batch, max_pages=max_pages, prefill_chunk=prefill_chunk
            )
        else:
            assert isinstance(model, CausalLM)
            with torch.inference_mode():
                shapes = probe_padding(model.inner)
            if shapes is None:
                self.scheduler = SequentialGenerator(model, prefill_chunk=prefill_chunk)
            else:
                self.scheduler = PaddedScheduler(
                    model, shapes, max_batch=max_batch, max_bytes=cache_bytes, prefill_chunk=prefill_chunk
                )
        self._step_lock = threading.Lock()
        self._grammar = lru_cache(maxsize=32)(self._compile_grammar)

    def described(self) -> str:
        """Return one line about the model: folder, parameters, dtype, device, context length."""
        dtype = str(self._weight.dtype).removeprefix("torch.")
        return (
            f"{shown_name(self.path)}: {self._parameters / 1e6:,.1f}M parameters, {dtype} on {self._weight.device}, "
            f"{self.context:,} tokens of context"
        )

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's token ids, up to the assistant's header."""
        return self.tokenizer.encode_messages(messages, generation_prompt=True)[0]

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text to continue, with the tokens that the tokenizer puts before it."""
        return self.tokenizer.encode_prompt(text)

    def submit(self, prompt: list[int], sampling: Sampling) -> PendingCompletion:
        """Queue a prompt. The completion grows as threads step the batch (`stream`, `wait`)."""
        stops = StopStrings(self.tokenizer.stream_decoder(), sampling.stop)
        grammar = None
        if sampling.json_schema is not None:
            grammar = self._grammar(schema_text(sampling.json_schema)).start()
        with self._step_lock:
            request = self.scheduler.submit(
                prompt,
                replace(sampling, stop=(), json_schema=None),
                stop_ids=self.stop_ids,
                on_token=stops.push,
                grammar=grammar,
            )
        return PendingCompletion(request, stops)

    def wait(self, pending: PendingCompletion) -> None:
        """Step the batch until this completion is finished. Raises what its sampling or grammar raised."""
        while pending.request.finish is None:
            self._step(pending)
        pending.request.raise_error()

    def cancel(self, pending: PendingCompletion) -> None:
        """Stop a completion; its tokens so far remain."""
        with self._step_lock:
            self.scheduler.cancel(pending.request)

    def stream(self, prompt: list[int], sampling: Sampling) -> Iterator[Token]:
        """Yield tokens as they are sampled, up to a stop token or `max_new_tokens`.

        Closing the iterator cancels.

        The KV cache of an earlier call is reused where `prompt` begins with its tokens.
        """
        yield from self._tokens(self.submit(prompt, sampling))

    def stream_text(self, messages: Sequence[Message] | str, sampling: Sampling) -> Iterator[str]:
        """Yield the completion's text in pieces, never part of a character or of a stop string.

        messages: a conversation to answer, or a text to continue.
        """
        prompt = self.encode_text(messages) if isinstance(messages, str) else self.encode(messages)
        [length] = self._max_new_tokens([prompt], sampling)
        pending = self.submit(prompt, replace(sampling, max_new_tokens=length))
        yielded = 0
        for _ in self._tokens(pending):
            text = pending.stops.text
            if len(text) > yielded:
                yield text[yielded:]
                yielded = len(text)
        rest = pending.stops.finish()[yielded:]
        if rest:
            yield rest

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Completion]:
        """Return one completion for each conversation, in order.

        Conversation i samples with `seed + i`, so that its completion does not depend on the others.
        Raises `UserError` for a conversation that leaves no room for a new token.
        """
        return self._completions([self.encode(messages) for messages in conversations], sampling)

    def complete(self, texts: Sequence[str], sampling: Sampling) -> list[Completion]:
        """Continue each text, without a chat template, as `generate` answers conversations.

        A completion does not repeat its text. Raises `UserError` for a text that leaves no room for a new token.
        """
        return self._completions([self.encode_text(text) for text in texts], sampling, what="text")

    def _completions(
        self, prompts: Sequence[list[int]], sampling: Sampling, *, what: str = "conversation"
    ) -> list[Completion]:
        lengths = self._max_new_tokens(prompts, sampling, what=what)
        batch = [
            self.submit(prompt, replace(own, max_new_tokens=length))
            for prompt, length, own in zip(prompts, lengths, sampling.per_prompt(len(prompts)), strict=True)
        ]
        try:
            for pending in batch:
                self.wait(pending)
        except BaseException:
            for pending in batch:
                self.cancel(pending)
            raise
        return [pending.completion() for pending in batch]

    def _step(self, pending: PendingCompletion) -> None:
        """Step the whole batch once, unless another thread's step has just finished this completion."""
        with self._step_lock:
            if pending.request.finish is None:
                self.scheduler.step()

    def _tokens(self, pending: PendingCompletion) -> Iterator[Token]:
        """Yield a completion's tokens as they come. Left early, the request is cancelled."""
        request, yielded = pending.request, 0
        try:
            while True:
                for index in range(yielded, len(request.tokens)):
                    stops = request.finish == "stop" and index == len(request.tokens) - 1
                    yield Token(request.tokens[index], request.log_probabilities[index], stops)
                    yielded += 1
                if request.finish is not None and yielded == len(request.tokens):
                    request.raise_error()
                    return
                self._step(pending)
        finally:
            self.cancel(pending)

    def _max_new_tokens(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, what: str = "conversation"
    ) -> list[int]:
        """Return the maximum completion length of each prompt.

        Raises `UserError` where a prompt fills the context.
        """
        lengths = [min(sampling.max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True), start=1):
            if length < 1:
                raise UserError(
                    f"{what} {number} is {len(prompt)} tokens long "
                    f"and the model's context holds {self.context}",
                    hint="give a shorter one",
                )
        return lengths

    def _compile_grammar(self, schema: str) -> Grammar:
        from koine.generate.grammar.grammar import Grammar

        return Grammar.from_json_schema(json.loads(schema), self.tokenizer)


@dataclass(eq=False)
class PendingCompletion:
    """A completion in progress."""

    request: Request
    stops: StopStrings

    def completion(self) -> Completion:
        """Return the finished completion."""
        request = self.request
        assert request.finish is not None
        return Completion(
            text=self.stops.finish(),
            tokens=tuple(request.tokens),
            log_probabilities=tuple(request.log_probabilities),
            prompt_tokens=len(request.prompt),
            finish="length" if request.finish == "length" else "stop",
        )
