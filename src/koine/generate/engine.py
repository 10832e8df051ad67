"""The contract of every engine: conversations and sampling settings in, completions out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from koine.generate.messages import Message
from koine.generate.sampling import Sampling

if TYPE_CHECKING:
    from koine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """One generated token.

    log_probability: natural logarithm, from the model's logits before any sampling setting.
    stops: whether it ends the completion; its text is then not shown.
    """

    id: int
    log_probability: float
    stops: bool


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished completion.

    text: without the stop token or the stop string.
    tokens: token ids, the stop token included.
    log_probabilities: one a token, natural logarithms.
    prompt_tokens: number of tokens in the prompt.
    finish: "stop" (a stop token or stop string) or "length" (`max_new_tokens`).
    """

    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    prompt_tokens: int
    finish: Literal["stop", "length"]


class Engine(Protocol):
    """Completes batches of conversations: `LocalEngine` and `RemoteEngine` do."""

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Completion]:
        """Return one completion for each conversation, in order."""
        ...


class StreamingEngine(Protocol):
    """Completes one conversation token by token, as a chat needs it."""

    tokenizer: Tokenizer
    context: int
    """Maximum number of tokens of prompt and completion together."""

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's token ids, up to the assistant's header."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text to continue."""
        ...

    def stream(self, prompt: list[int], sampling: Sampling) -> Iterator[Token]:
        """Yield tokens as they are sampled, up to a stop token or `max_new_tokens`."""
        ...
