"""Exact answers of a scripted model, against counts by hand."""

from __future__ import annotations

import pytest

from koine.errors import UserError
from koine.evaluate import question_accuracy, wilson_interval
from koine.evaluate.question_answering import greedy_answers, question_blocks
from koine.tokenizer import Tokenizer
from tests.evaluate.conftest import Scripted, Wrapped


def question(number: int, answer: str, split: str, language: str = "de") -> dict:
    return {
        "id": f"q{number}",
        "messages": [{"role": "user", "content": f"Frage {number}?"}],
        "answer": answer,
        "split": split,
        "language": language,
    }


def scripted(tokenizer: Tokenizer, outputs: list[tuple[dict, str, bool]]) -> Scripted:
    """A model that answers each question with the given text, and then ends or does not."""
    table: dict[tuple[int, ...], int] = {}
    for record, answer, ends in outputs:
        ids = tokenizer.encode_messages(record["messages"], generation_prompt=True)[0]
        for token in tokenizer.encode(answer) + [tokenizer.end_of_turn_id] * ends:
            table[tuple(ids)] = token
            ids = [*ids, token]
    return Scripted(tokenizer.vocab_size, table)


def test_right_answers_are_counted_by_language_and_kind(tokenizer: Tokenizer) -> None:
    outputs = [
        (question(1, "Berlin", "recall"), "Berlin", True),
        (question(2, "Bern", "recall"), "Berne", True),
        (question(3, "zwei  Euro", "heldout-fact"), " zwei Euro\n", True),  # white space does not matter
        (question(4, "Malm\u00f6", "heldout_territory"), "Malmo\u0308", True),  # nor the normal form
        (question(5, "Wien", "heldout"), "Wien", False),  # does not end: wrong
        (question(6, "東京", "recall", "ja"), "東京", True),
    ]
    model = scripted(tokenizer, outputs)
    results = [
        question_accuracy(model, tokenizer, [record for record, _, _ in outputs], batch_size=size)
        for size in (1, 4)
    ]
    assert results[0] == results[1]
    counts = {
        (code, kind): (entry["correct"], entry["questions"])
        for code, kinds in results[0]["languages"].items()
        for kind, entry in kinds.items()
    }
    assert counts == {
        ("de", "recall"): (1, 2),
        ("de", "generalisation"): (2, 3),
        ("ja", "recall"): (1, 1),
    }
    assert results[0]["overall"]["recall"]["value"] == pytest.approx(2 / 3)


def test_every_answer_is_handed_out_with_its_question(tokenizer: Tokenizer) -> None:
    outputs = [
        (question(1, "Berlin", "recall"), "Berlin", True),
        (question(2, "Bern", "recall"), "Berne", True),
        (question(3, "Wien", "recall"), "Wien", False),
    ]
    found = {}
    question_accuracy(
        scripted(tokenizer, outputs),
        tokenizer,
        [record for record, _, _ in outputs],
        on_answer=lambda record, answer, right: found.update({record["id"]: (answer, right)}),
    )
    assert found == {"q1": ("Berlin", True), "q2": ("Berne", False), "q3": (None, False)}


def test_the_majority_baseline_is_counted_beside_the_model(tokenizer: Tokenizer) -> None:
    def asked(number: int, answer: str, kind: str, language: str = "de") -> dict:
        return {**question(number, answer, "recall", language), "kind": kind}

    records = [
        asked(1, "Euro", "currency"),
        asked(2, "Euro", "currency"),
        asked(3, "Yen", "currency"),
        asked(4, "Thai", "language"),
        asked(5, "Yen", "currency", "ja"),
    ]
    trained = [asked(6, "Yen ", "currency"), asked(7, "Deutsch", "language"), {"text": "no question"}]
    model = scripted(tokenizer, [(record, record["answer"], True) for record in records])
    without = question_accuracy(model, tokenizer, records)
    # Euro, Euro and not Yen; Thai; Yen.
    assert without["languages"]["de"]["recall"]["majority_baseline"] == pytest.approx(3 / 4)
    assert without["overall"]["recall"]["majority_baseline"] == pytest.approx(4 / 5)
    assert without["majority_baseline"]["answers_from"] == "test questions"
    found = question_accuracy(model, tokenizer, records, training=trained)
    # The training questions say Yen and Deutsch, and nothing in Japanese.
    assert found["languages"]["de"]["recall"]["majority_baseline"] == pytest.approx(1 / 4)
    assert found["overall"]["recall"]["majority_baseline"] == pytest.approx(2 / 5)
    assert found["overall"]["recall"]["value"] == 1.0
    assert found["majority_baseline"] == {
        "answers_from": "training questions and test questions",
        "answers": {"de": {"currency": "Yen", "language": "Deutsch"}, "ja": {"currency": "Yen"}},
    }
    (block,) = question_blocks({"questions": found})
    assert block["rows"][0] == ["all", "recall", "100.0%", "56.6% – 100.0%", "40.0%", "5"]
    assert "training questions" in block["caption"]


def test_intervals_are_wilsons_over_facts(tokenizer: Tokenizer) -> None:
    records = [
        {**question(number, "Berlin", "recall", code), "fact": f"capital:{number}"}
        for number in range(4)
        for code in ("de", "ja")
    ]
    outputs = [(record, "Berlin" if record["id"] == "q0" else "Bern", True) for record in records]
    found = question_accuracy(scripted(tokenizer, outputs), tokenizer, records)
    one = wilson_interval(1 / 4, 4)
    assert found["languages"]["de"]["recall"]["interval"] == pytest.approx(one)
    # The same four facts in two languages tell no more than in one.
    assert found["overall"]["recall"]["interval"] == pytest.approx(one)
    assert found["overall"]["recall"]["questions"] == 8


def test_an_assistants_last_message_is_the_answer_and_is_not_shown(tokenizer: Tokenizer) -> None:
    record = question(1, "Berlin", "")
    model = scripted(tokenizer, [(record, "Berlin", True)])
    chat = {"messages": [*record["messages"], {"role": "assistant", "content": "Berlin"}], "language": "de"}
    assert question_accuracy(model, tokenizer, [chat])["overall"]["unmarked"]["value"] == 1.0


def test_greedy_answers_are_those_of_transformers(tokenizer: Tokenizer, llama: Wrapped) -> None:
    import torch

    prompts = [[5, *tokenizer.encode(text)] for text in ("Das", "東京は日本", "nicht weit von hier")]
    ours = greedy_answers(llama, tokenizer, prompts, max_new_tokens=300)
    for prompt, answer in zip(prompts, ours, strict=True):
        theirs = llama.model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=300,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=0,
        )[0].tolist()
        ended = theirs[-1] == tokenizer.eos_id
        assert answer == (tokenizer.decode(theirs[len(prompt) : -1]) if ended else None)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"id": "d", "text": "a document"}, "'d' has no messages"),
        ({"id": "e", "messages": [{"role": "user", "content": "?"}]}, "'e' has no answer"),
        ({"id": "f", "messages": [{"role": "assistant", "content": "!"}]}, "asks nothing"),
    ],
)
def test_invalid_questions_raise_a_user_error(tokenizer: Tokenizer, record: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        question_accuracy(None, tokenizer, [record])
    with pytest.raises(UserError, match="no questions"):
        question_accuracy(None, tokenizer, [])
