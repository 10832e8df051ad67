"""A chat's history never outgrows the context silently."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from koine.errors import UserError
from koine.generate.messages import Message
from koine.serve.chat.conversation import Conversation


def words(messages: Sequence[Message]) -> list[int]:
    """A stand-in for a tokenizer: one token per word, and one that begins the answer."""
    return [0] * (1 + sum(len(message["content"].split()) for message in messages))


def talk(turns: int, system: str | None = None) -> Conversation:
    conversation = Conversation(system=system)
    for number in range(turns):
        conversation.add_user(f"question {number}")
        conversation.add_assistant(f"answer {number}")
    return conversation


def test_a_short_conversation_is_unchanged() -> None:
    conversation = talk(2)
    conversation.add_user("three words long")
    fitted = conversation.fit(words, context=100, reserve=10)
    assert (len(fitted.prompt), fitted.max_new_tokens, fitted.dropped) == (1 + 8 + 3, 10, 0)


def test_the_oldest_turns_are_dropped_first_and_the_system_prompt_stays() -> None:
    conversation = talk(3, system="be kind")
    conversation.add_user("now")
    # 1 + 2 (system) + 3·4 + 1 = 16 tokens; 12 with room for 4 leave one exchange too many, twice
    fitted = conversation.fit(words, context=16, reserve=4)
    assert fitted.dropped == 2
    assert [message["content"] for message in conversation.messages()] == [
        "be kind", "question 1", "answer 1", "question 2", "answer 2", "now",
    ]  # fmt: skip
    assert len(fitted.prompt) + fitted.max_new_tokens <= 16


def test_a_long_reply_does_not_cost_the_whole_history() -> None:
    conversation = talk(2)
    conversation.add_user("now")
    # Of 16 tokens a quarter is insisted on; 1000 wanted tokens do not drop turns that fit beside that
    # quarter.
    fitted = conversation.fit(words, context=16, reserve=1000)
    assert (fitted.dropped, len(fitted.prompt), fitted.max_new_tokens) == (0, 10, 6)


def test_a_message_longer_than_the_context_is_refused_with_both_numbers() -> None:
    conversation = Conversation()
    conversation.add_user("one two three four")
    with pytest.raises(UserError, match="the question is 5 tokens long and the model's context holds 5"):
        conversation.fit(words, context=5, reserve=10)


def test_reset_keeps_the_system_prompt() -> None:
    conversation = talk(2, system="be kind")
    conversation.reset()
    assert conversation.messages() == [{"role": "system", "content": "be kind"}]
