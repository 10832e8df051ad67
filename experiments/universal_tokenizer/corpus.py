"""The experiment's corpus in the layout of the recipes; unseen languages belong to no role."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from koine.data import read_records
from koine.errors import UserError
from koine.plan import step
from koine.steps import estimates
from koine.steps.corpus_files import Roles, write_own_corpus


@step(version="2", estimate=estimates.own_text)
def experiment_corpus(
    texts: list[Path],
    chats: Path,
    *,
    primary: tuple[str, ...],
    expanded: tuple[str, ...],
    unseen: tuple[str, ...],
    unseen_with_chats: tuple[str, ...],
    max_bytes: int,
    out: Path,
) -> None:
    """Write documents of all languages, and chats of the expanded ones and `unseen_with_chats`.

    A chat of the pack asks in words for a command. Here the command is the question and the words are the
    answer, so that the model learns the language.

    Raises `UserError` where a language has no text or nothing held out.
    """
    for folder in ("documents", "documents-heldout", "questions"):
        shutil.rmtree(out / folder, ignore_errors=True)

    everyone = (*primary, *expanded, *unseen, *unseen_with_chats)
    chatting = (*expanded, *unseen_with_chats)

    def records() -> Iterator[dict[str, Any]]:
        for path in texts:
            yield from read_records(path, languages=everyone, split="all", max_bad_share=1.0)
        for record in read_records(chats, languages=chatting, split="all", max_bad_share=1.0):
            # An answer must fit behind its question into a training sequence.
            if sum(len(message["content"]) for message in record["messages"]) < 400:
                words, command = (message["content"] for message in record["messages"])
                yield {
                    **record,
                    "messages": [
                        {"role": "user", "content": command},
                        {"role": "assistant", "content": words},
                    ],
                }

    shares = write_own_corpus(
        records(),
        out,
        max_bytes=max_bytes,
        heldout_bytes=30_000,
        heldout_share=0.0,
        min_bytes=10_000,
    )
    missing = [code for code in everyone if code not in shares]
    missing += [code for code in unseen_with_chats if code in shares and not shares[code].chats]
    if missing:
        raise UserError(f"too little text of {', '.join(missing)}", hint="give the whole data pack")
    chat = tuple(code for code in expanded if shares[code].chats)
    Roles(primary=primary, expanded=expanded, chat=chat).save(out)
