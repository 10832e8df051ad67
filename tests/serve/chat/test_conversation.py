"""History never outgrows the context silently, and sampling settings are checked where they enter."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from koine.errors import UserError
from koine.generate.messages import Message
from koine.generate.sampling import Sampling
from koine.serve.chat.conversation import Conversation


def words(messages: Sequence[Message]) -> list[int]:
    """A stand-in for a tokenizer: one token per word, and one that begins the answer."""
    return [0] * (1 + sum(len(message["content"].split()) for message in messages))


def talk(turns: int, system: str | None = None) -> Conversation:
    conversation = Conversation(system=system)
    for number in range(turns):
        conversation.ask(f"question {number}")
        conversation.answer(f"answer {number}")
    return conversation


def test_a_short_conversation_is_left_whole() -> None:
    conversation = talk(2)
    conversation.ask("three words long")
    fitted = conversation.fit(words, context=100, reserve=10)
    assert (len(fitted.prompt), fitted.max_new_tokens, fitted.dropped) == (1 + 8 + 3, 10, 0)


def test_the_oldest_question_and_its_answer_go_first_and_the_system_text_stays() -> None:
    conversation = talk(3, system="be kind")
    conversation.ask("now")
    # 1 + 2 (system) + 3·4 + 1 = 16 tokens; 12 with room for 4 leave one exchange too many, twice
    fitted = conversation.fit(words, context=16, reserve=4)
    assert fitted.dropped == 2
    assert [message["content"] for message in conversation.messages()] == [
        "be kind", "question 1", "answer 1", "question 2", "answer 2", "now",
    ]  # fmt: skip
    assert len(fitted.prompt) + fitted.max_new_tokens <= 16


def test_a_long_answer_is_not_worth_the_whole_history() -> None:
    conversation = talk(2)
    conversation.ask("now")
    # Of 16 tokens a quarter is insisted on; 1000 wanted tokens do not drop turns that fit beside that quarter.
    fitted = conversation.fit(words, context=16, reserve=1000)
    assert (fitted.dropped, len(fitted.prompt), fitted.max_new_tokens) == (0, 10, 6)


def test_a_question_longer_than_the_context_is_refused_with_both_numbers() -> None:
    conversation = Conversation()
    conversation.ask("one two three four")
    with pytest.raises(UserError, match="the question is 5 tokens long and the model's context holds 5"):
        conversation.fit(words, context=5, reserve=10)


def test_reset_keeps_the_system_text() -> None:
    conversation = talk(2, system="be kind")
    conversation.reset()
    assert conversation.messages() == [{"role": "system", "content": "be kind"}]


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("temperature", -0.1, "temperature is -0.1; give 0 (greedy) or more"),
        ("temperature", float("nan"), "temperature is nan; give 0 (greedy) or more"),
        ("temperature", float("inf"), "temperature is inf; give 0 (greedy) or more"),
        ("top_k", -1, "top-k is -1; give 0 (all tokens) or more"),
        ("top_p", 0.0, "top-p is 0.0; give above 0 and at most 1"),
        ("min_p", 1.1, "min-p is 1.1; give from 0 to 1"),
        ("repetition_penalty", 0.0, "repetition-penalty is 0.0; give above 0; 1 changes nothing"),
        ("seed", -1, "seed is -1; give an integer from 0"),
        ("max_new_tokens", 0, "max-new-tokens is 0; give at least 1"),
        ("max_new_tokens", 10**30, f"max-new-tokens is {10**30}; give a number below 2^31"),
        ("max_new_tokens", 5.0, "max-new-tokens is 5.0; give an integer"),
        ("max_new_tokens", True, "max-new-tokens is True; give an integer"),
        ("max_new_tokens", "5", "max-new-tokens is '5'; give an integer"),
        ("max_new_tokens", None, "max-new-tokens is None; give an integer"),
        ("temperature", True, "temperature is True; give a number"),
        ("temperature", "0.3", "temperature is '0.3'; give a number"),
        ("temperature", 10**400, "temperature is an integer of 401 digits; give a smaller number"),
        ("top_k", 2**31, f"top-k is {2**31}; give a number below 2^31"),
        ("top_k", float("nan"), "top-k is nan; give an integer"),
        ("min_p", float("nan"), "min-p is nan; give from 0 to 1"),
        ("min_p", [0.1], "min-p is [0.1]; give a number"),
        ("seed", False, "seed is False; give an integer"),
        ("stop", (5,), "stop is (5,); give a tuple of strings, none of them empty"),
        ("stop", "end", "stop is 'end'; give a tuple of strings, none of them empty"),
    ],
)
def test_a_setting_out_of_range_is_refused(name: str, value: float, line: str) -> None:
    with pytest.raises(UserError) as error:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert str(error.value) == line


def test_settings_from_their_written_form() -> None:
    sampling = Sampling().replaced("temperature", "0.5").replaced("top-k", "40").replaced("seed", "7")
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 40, 7)
    assert sampling.replaced("seed", "none").seed is None
    with pytest.raises(UserError, match="unknown setting 'temprature'; did you mean 'temperature'"):
        sampling.replaced("temprature", "1")
    with pytest.raises(UserError, match=r"top-k is '1\.5'; give an integer"):
        sampling.replaced("top-k", "1.5")
    with pytest.raises(UserError, match=r"top-p is 2\.0"):
        sampling.replaced("top-p", "2.0")


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "seed", "max_new_tokens"])
def test_a_number_of_thousands_of_digits(name: str) -> None:
    with pytest.raises(UserError, match="is an integer of 5001 digits; give "):
        Sampling(**{name: 10**5000})


def test_numbers_of_numpy_are_numbers() -> None:
    import numpy as np

    drawn = Sampling(temperature=np.float32(0.5), top_k=np.int64(7), seed=np.uint8(3))  # type: ignore[arg-type]
    assert json.dumps([drawn.temperature, drawn.top_k, drawn.seed]) == "[0.5, 7, 3]"
    # the names of answers in a cache hold it: 0 is written 0
    assert json.dumps(Sampling(temperature=0).temperature) == "0"
