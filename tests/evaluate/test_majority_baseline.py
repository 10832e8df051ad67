"""The majority baseline, against counts by hand."""

from __future__ import annotations

from koine.evaluate.majority_baseline import TEST, TRAINING, Topic, constant_answers

EURO, LANGUAGE = Topic("en", "currency"), Topic("en", "language")
MARK = Topic("de", "currency")
TRAINED = [(EURO, "Euro"), (EURO, "Euro"), (EURO, "Yen"), (LANGUAGE, "French")]
ASKED = [(EURO, "Yen"), (EURO, "Yen"), (EURO, "Euro"), (LANGUAGE, "Thai"), (MARK, "Yen"), (MARK, "Euro")]


def test_answers_come_from_the_training_questions_where_there_are_any() -> None:
    constant = constant_answers(TRAINED, ASKED)
    # The test questions have "Yen" more often, and no question "French": a model could not know that.
    assert constant.answers[EURO] == "Euro"
    assert constant.answers[LANGUAGE] == "French"
    # No training question in German: the test questions' own, and of two equally frequent ones the first.
    assert constant.answers[MARK] == "Euro"
    assert constant.source([EURO, LANGUAGE]) == TRAINING
    assert constant.source([EURO, MARK]) == f"{TRAINING} and {TEST}"
    # By hand: Euro of 3, nothing of 1, Euro of 2.
    assert [constant.is_right(*asked) for asked in ASKED] == [False, False, True, False, False, True]


def test_without_training_questions_it_is_the_best_constant_answer() -> None:
    constant = constant_answers([], ASKED)
    # By hand: Yen is right twice of 3, Thai once of 1, Euro once of 2.
    assert [constant.is_right(*asked) for asked in ASKED] == [True, True, False, True, False, True]
    assert constant.source([EURO]) == TEST


def test_the_order_of_questions_does_not_matter() -> None:
    assert constant_answers(TRAINED[::-1], ASKED[::-1]) == constant_answers(TRAINED, ASKED)


def test_a_topic_without_questions_has_no_constant_answer() -> None:
    assert not constant_answers([], []).is_right(EURO, "Euro")
