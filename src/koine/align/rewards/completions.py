"""Score files of completions: rows with a prompt and one or several completions become rows with scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from koine.align.rewards.reward import (
    Answered,
    ChecksRecords,
    Reward,
    RewardOutcome,
    score,
)
from koine.data.piped import local_copy, shown_name
from koine.data.readers import read_rows
from koine.errors import UserError
from koine.fields import short_repr
from koine.generate.messages import Message

Row = dict[str, Any]
BATCH = 256
"""Rows that are scored together: enough for a model's batches and for all sandboxes to be busy."""


def read_completions(path: Path, reward: Reward) -> Iterator[tuple[Row, list[Answered]]]:
    """Yield each row of a file with its completions to score.

    Args:
        path: JSON Lines or another kind of `koine.data.readers`, or a pipe. A row has a `prompt`, text or messages, and a
            `completion` or a list of `completions`, texts. Its other fields are the reward's.
        reward: checks each row.

    Raises:
        UserError: a row has another form, or lacks what the reward needs; says which.
    """
    file = local_copy(path)
    for place, row in read_rows(file):
        where = f"{shown_name(file)}, {place}"
        if isinstance(row, str):
            raise UserError(row, where=where)
        prompt = _messages(row.get("prompt"), where)
        if ("completion" in row) == ("completions" in row):
            raise UserError("must have either 'completion' or 'completions'", where=where)
        texts = [row["completion"]] if "completion" in row else row["completions"]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"completions are {short_repr(texts)}", where=where, hint="give one text or several"
            )
        if isinstance(reward, ChecksRecords):
            try:
                reward.check(row)
            except UserError as error:
                raise UserError(error.what, where=where, hint=error.hint) from error
        yield row, [Answered(prompt, text, row) for text in texts]


def score_rows(
    rows: Iterable[tuple[Row, list[Answered]]], reward: Reward, outcomes: list[RewardOutcome]
) -> Iterator[Row]:
    """Yield each row with the scores of its completions.

    A row with `completion` gets its `score`, None where the reward failed, and then the reason as `failure`. In a
    row with `completions` those that the reward failed for move to `failed`, each with its reason, so that
    `completions` and `scores` fit each other. A row without any scored completion has two empty lists.

    outcomes: gets the outcome of each completion, in order.
    """
    source = iter(rows)
    while batch := list(islice(source, BATCH)):
        found = score(reward, [answered for _, several in batch for answered in several])
        outcomes += found
        left = iter(found)
        for row, several in batch:
            yield _scored(row, [(one.completion, next(left)) for one in several])


def _scored(row: Row, scored: list[tuple[str, RewardOutcome]]) -> Row:
    if "completion" in row:
        ((_, outcome),) = scored
        failure = {} if outcome.failure is None else {"failure": outcome.failure}
        return {**row, "score": outcome.value, **failure}
    good = [(text, outcome.value) for text, outcome in scored if outcome.value is not None]
    failed = [
        {"completion": text, "failure": outcome.failure}
        for text, outcome in scored
        if outcome.failure is not None
    ]
    return {
        **row,
        "completions": [text for text, _ in good],
        "scores": [value for _, value in good],
        **({"failed": failed} if failed else {}),
    }


def _messages(prompt: Any, where: str) -> list[Message]:
    """Return the prompt's messages; raise `UserError` where it has none."""
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if (
        isinstance(prompt, list)
        and prompt
        and all(
            isinstance(message, dict)
            and all(isinstance(message.get(name), str) for name in ("role", "content"))
            for message in prompt
        )
    ):
        return [{"role": message["role"], "content": message["content"]} for message in prompt]
    raise UserError(
        f"the prompt is {short_repr(prompt)}",
        where=where,
        hint="give text, or messages with role and content",
    )
