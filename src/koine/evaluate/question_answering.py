"""Question answering: the share of questions whose greedy answer equals the right one.

Questions about facts of the training text (`split` is `recall` or `train`) are counted apart from questions
about held-out facts (`split` begins with `heldout`): the first measure recall, the second generalisation.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.evaluate.bootstrap import bootstrap_interval
from koine.evaluate.evaluation import Block, EvaluationSetup, OnAnswer, format_interval
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
    record: Mapping[str, Any]


def question_accuracy(
    model: Any,
    tokenizer: Tokenizer,
    records: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    device: str = "cpu",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    on_answer: OnAnswer | None = None,
) -> dict[str, Any]:
    """Measure the share of exact answers, with a bootstrap interval over questions, by language and kind.

    Args:
        model: a causal LM.
        tokenizer: the model's.
        records: chats with `messages` and the right `answer`, and `language` and `split` where known. A final
            message of the assistant is not in the prompt; it is the answer where there is no `answer`.
        batch_size: questions at a time.
        max_new_tokens: length at which generation stops, and the answer counts as wrong. `None`: twice the
            tokens of the longest right answer of the batch, plus 8.
        device: where the model is.
        confidence: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        on_answer: is called with each answer; the order depends on the length of the questions.

    Returns:
        `{"overall": {kind: {"value", "interval", "questions", "correct"}}, "languages": {code: {kind:
        {...}}}}` with the kinds `recall`, `generalisation` and, for records without a split, `unmarked`.

    Raises:
        UserError: for records that are no questions, or none at all.
    """
    check_integer("the batch size", batch_size, low=1)
    correct: dict[tuple[str, str], list[float]] = defaultdict(list)
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
                correct[question.language, question.kind].append(float(right))
                if on_answer is not None:
                    on_answer(question.record, output, right)
    if not correct:
        raise UserError("no questions to ask", hint="give records with messages and an answer")

    def measure(values: Sequence[float]) -> dict[str, Any]:
        interval = bootstrap_interval(values, confidence=confidence, resamples=resamples, seed=seed)
        return {
            "value": sum(values) / len(values),
            "interval": None if interval is None else list(interval),
            "questions": len(values),
            "correct": int(sum(values)),
        }

    overall: dict[str, list[float]] = defaultdict(list)
    languages: dict[str, dict[str, Any]] = defaultdict(dict)
    for (code, kind), values in sorted(correct.items()):
        overall[kind] += values
        languages[code][kind] = measure(values)
    kinds = (RECALL, GENERALISATION, UNMARKED)
    return {
        "overall": {kind: measure(overall[kind]) for kind in kinds if kind in overall},
        "languages": dict(languages),
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


def question_of(record: Mapping[str, Any], tokenizer: Tokenizer) -> Question:
    """Read a question; raises `UserError` where the record has no messages, no question or no answer."""
    where = f"question '{record.get('id', '?')}'"
    messages = record.get("messages")
    if not messages:
        raise UserError(
            f"{where} has no messages", hint="give documents with --data, questions with --questions"
        )
    answer = record.get("answer")
    if messages[-1].get("role") == "assistant":
        answer = messages[-1].get("content") if answer is None else answer
        messages = messages[:-1]
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{where} has no answer", hint='give each question an "answer"')
    if not messages:
        raise UserError(f"{where} asks nothing", hint="give it a message of the user")
    return Question(
        prompt=tokenizer.encode_messages(messages, generation_prompt=True)[0],
        answer=answer,
        language=str(record.get("language") or "und"),
        kind=question_kind(record),
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
        batch_size=setup.batch_size,
        device=setup.device,
        seed=setup.seed,
        on_answer=setup.on_answer,
    )
    return {"questions": accuracy}


def question_blocks(result: Mapping[str, Any]) -> list[Block]:
    """Return a table: all questions, then each language; three columns for each kind of question."""
    if "questions" not in result:
        return []
    questions = result["questions"]
    kinds = list(questions["overall"])
    columns = [""]
    for kind in kinds:
        columns += [kind, "95 % interval", "questions"]
    rows = []
    for name, entry in {"all": questions["overall"], **questions["languages"]}.items():
        row = [name]
        for kind in kinds:
            row += _cells(entry.get(kind))
        rows.append(row)
    return [{"kind": "table", "title": "Exact answers (greedy)", "columns": columns, "rows": rows}]


def _cells(measured: Mapping[str, Any] | None) -> list[str]:
    if measured is None:
        return ["", "", ""]
    return [
        f"{measured['value']:.1%}",
        format_interval(measured["interval"], 3),
        f"{measured['questions']:,}",
    ]
