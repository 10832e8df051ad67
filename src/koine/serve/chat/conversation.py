"""History of a conversation, and fitting it into a model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from koine.errors import UserError
from koine.generate.messages import Message


@dataclass
class Conversation:
    """A system prompt, and the user's and assistant's turns in alternation."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """Return all messages, the system prompt first."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def reset(self) -> None:
        """Clear the history; the system prompt stays."""
        self.turns.clear()

    def add_user(self, text: str) -> None:
        """Append a user turn."""
        self.turns.append({"role": "user", "content": text})

    def add_assistant(self, text: str) -> None:
        """Append an assistant turn."""
        self.turns.append({"role": "assistant", "content": text})

    def drop_unanswered(self) -> None:
        """Remove a last user turn that got no reply."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def drop_oldest(self) -> int:
        """Drop the oldest user turn and its reply, never the last; return the number of turns dropped."""
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
        """Drop the oldest turns until the prompt leaves room for the reply.

        Args:
            encode: returns a prompt's token ids, up to the assistant's header.
            context: tokens of prompt and reply together.
            reserve: tokens to keep free for the reply, but at most a quarter of the context.

        Raises:
            UserError: the last user turn alone leaves no room for a single token.
        """
        needed = max(1, min(reserve, context // 4))
        dropped = 0
        prompt = encode(self.messages())
        while len(prompt) + needed > context:
            count = self.drop_oldest()
            if count == 0:
                break
            dropped += count
            prompt = encode(self.messages())
        room = context - len(prompt)
        if room < 1:
            raise UserError(
                f"the question is {len(prompt)} tokens long and the model's context holds {context}",
                hint="ask a shorter one" + (", or shorten the system prompt" if self.system else ""),
            )
        return FittedPrompt(prompt=prompt, max_new_tokens=min(reserve, room), dropped=dropped)


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt that fits into the context.

    prompt: token ids. max_new_tokens: longest reply that fits. dropped: number of turns dropped for it.
    """

    prompt: list[int]
    max_new_tokens: int
    dropped: int
