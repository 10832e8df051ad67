"""Token Distillation (Dobler, Elliott and de Melo 2025, arXiv 2505.20133): rows of new tokens that the model reads as it reads their spelling.

For a new token in a text, the model (teacher) reads the old tokens that spell it; the same model with the one new row in their place
(student) should have the same hidden states from there on. Only the new rows are trained, by the squared difference of the last
hidden states at the token's end and at the positions behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from koine.model.language_model import LanguageModel
from koine.tokenizer import Tokenizer
from koine.tokenizer.vocabulary_match import VocabularyMatch

BEFORE, BEHIND = 16, 16
"""Old tokens of context on each side of a new one."""
SNIPPETS = 16
"""Places of each new token that are learnt from, at most."""
BATCH = 64
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Snippet:
    """A place in a text where one new token stands for several old ones."""

    before: tuple[int, ...]
    spelled: tuple[int, ...]
    token: int
    behind: tuple[int, ...]


def snippets(
    before: Tokenizer, after: Tokenizer, match: VocabularyMatch, texts: Sequence[str]
) -> Iterator[Snippet]:
    """Places where a new token begins and ends where old ones do, at most `SNIPPETS` a token."""
    seen: dict[int, int] = {}
    for text in texts:
        old, new = before.encode(text), after.encode(text)
        old_ends, new_ends = _ends(before, old, text), _ends(after, new, text)
        if not old_ends or old_ends[-1] != new_ends[-1]:
            continue  # the two normalise this text differently
        place_of = {0: 0} | {end: index + 1 for index, end in enumerate(old_ends)}
        start = 0
        for token, end in zip(new, new_ends, strict=True):
            first, last = place_of.get(start), place_of.get(end)
            start = end
            if token in match.shared or first is None or last is None or last - first < 2:
                continue
            if seen.get(token, 0) >= SNIPPETS:
                continue
            seen[token] = seen.get(token, 0) + 1
            yield Snippet(
                (before.bos_id, *old[max(0, first - BEFORE) : first]),
                tuple(old[first:last]),
                token,
                tuple(old[last : last + BEHIND]),
            )


def _ends(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Where each token ends in the bytes of the text, a space that the tokenizer puts before every text not counted."""
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
    """`start` `[new_size, hidden]` with the rows of the new tokens that occur in `texts` trained; the others stay as they are."""
    found = list(snippets(before, after, match, texts))
    if not found:
        return start
    embedding = model.input_embedding
    old = embedding.weight
    assert isinstance(old, Tensor)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rows = nn.Parameter(start.detach().to(torch.float32).clone())
    optimiser = torch.optim.Adam([rows], lr=learning_rate * float(old.detach().float().std()))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    handle = None
    try:
        for at in range(0, len(order), BATCH):
            batch = [found[index] for index in order[at : at + BATCH]]
            with torch.no_grad():
                teacher = model(_padded([[*s.before, *s.spelled, *s.behind] for s in batch]))
            places = [len(s.before) for s in batch]
            chosen = torch.tensor([s.token for s in batch])

            def put(
                module: nn.Module,
                inputs: tuple[Tensor, ...],
                output: Tensor,
                places: list[int] = places,
                chosen: Tensor = chosen,
            ) -> Tensor:
                output = output.clone()
                output[torch.arange(len(places)), torch.tensor(places)] = rows[chosen].to(output.dtype)
                return output

            handle = embedding.register_forward_hook(put)
            student = model(_padded([[*s.before, 0, *s.behind] for s in batch]))
            handle.remove()
            loss = torch.zeros(())
            for index, snippet in enumerate(batch):
                first = len(snippet.before)
                count = 1 + len(snippet.behind)
                wanted = teacher[index, first + len(snippet.spelled) - 1 :][:count]
                loss = loss + (student[index, first : first + count] - wanted).float().square().mean()
            optimiser.zero_grad()
            (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    finally:
        if handle is not None:
            handle.remove()
    trained = torch.zeros(len(rows), dtype=torch.bool)
    trained[[snippet.token for snippet in found]] = True
    return torch.where(trained[:, None], rows.detach(), start.to(torch.float32)).to(start.dtype)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Ids padded on the right, where a causal model's earlier positions do not see them."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
