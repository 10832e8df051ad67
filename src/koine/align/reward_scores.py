"""Scores of a reward model: one for each completion of a batch, or for each conversation.

Shapes: b rows, t columns, C completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koine.align.log_probabilities import segment_context
from koine.data.groups import GroupBatch
from koine.errors import UserError
from koine.model.decoder import Decoder
from koine.model.reward_model import RewardModel, load_reward_model
from koine.tokenizer import Tokenizer, load_tokenizer

TOKENS_OF_BATCH = 8192
"""Tokens of a forward pass, padding included; a longer conversation is alone in one."""


def completion_scores(model: RewardModel, batch: GroupBatch) -> Tensor:
    """Compute the score of each completion after its prompt, `[C]` float32 (float64 of a float64 model).

    It is the head's output at the completion's last token. Our own decoder computes a prompt once for all of
    its completions. Another class gets each completion in a row of its own.
    """
    if isinstance(model.backbone, Decoder):
        hidden_btd = model(batch.tokens, context=segment_context(model.backbone, batch))
    else:
        batch = batch.separate()
        hidden_btd = model(batch.tokens, attention_mask=(batch.document_ids >= 0).long())
    return model.scores(hidden_btd.flatten(0, 1)[last_positions(batch)])


def last_positions(batch: GroupBatch) -> Tensor:
    """Return `row * t + column` of the last token of each completion, `[C]` int64."""
    time = batch.tokens.shape[1]
    ends = [0] * batch.completions
    for one in batch.segments:
        if one.completion >= 0:
            ends[one.completion] = one.row * time + one.start + one.length - 1
    return torch.tensor(ends, dtype=torch.int64, device=batch.tokens.device)


@torch.inference_mode()
def token_scores(model: RewardModel, conversations: Sequence[Sequence[int]]) -> list[float]:
    """Return the score of each list of token ids, at its last token.

    Rows are packed where the model keeps documents apart; else each conversation is a row. Neighbours and
    padding change no score by more than rounding.
    """
    scores = [0.0] * len(conversations)
    for rows in _batches(conversations, packed=model.isolates_documents):
        time = max(sum(len(conversations[number]) for number in row) for row in rows)
        tokens = torch.zeros(len(rows), time, dtype=torch.int64)
        documents = torch.full((len(rows), time), -1, dtype=torch.int32)
        numbers: list[int] = []
        ends: list[int] = []
        for index, row in enumerate(rows):
            start = 0
            for place, number in enumerate(row):
                end = start + len(conversations[number])
                tokens[index, start:end] = torch.tensor(conversations[number])
                documents[index, start:end] = place
                numbers.append(number)
                ends.append(index * time + end - 1)
                start = end
        hidden_btd = model(tokens.to(model.device), document_ids=documents.to(model.device))
        at = torch.tensor(ends, device=hidden_btd.device)
        found = model.scores(hidden_btd.flatten(0, 1)[at]).tolist()
        for number, score in zip(numbers, found, strict=True):
            scores[number] = score
    return scores


def _batches(conversations: Sequence[Sequence[int]], *, packed: bool) -> Iterator[list[list[int]]]:
    """Yield batches of rows of conversations, by number; the longest come first, so that little is padded."""
    order = sorted(range(len(conversations)), key=lambda number: (-len(conversations[number]), number))
    rows: list[list[int]] = []
    width = 0
    for number in order:
        length = len(conversations[number])
        if not rows:
            width = length
        if packed:
            room = next(
                (row for row in rows if sum(len(conversations[one]) for one in row) + length <= width), None
            )
            if room is not None:
                room.append(number)
                continue
        if rows and (len(rows) + 1) * width > TOKENS_OF_BATCH:
            yield rows
            rows, width = [], length
        rows.append([number])
    if rows:
        yield rows


@dataclass(frozen=True)
class RewardScorer:
    """A reward model with its tokenizer: scores conversations.

    path: the model's folder; None where it was never saved.
    """

    model: RewardModel
    tokenizer: Tokenizer
    path: Path | None = None

    def score(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
        """Return one score for each conversation, in order.

        A conversation is a list of messages, of which the last is the assistant's. Its tokens are those of
        training: up to the last that the assistant writes.

        Raises:
            UserError: a conversation does not end with an answer, or is longer than the model allows.
        """
        return token_scores(self.model, [self.encode(one) for one in conversations])

    def encode(self, conversation: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens of a conversation up to the end of the last answer."""
        if not conversation or conversation[-1].get("role") != "assistant":
            raise UserError(
                "a conversation to score does not end with an answer",
                hint="give messages of which the last has the role assistant",
            )
        ids, counted = self.tokenizer.encode_messages(conversation)
        end = max((index + 1 for index, counts in enumerate(counted) if counts), default=0)
        if not end:
            raise UserError("the answer to score has no tokens", hint="give an answer that is not empty")
        longest = self.model.context_length
        if longest is not None and end > longest:
            raise UserError(
                f"a conversation to score has {end} tokens, and the reward model takes at most {longest}",
                hint="cut the conversation, or use a reward model with a longer context",
            )
        return list(ids[:end])


def load_scorer(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> RewardScorer:
    """Open a reward model's folder with its tokenizer.

    Raises `UserError` for a folder that holds no reward model, or no tokenizer.
    """
    model = load_reward_model(path, dtype=dtype, device=device)
    return RewardScorer(model, load_tokenizer(path), Path(path))
