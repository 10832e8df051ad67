"""The engine that answers with a local model: conversations and sampling settings in, completions out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from koine.serve.conversation import Message
from koine.serve.sampling import Sampling

if TYPE_CHECKING:
    from koine.tokenizer import Tokenizer


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
