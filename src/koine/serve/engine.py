"""The engine that answers with a local model: conversations and sampling settings in, completions out."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch

from koine.errors import UserError
from koine.hardware import check_device
from koine.model import CausalLM, Decoder, load_causal_lm
from koine.model.generation import Sampling as TokenSampling
from koine.model.generation import choose
from koine.serve.conversation import Message
from koine.serve.reader import Reader
from koine.serve.sampling import Sampling
from koine.tokenizer import Tokenizer, load_tokenizer


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

    Attributes:
        tokenizer: the directory's.
        context: positions that the model's configuration allows.
    """

    def __init__(
        self, path: Path, *, dtype: str | None = None, device: str = "cpu", threads: int | None = None
    ) -> None:
        """dtype: "float32", "bfloat16", or None for what is stored; threads: of the CPU, None leaves torch's own.

        Raises `UserError` where the folder holds no whole model with a matching tokenizer, or the device is not here.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError("no such folder", where=path, mend="give the folder of a model")
        check_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        self.path = path
        weights = None if dtype is None else getattr(torch, dtype)
        opened = load_causal_lm(path, dtype=weights, device=device)
        assert isinstance(opened, Decoder | CausalLM)
        self.model = opened
        self.tokenizer = load_tokenizer(path)
        rows = opened.config.vocab_size if isinstance(opened, Decoder) else _rows(opened)
        if self.tokenizer.vocab_size > rows:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} ids and the model {rows}",
                where=path,
                mend="these are not a pair; put the tokenizer that the model was trained with into its folder",
            )
        self.stop_ids = frozenset({self.tokenizer.end_of_turn_id, self.tokenizer.eos_id})
        self._reader = Reader(opened)
        self.context = self._reader.context

    def described(self) -> str:
        """One line about the model: where it is, parameters, precision, context."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        precision = str(self._reader.dtype).removeprefix("torch.")
        return f"{self.path}: {count / 1e6:,.1f}M parameters, {precision} on {self._reader.device}, {self.context:,} tokens of context"

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's ids, the marker before the answer included."""
        return self.tokenizer.encode_messages(messages, generation_prompt=True)[0]

    def stream(self, prompt: list[int], sampling: Sampling) -> Iterator[Token]:
        """The answer's tokens as they are drawn; the last one stops or is the `max_new_tokens`-th.

        What an earlier call has read is not read again where `prompt` begins with it.
        """
        settings = _token_sampling(sampling)
        generator = torch.Generator(self._reader.device).manual_seed(settings.seed)
        reader = self._reader
        if not reader.continues(prompt):
            reader.reset()
        logits = reader.read(prompt[len(reader.tokens) :])
        seen = list(prompt)
        for count in range(1, sampling.max_new_tokens + 1):
            chosen = int(choose(logits[None], settings, [generator], [seen]))
            log_probability = float(logits.float().log_softmax(dim=-1)[chosen])
            stops = chosen in self.stop_ids
            yield Token(chosen, log_probability, stops)
            if stops or count == sampling.max_new_tokens:
                return
            seen.append(chosen)
            logits = reader.read([chosen])

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Completion]:
        """One completion for each conversation, in order; conversation i draws with `seed + i`, so that none depends on
        the others.

        Raises `UserError` for a conversation that leaves no room for an answer.
        """
        prompts = [self.encode(messages) for messages in conversations]
        rooms = [min(sampling.max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True), start=1):
            if room < 1:
                raise UserError(
                    f"conversation {number} is {len(prompt)} tokens long and the model's context holds {self.context}",
                    mend="give a shorter one",
                )
        first = _token_sampling(sampling).seed
        completions = []
        for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
            own = replace(sampling, seed=first + number, max_new_tokens=room)
            completions.append(self._complete(prompt, own))
        return completions

    def _complete(self, prompt: list[int], sampling: Sampling) -> Completion:
        tokens = list(self.stream(prompt, sampling))
        return Completion(
            text=self.tokenizer.decode([token.id for token in tokens if not token.stops]),
            tokens=tuple(token.id for token in tokens),
            log_probabilities=tuple(token.log_probability for token in tokens),
            prompt_tokens=len(prompt),
            finish="stop" if tokens[-1].stops else "length",
        )


def _rows(model: CausalLM) -> int:
    """How many ids a model of transformers scores."""
    return int(model.inner.get_output_embeddings().weight.shape[0])


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
