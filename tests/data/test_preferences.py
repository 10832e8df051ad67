"""Preference records: prompts, answers and their common beginnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from koine.data import read_records
from koine.data.preferences import common_beginning, common_text, read_preference, read_transcript

from .test_formats import assistant, said, system, user

PACK = Path(__file__).resolve().parents[3] / "shared" / "data"
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sky?\n\nAssistant:"
TURNS = [user("Hi"), assistant("Hello"), user("Sky?")]


def read(**row: Any) -> dict[str, Any]:
    record = read_preference(row, "chosen")
    assert isinstance(record, dict), record
    return record


def test_transcripts() -> None:
    assert read_transcript(HH) == TURNS
    assert read_transcript("system: S\n\nhuman: Hi\n\ngpt: a\n\nb\n\nhuman: c") == [
        system("S"),
        user("Hi"),
        assistant("a\n\nb"),
        user("c"),
    ]
    # Two turns of one speaker are one; a label in another spelling is text.
    assert read_transcript("\n\nHuman: a\n\nHuman: b\n\nhuman: c") == [user("a\n\nb\n\nhuman: c")]
    assert read_transcript("A question about Human: and\n\nHuman: b") is None
    assert read_transcript("Humanity: a") is None


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HH, "chosen": " Blue.", "rejected": " Red."},
        {"prompt": HH, "chosen": HH + " Blue.", "rejected": HH + " Red."},
    ],
)
def test_a_prompt_as_a_transcript(row: dict[str, str]) -> None:
    record = read(**row)
    assert record["prompt"] == TURNS
    assert record["messages"] == [*TURNS, assistant(" Blue.")]


def test_two_transcripts_without_a_prompt() -> None:
    record = read(chosen=HH + " The sky is blue.", rejected=HH + " The sky is red.")
    assert record["prompt"] == TURNS
    assert (record["chosen"], record["rejected"]) == (
        [assistant("The sky is blue.")],
        [assistant("The sky is red.")],
    )


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "Sky?", "system": "S"}, [system("S"), user("Sky?")]),
        ({"instruction": "Add.", "input": "1"}, [user("Add.\n1")]),
        ({"conversations": [said("human", "Sky?")]}, [user("Sky?")]),
        ({"prompt": [user("Sky?")]}, [user("Sky?")]),
    ],
)
def test_prompts_of_other_names(row: dict[str, Any], prompt: list[dict[str, str]]) -> None:
    for chosen, rejected in (("Blue.", "Red."), (said("gpt", "Blue."), said("gpt", "Red."))):
        record = read(**row, chosen=chosen, rejected=rejected)
        assert record["prompt"] == prompt
        assert (record["chosen"], record["rejected"]) == ([assistant("Blue.")], [assistant("Red.")])


def test_scores_have_one_name() -> None:
    for names in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        record = read(prompt="a", chosen="b", rejected="c", **dict(zip(names, (8, 2.5), strict=True)))
        assert (record["score_chosen"], record["score_rejected"]) == (8.0, 2.5)
        assert set(record) == {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "messages"}
    assert "score_chosen" not in read(prompt="a", chosen="b", rejected="c", score_chosen=float("nan"))


def test_conversations_that_differ_before_the_last_turn() -> None:
    chosen = [user("a"), assistant("b"), user("c"), assistant("d")]
    rejected = [user("a"), assistant("b"), user("C"), assistant("d")]
    # The user's turns differ, so the answers begin with the assistant's before them.
    assert common_beginning(chosen, rejected) == 1
    assert common_beginning(chosen, chosen) == 3
    assert common_beginning(chosen, [system("s"), *chosen]) == 0


def test_texts_are_divided_between_words() -> None:
    chosen, rejected = "The sky is green.", "The sky is grey."
    assert chosen[: common_text(chosen, rejected)] == "The sky is"
    assert common_text("Blue.", "Black.") == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected: message 2: the text is empty"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "'prompt': the text is empty"),
        ({"chosen": "Blue.", "rejected": "Red."}, "no prompt, and the answers have no common beginning"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
            "no prompt, and the conversations have no common beginning",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": [assistant("c")]},
            "'chosen' and 'rejected' are of different types",
        ),
        ({"prompt": "a", "chosen": [], "rejected": [assistant("c")]}, "an answer without messages"),
        (
            {"prompt": "a", "chosen": [user("b")], "rejected": [assistant("c")]},
            "chosen: messages 1 and 2 are both of the user",
        ),
    ],
)
def test_bad_records(row: dict[str, Any], reason: str) -> None:
    assert read_preference(row, "chosen") == reason


@pytest.mark.shared
@pytest.mark.skipif(not PACK.exists(), reason="the development data pack is not beside the checkout")
@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("dpo_demo", 600, 0), ("hh_harmless", 2308, 4)],
)
def test_the_development_data(name: str, good: int, bad: int) -> None:
    reader = read_records(PACK / "pref" / f"{name}.jsonl.xz")
    prompts = [record["prompt"] for record in reader]
    assert (reader.good, reader.bad, dict(reader.formats)) == (good, bad, {"preference": good})
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    assert max(map(len, prompts)) > 5
