"""Token Distillation (Dobler, Elliott and de Melo 2025, arXiv 2505.20133): train the rows of new tokens.

The model (teacher) reads a text with the old tokens of a new token. The same model (student) reads it with
the one new token in their place, and should have the same hidden states from there on. Only the new rows are
trained, by the squared difference of the last hidden states at the token's end and at the positions after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from koine.model.language_model import LanguageModel
from koine.tokenizer import Tokenizer
from koine.tokenizer.vocabulary_match import VocabularyMatch

CONTEXT_BEFORE, CONTEXT_AFTER = 16, 16
"""Old tokens of context on each side of a new one."""
MAX_SNIPPETS = 16
"""Most snippets per new token."""
BATCH = 64
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Snippet:
    """A place in a text where one new token replaces several old ones."""

    preceding: tuple[int, ...]
    old_tokens: tuple[int, ...]
    token: int
    following: tuple[int, ...]


def snippets(
    before: Tokenizer, after: Tokenizer, match: VocabularyMatch, texts: Sequence[str]
) -> Iterator[Snippet]:
    """Yield places where a new token begins and ends at borders of old ones.

    At most `MAX_SNIPPETS` per token.
    """
    seen: dict[int, int] = {}
    for text in texts:
        old, new = before.encode(text), after.encode(text)
        old_ends, new_ends = _ends(before, old, text), _ends(after, new, text)
        if not old_ends or old_ends[-1] != new_ends[-1]:
            continue  # the two normalise this text differently
        index_of_end = {0: 0} | {end: index + 1 for index, end in enumerate(old_ends)}
        start = 0
        for token, end in zip(new, new_ends, strict=True):
            first, last = index_of_end.get(start), index_of_end.get(end)
            start = end
            if token in match.shared or first is None or last is None or last - first < 2:
                continue
            if seen.get(token, 0) >= MAX_SNIPPETS:
                continue
            seen[token] = seen.get(token, 0) + 1
            yield Snippet(
                (before.bos_id, *old[max(0, first - CONTEXT_BEFORE) : first]),
                tuple(old[first:last]),
                token,
                tuple(old[last : last + CONTEXT_AFTER]),
            )


def _ends(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Return where each token ends, in bytes of the text.

    A space that the tokenizer adds before every text is not counted.
    """
    parts = [tokenizer.token_bytes(token) for token in ids]
    total = -1 if b"".join(parts[:2]).startswith(b" ") and not text.startswith(" ") else 0
    ends = []
    for part in parts:
        total += len(part)
        ends.append(total)
    return ends


def distill_rows(
    model: LanguageModel,
    before: Tokenizer,
    after: Tokenizer,
    match: VocabularyMatch,
    start: Tensor,
    texts: Sequence[str],
    *,
    seed: int,
    learning_rate: float = LEARNING_RATE,
) -> Tensor:
    """Train the rows of the new tokens that occur in texts; the other rows stay.

    Args:
        model: with the old vocabulary; its own weights are frozen.
        before, after: the old and the new tokenizer.
        match: of their vocabularies.
        start: `[new_size, hidden]`, the rows to begin with.
        texts: to learn from.
        seed: of the order of the snippets.
        learning_rate: of Adam, times the standard deviation of the old rows.

    Returns:
        `[new_size, hidden]` in the dtype of `start`.
    """
    found = list(snippets(before, after, match, texts))
    if not found:
        return start
    old = model.input_embedding.weight
    assert isinstance(old, Tensor)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rows = nn.Parameter(start.detach().to(torch.float32).clone())
    optimiser = torch.optim.Adam([rows], lr=learning_rate * float(old.detach().float().std()))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    for at in range(0, len(order), BATCH):
        loss = _distillation_loss(model, rows, [found[index] for index in order[at : at + BATCH]])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    trained = torch.zeros(len(rows), dtype=torch.bool)
    trained[[snippet.token for snippet in found]] = True
    return torch.where(trained[:, None], rows.detach(), start.to(torch.float32)).to(start.dtype)


def _distillation_loss(model: LanguageModel, rows: Tensor, batch: Sequence[Snippet]) -> Tensor:
    """Compute the mean squared difference between hidden states of teacher and student.

    rows: `[new_size, hidden]`; the student's embedding of each new token.
    """
    with torch.no_grad():
        teacher = model(_padded([[*s.preceding, *s.old_tokens, *s.following] for s in batch]))
    places = torch.tensor([len(s.preceding) for s in batch])
    new_tokens = torch.tensor([s.token for s in batch])

    def put_new_rows(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[torch.arange(len(places)), places] = rows[new_tokens].to(output.dtype)
        return output

    handle = model.input_embedding.register_forward_hook(put_new_rows)
    try:
        student = model(_padded([[*s.preceding, 0, *s.following] for s in batch]))
    finally:
        handle.remove()
    loss = torch.zeros(())
    for index, snippet in enumerate(batch):
        first, count = len(snippet.preceding), 1 + len(snippet.following)
        expected = teacher[index, first + len(snippet.old_tokens) - 1 :][:count]
        loss = loss + (student[index, first : first + count] - expected).float().square().mean()
    return loss / len(batch)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Pad ids on the right; a causal model's earlier positions do not see the padding."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
