"""Revise answers: the user asks for a better one, and the model answers again (SRPO, arXiv 2406.01660).

The turn that asks is part of the training's data (`koine data tokenize --revision`), and is saved with the model:
another wording is another task for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from koine.errors import UserError
from koine.fields import Fields, check_integer
from koine.files import read_json
from koine.generate.engine import Completion, Engine
from koine.generate.messages import Message
from koine.generate.sampling import Sampling


def revise(
    engine: Engine,
    conversations: Sequence[Sequence[Message]],
    *,
    revision: str,
    times: int = 1,
    sampling: Sampling | None = None,
) -> list[list[Completion]]:
    """Answer conversations and revise each answer some times; return all answers of each, the last one last.

    A revision reads the conversation and the answer before it only, as in training.

    Args:
        engine: generates the answers.
        conversations: each ends with the message to answer.
        revision: what the user says after an answer.
        times: revisions; 0: the first answer only.
        sampling: answers of round i sample with `seed + i * len(conversations)` and on; None: greedy decoding.

    Raises:
        UserError: a conversation leaves no room for an answer.
    """
    check_integer("times", times, low=0)
    if not revision.strip():
        raise UserError("the turn that asks for a revision is empty", hint="give a sentence")
    sampling = Sampling(temperature=0.0, seed=0) if sampling is None else sampling
    answers: list[list[Completion]] = [[] for _ in conversations]
    for number in range(times + 1):
        asked = [
            revision_turns(messages, before[-1].text, revision) if before else list(messages)
            for messages, before in zip(conversations, answers, strict=True)
        ]
        own = sampling
        if sampling.seed is not None:
            own = replace(sampling, seed=sampling.seed + number * len(conversations))
        for before, found in zip(answers, engine.generate(asked, own), strict=True):
            before.append(found)
    return answers


def revision_turns(conversation: Sequence[Message], answer: str, revision: str) -> list[Message]:
    """Return a conversation with an answer and the turn that asks for a better one."""
    return [
        *conversation,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": revision},
    ]


def saved_revision(model: Path) -> str | None:
    """Return the turn that asks for a revision, as the model's training used it; None where it used none.

    Raises `UserError` for a damaged `training.json`.
    """
    path = Path(model) / "training.json"
    if not path.exists():
        return None
    found = Fields(read_json(path), path, hint_if_broken="give the turn by --revision").value.get("revision")
    return found if isinstance(found, str) else None


def revision_for(model: Path, given: str | None) -> str:
    """Return the turn that was given, or else the model's own.

    Raises `UserError` where there is neither.
    """
    found = saved_revision(model) if given is None else given
    if found is None:
        raise UserError(
            "was not trained to revise: its training.json names no turn that asks for it",
            where=model,
            hint="train it with the loss srpo, or give the turn by --revision",
        )
    return found
