"""A conversation's history, and how much of it fits into a model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from koine.errors import UserError
from koine.generate.messages import Message


@dataclass
class Conversation:
    """A system text and the turns after it, user and assistant in alternation."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """The whole conversation as messages, the system's first."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def reset(self) -> None:
        """Forget the turns; the system text stays."""
        self.turns.clear()

    def add_user(self, question: str) -> None:
        self.turns.append({"role": "user", "content": question})

    def add_assistant(self, text: str) -> None:
        self.turns.append({"role": "assistant", "content": text})

    def drop_unanswered(self) -> None:
        """Take back a question that got no answer."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def drop_oldest(self) -> int:
        """Forget the oldest question and its answer, never the last question; the number of turns dropped."""
        if len(self.turns) <= 1:
            return 0
        count = 1
        while count < len(self.turns) - 1 and self.turns[count]["role"] != "user":
            count += 1
        del self.turns[:count]
        return count

    def fit(
        self, encode: Callable[[Sequence[Message]], list[int]], *, context: int, reserve: int
    ) -> FittedPrompt:
        """Drop the oldest turns until the prompt leaves `reserve` of `context` tokens for the answer.

        encode: the prompt's ids of a conversation, the marker before the answer included.
        reserve: tokens wanted for the answer; at most a quarter of the context is insisted on.
        Raises `UserError` where the last question alone leaves no room for a single token.
        """
        insisted = max(1, min(reserve, context // 4))
        dropped = 0
        prompt = encode(self.messages())
        while len(prompt) + insisted > context:
            count = self.drop_oldest()
            if count == 0:
                break
            dropped += count
            prompt = encode(self.messages())
        room = context - len(prompt)
        if room < 1:
            raise UserError(
                f"the question is {len(prompt)} tokens long and the model's context holds {context}",
                hint="ask a shorter one" + (", or shorten the system text" if self.system else ""),
            )
        return FittedPrompt(prompt=prompt, max_new_tokens=min(reserve, room), dropped=dropped)


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt that fits: its ids, the longest answer that still fits, and how many turns were dropped for it."""

    prompt: list[int]
    max_new_tokens: int
    dropped: int
