"""Questions with one right answer each: how often does the model's greedy answer equal it?

Questions whose facts stood in the training text (`split` is `recall` or `train`) are counted apart from those whose
facts were held out (`split` begins with `heldout`): remembering and generalising are different things.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.evaluate.bootstrap import bootstrap_interval

if TYPE_CHECKING:
    from koine.tokenizer import Tokenizer

RECALL = "recall"
GENERALISATION = "generalisation"
UNMARKED = "unmarked"


def normalise(text: str) -> str:
    """NFC, runs of white space as one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def kind(record: Mapping[str, Any]) -> str:
    """`recall`, `generalisation`, or `unmarked` where the record names no split that we know."""
    split = str(record.get("split") or "").lower()
    if split.startswith(("heldout", "held-out", "held_out")):
        return GENERALISATION
    return RECALL if split in ("recall", "train") else UNMARKED


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
) -> dict[str, Any]:
    """Share of exact answers, with a bootstrap interval over questions, by language and kind.

    records: chats with `messages` and the right `answer` (or an assistant's last message instead of it), `language`,
        `split`. A final message of the assistant is not shown to the model.
    max_new_tokens: where an answer is cut; None: twice the tokens of the longest right answer of the batch, and 8.
        An answer that has not ended by then is wrong.
    Returns `{"overall": {kind: {"value", "interval", "questions", "correct"}}, "languages": {code: {kind: {...}}}}`
    with the kinds `recall`, `generalisation` and, for records without a split, `unmarked`.
    Raises `UserError` for records that are no questions, or none at all.
    """
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}", hint="give at least 1")
    marks: dict[tuple[str, str], list[float]] = defaultdict(list)
    stream = iter(records)
    while stretch := list(islice(stream, batch_size * 16)):
        asked = [_question(record, tokenizer) for record in stretch]
        order = sorted(range(len(asked)), key=lambda index: len(asked[index][0]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            limit = max_new_tokens or 2 * max(len(tokenizer.encode(asked[index][1])) for index in chosen) + 8
            answers = greedy_answers(
                model, tokenizer, [asked[index][0] for index in chosen], max_new_tokens=limit, device=device
            )
            for index, answer in zip(chosen, answers, strict=True):
                right = answer is not None and normalise(answer) == normalise(asked[index][1])
                record = stretch[index]
                marks[str(record.get("language") or "und"), kind(record)].append(float(right))
    if not marks:
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
    for (code, name), values in sorted(marks.items()):
        overall[name] += values
        languages[code][name] = measure(values)
    return {
        "overall": {
            name: measure(overall[name]) for name in (RECALL, GENERALISATION, UNMARKED) if name in overall
        },
        "languages": dict(languages),
    }


def _question(record: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[list[int], str]:
    """Ids of the prompt, and the right answer."""
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
    return tokenizer.encode_messages(messages, generation_prompt=True)[0], answer


def greedy_answers(
    model: Any, tokenizer: Tokenizer, prompts: list[list[int]], *, max_new_tokens: int, device: str = "cpu"
) -> list[str | None]:
    """The model's greedy answer to each prompt (token ids); None where it had not ended after `max_new_tokens`.

    Our decoder answers with its cache. Any other causal LM runs the whole sequences at each step, padded on the right: answers
    are short, every model can do it, and no row depends on its neighbours.
    """
    import torch

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
            lengths = torch.tensor([len(rows[row]) for row in running], device=device)
            tokens = torch.zeros(len(running), int(lengths.max()), dtype=torch.int64)
            for place, row in enumerate(running):
                tokens[place, : len(rows[row])] = torch.tensor(rows[row])
            hidden = model(tokens.to(device))
            last = hidden[torch.arange(len(running), device=device), lengths - 1]
            chosen = model.logits(last).argmax(dim=-1).tolist()
            going = []
            for row, token in zip(running, chosen, strict=True):
                if token in stops:
                    answers[row] = tokenizer.decode(rows[row][len(prompts[row]) :])
                else:
                    rows[row].append(token)
                    going.append(row)
            running = going
            if not running:
                break
    return answers


def _cached_answers(
    model: Any, tokenizer: Tokenizer, prompts: list[list[int]], stops: set[int], max_new_tokens: int
) -> list[str | None]:
    from koine.evaluate.log_likelihood import evaluating
    from koine.generate import generate
    from koine.generate.token_sampling import Sampling

    with evaluating(model):
        answers = generate(model, prompts, Sampling(max_new_tokens=max_new_tokens), stop_ids=tuple(stops))
    return [tokenizer.decode(one.tokens[:-1]) if one.finish == "stop" else None for one in answers]
