"""Question answering: the share of questions whose greedy answer equals the right one.

Questions about facts of the training text (`split` is `recall` or `train`) are counted apart from questions
about held-out facts (`split` begins with `heldout`): the first measure recall, the second generalisation.
Each share has a Wilson score interval, and the majority baseline of the same questions beside it.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.evaluate.evaluation import Block, EvaluationSetup, OnAnswer
from koine.evaluate.majority_baseline import ConstantAnswers, Topic, constant_answers
from koine.evaluate.wilson import effective_count, wilson_interval
from koine.fields import check_integer

if TYPE_CHECKING:
    from koine.tokenizer import Tokenizer

RECALL = "recall"
GENERALISATION = "generalisation"
UNMARKED = "unmarked"
# Questions are sorted by length within a chunk of this many batches.
_CHUNK_BATCHES = 16


@dataclass(frozen=True)
class Question:
    """A question as the model sees it, and its right answer."""

    prompt: list[int]
    answer: str
    language: str
    kind: str
    """`RECALL`, `GENERALISATION` or `UNMARKED`."""
    topic: Topic
    fact: str
    """Identifier of the fact, the same in every language and wording. "" where it is not known."""
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Answered:
    """A question with the model's answer."""

    question: Question
    output: str | None
    """None where the answer did not end."""
    right: bool


def question_accuracy(
    model: Any,
    tokenizer: Tokenizer,
    records: Iterable[Mapping[str, Any]],
    *,
    training: Iterable[Mapping[str, Any]] = (),
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    device: str = "cpu",
    confidence: float = 0.95,
    on_answer: OnAnswer | None = None,
) -> dict[str, Any]:
    """Measure the share of exact answers by language and kind, each beside its majority baseline.

    Args:
        model: a causal LM.
        tokenizer: the model's.
        records: chats with `messages` and the right `answer`, and `language`, `split`, `kind` and `fact`
            where known. A final message of the assistant is not in the prompt; it is the answer where there
            is no `answer`.
        training: questions that the model was trained on, for the majority baseline. Without them the
            constant answers come from `records`; see `koine.evaluate.majority_baseline`.
        batch_size: questions at a time.
        max_new_tokens: length at which generation stops, and the answer counts as wrong. `None`: twice the
            tokens of the longest right answer of the batch, plus 8.
        device: where the model is.
        confidence: of the interval.
        on_answer: is called with each answer when all are there; the order depends on the length of the questions.

    Returns:
        `{"overall": {kind: {"value", "interval", "questions", "correct", "majority_baseline"}}, "languages":
        {code: {kind: {...}}}, "majority_baseline": {"answers_from", "answers": {code: {kind of question:
        answer}}}}` with the kinds `recall`, `generalisation` and, for records without a split, `unmarked`.
        Intervals are Wilson's; questions about one `fact` count as one cluster (`effective_count`).

    Raises:
        UserError: for records that are no questions, or none at all.
    """
    check_integer("the batch size", batch_size, low=1)
    answered = list(
        _answer_all(
            model, tokenizer, records, batch_size=batch_size, max_new_tokens=max_new_tokens, device=device
        )
    )
    if not answered:
        raise UserError("no questions to ask", hint="give records with messages and an answer")
    if on_answer is not None:
        for one in answered:
            on_answer(one.question.record, one.output, one.right)
    constant = constant_answers(
        (
            (topic_of(record), normalise(answer))
            for record in training
            if (answer := right_answer(record)[1]) is not None
        ),
        ((one.question.topic, normalise(one.question.answer)) for one in answered),
    )
    parts: dict[tuple[str, str], list[Answered]] = defaultdict(list)
    for one in answered:
        parts[one.question.language, one.question.kind].append(one)
    overall: dict[str, list[Answered]] = defaultdict(list)
    languages: dict[str, dict[str, Any]] = defaultdict(dict)
    kinds = (RECALL, GENERALISATION, UNMARKED)
    for code, kind in sorted(parts, key=lambda place: (place[0], kinds.index(place[1]))):
        part = parts[code, kind]
        overall[kind] += part
        languages[code][kind] = _measure(part, constant, confidence)
    topics = sorted({one.question.topic for one in answered})
    return {
        "overall": {kind: _measure(overall[kind], constant, confidence) for kind in kinds if kind in overall},
        "languages": dict(languages),
        "majority_baseline": {
            "answers_from": constant.source(topics),
            "answers": {
                code: {topic.kind: constant.answers[topic] for topic in topics if topic.language == code}
                for code in dict.fromkeys(topic.language for topic in topics)
            },
        },
    }


def _answer_all(
    model: Any,
    tokenizer: Tokenizer,
    records: Iterable[Mapping[str, Any]],
    *,
    batch_size: int,
    max_new_tokens: int | None,
    device: str,
) -> Iterator[Answered]:
    """Ask each question, those of similar length together."""
    stream = iter(records)
    while chunk := [question_of(record, tokenizer) for record in islice(stream, batch_size * _CHUNK_BATCHES)]:
        chunk.sort(key=lambda question: len(question.prompt))
        for start in range(0, len(chunk), batch_size):
            batch = chunk[start : start + batch_size]
            limit = max_new_tokens or 2 * max(len(tokenizer.encode(one.answer)) for one in batch) + 8
            outputs = greedy_answers(
                model, tokenizer, [one.prompt for one in batch], max_new_tokens=limit, device=device
            )
            for question, output in zip(batch, outputs, strict=True):
                right = output is not None and normalise(output) == normalise(question.answer)
                yield Answered(question, output, right)


def _measure(part: Sequence[Answered], constant: ConstantAnswers, confidence: float) -> dict[str, Any]:
    """Return share, interval and majority baseline of some answered questions."""
    count, correct = len(part), sum(one.right for one in part)
    # A question whose fact is not known depends on no other.
    facts = [one.question.fact or number for number, one in enumerate(part)]
    independent = effective_count([one.right for one in part], facts)
    baseline = sum(constant.is_right(one.question.topic, normalise(one.question.answer)) for one in part)
    return {
        "value": correct / count,
        "interval": list(wilson_interval(correct / count, independent, confidence=confidence)),
        "questions": count,
        "correct": correct,
        "majority_baseline": baseline / count,
    }


def normalise(text: str) -> str:
    """Apply NFC, make each run of white space one space, and strip the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def question_kind(record: Mapping[str, Any]) -> str:
    """Return `recall`, `generalisation`, or `unmarked` where the record has no known split."""
    split = str(record.get("split") or "").lower()
    if split.startswith(("heldout", "held-out", "held_out")):
        return GENERALISATION
    return RECALL if split in ("recall", "train") else UNMARKED


def topic_of(record: Mapping[str, Any]) -> Topic:
    """Return the language and the kind of question (`kind`) of a record."""
    return Topic(str(record.get("language") or "und"), str(record.get("kind") or ""))


def right_answer(record: Mapping[str, Any]) -> tuple[list[Any], str | None]:
    """Return the messages that ask, and the right answer; `None` where there is no answer."""
    messages, answer = list(record.get("messages") or ()), record.get("answer")
    if messages and messages[-1].get("role") == "assistant":
        answer = messages[-1].get("content") if answer is None else answer
        messages = messages[:-1]
    return messages, answer if isinstance(answer, str) and answer.strip() else None


def question_of(record: Mapping[str, Any], tokenizer: Tokenizer) -> Question:
    """Read a question; raises `UserError` where the record has no messages, no question or no answer."""
    where = f"question '{record.get('id', '?')}'"
    if not record.get("messages"):
        raise UserError(
            f"{where} has no messages", hint="give documents with --data, questions with --questions"
        )
    messages, answer = right_answer(record)
    if answer is None:
        raise UserError(f"{where} has no answer", hint='give each question an "answer"')
    if not messages:
        raise UserError(f"{where} asks nothing", hint="give it a message of the user")
    topic = topic_of(record)
    return Question(
        prompt=tokenizer.encode_messages(messages, generation_prompt=True)[0],
        answer=answer,
        language=topic.language,
        kind=question_kind(record),
        topic=topic,
        fact=str(record.get("fact") or ""),
        record=record,
    )


def greedy_answers(
    model: Any, tokenizer: Tokenizer, prompts: list[list[int]], *, max_new_tokens: int, device: str = "cpu"
) -> list[str | None]:
    """Return the greedy answer to each prompt (token ids); `None` where it did not end in `max_new_tokens`.

    Our decoder decodes with a KV cache. Any other causal LM runs the whole sequences at each step, padded on
    the right. Answers are short, every model supports it, and no row depends on its neighbours.
    """
    from koine.evaluate.log_likelihood import evaluating
    from koine.model import Decoder

    stops = {tokenizer.end_of_turn_id, tokenizer.eos_id, *getattr(model, "eos_ids", ())}
    if isinstance(model, Decoder):
        return _cached_answers(model, tokenizer, prompts, stops, max_new_tokens)
    rows = [list(prompt) for prompt in prompts]
    answers: list[str | None] = [None] * len(rows)
    running = list(range(len(rows)))
    with evaluating(model):
        for _ in range(max_new_tokens):
            if not running:
                break
            still_running = []
            next_tokens = _next_tokens(model, [rows[row] for row in running], device)
            for row, token in zip(running, next_tokens, strict=True):
                if token in stops:
                    answers[row] = tokenizer.decode(rows[row][len(prompts[row]) :])
                else:
                    rows[row].append(token)
                    still_running.append(row)
            running = still_running
    return answers


def _next_tokens(model: Any, rows: Sequence[Sequence[int]], device: str) -> Iterator[int]:
    """Run whole sequences and yield the greedy next token of each."""
    import torch

    lengths_b = torch.tensor([len(row) for row in rows], device=device)
    tokens_bt = torch.zeros(len(rows), int(lengths_b.max()), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens_bt[index, : len(row)] = torch.tensor(row)
    hidden_bth = model(tokens_bt.to(device))
    last_bh = hidden_bth[torch.arange(len(rows), device=device), lengths_b - 1]
    yield from model.logits(last_bh).argmax(dim=-1).tolist()


def _cached_answers(
    model: Any, tokenizer: Tokenizer, prompts: list[list[int]], stops: set[int], max_new_tokens: int
) -> list[str | None]:
    from koine.evaluate.log_likelihood import evaluating
    from koine.generate import generate
    from koine.generate.sampling import Sampling

    with evaluating(model):
        answers = generate(
            model, prompts, Sampling(max_new_tokens=max_new_tokens, temperature=0), stop_ids=tuple(stops)
        )
    return [tokenizer.decode(one.tokens[:-1]) if one.finish == "stop" else None for one in answers]


def measure_questions(setup: EvaluationSetup, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Run `question_accuracy` as an entry of the table of evaluations."""
    accuracy = question_accuracy(
        setup.model,
        setup.tokenizer,
        records,
        training=setup.training_questions,
        batch_size=setup.batch_size,
        device=setup.device,
        on_answer=setup.on_answer,
    )
    return {"questions": accuracy}


def question_blocks(result: Mapping[str, Any]) -> list[Block]:
    """Return a table: all questions, then each language; a row for each kind of question."""
    if "questions" not in result:
        return []
    questions = result["questions"]
    rows = [
        [
            name,
            kind,
            f"{measured['value']:.1%}",
            " – ".join(f"{end:.1%}" for end in measured["interval"]),
            f"{measured['majority_baseline']:.1%}",
            f"{measured['questions']:,}",
        ]
        for name, entry in {"all": questions["overall"], **questions["languages"]}.items()
        for kind, measured in entry.items()
    ]
    return [
        {
            "kind": "table",
            "title": "Exact answers (greedy)",
            "columns": ["", "kind", "right", "95 % interval", "majority baseline", "questions"],
            "rows": rows,
            "caption": f"{KINDS_IN_WORDS} {baseline_in_words(questions)} {INTERVAL_IN_WORDS}",
        }
    ]


KINDS_IN_WORDS = (
    "Recall: questions about facts that the training text states. "
    "Generalisation: questions about facts that it does not state."
)
INTERVAL_IN_WORDS = "Intervals are 95 % Wilson score intervals; questions about one fact count as a cluster."


def baseline_in_words(questions: Mapping[str, Any]) -> str:
    """Return the definition of the majority baseline, for the caption of a table."""
    return (
        "Majority baseline: the share that one constant answer for each language and kind of question gets "
        f"right, the most frequent one among the {questions['majority_baseline']['answers_from']}."
    )
