"""Initialise embeddings of tokens that a model has not seen, from the embeddings it has.

| method | a new token's embedding | source |
|---|---|---|
| `random` | normal, with the standard deviation of the old ones | the random baseline of arXiv 2506.10766 |
| `mean` | the mean of all old ones | the mean baseline of arXiv 2506.10766, as a global mean; Hewitt 2021 |
| `subword-mean` | the mean over the old tokens that spell it | the same baseline, as the mean of the pieces |
| `focus` | a sparse convex combination of similar shared tokens | Dobler and de Melo 2023 (FOCUS) |

`distill` (Dobler, Elliott and de Melo 2025, Token Distillation) needs the model; see
`koine.model.adapt.token_distillation`. Shared tokens keep their embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from koine.tokenizer.vocabulary_match import VocabularyMatch

Method = Literal["random", "mean", "subword-mean", "focus", "distill"]
METHODS: tuple[str, ...] = get_args(Method)
AUXILIARY_SIZE = 100
CONTEXT = 3
"""Tokens on each side that count as a token's context."""


def initialise_rows(
    old: Tensor,
    match: VocabularyMatch,
    *,
    method: Method,
    generator: torch.Generator,
    auxiliary: Tensor | None = None,
) -> Tensor:
    """Return the embeddings of the new vocabulary, `[new_size, hidden]`.

    Computed in float32, returned in the dtype of `old`. A token that the old vocabulary cannot spell gets the
    mean (for `random`, a random row). `distill` starts from `subword-mean`.

    Args:
        old: embeddings of the old vocabulary, `[old_rows, hidden]`, with `old_rows >= old_size`.
        match: see `koine.tokenizer.vocabulary_match`.
        method: one of the table above.
        generator: for `random`.
        auxiliary: for `focus`, vectors of the new tokens, `[new_size, any]`; a row of zeros means unknown.
    """
    known = old[: match.old_size].to(torch.float32)
    new = torch.empty(match.new_size, old.shape[1])
    if method == "random":
        new.normal_(0.0, float(known.std()), generator=generator)
    else:
        new[:] = known.mean(dim=0)
    if method in ("subword-mean", "focus", "distill"):
        for index, ids in match.pieces.items():
            new[index] = known[list(ids)].mean(dim=0)
    if method == "focus":
        if auxiliary is None:
            raise ValueError("focus needs auxiliary vectors")
        _focus(new, known, match, auxiliary)
    for index, source in match.shared.items():
        new[index] = known[source]
    return new.to(old.dtype)


def _focus(new: Tensor, known: Tensor, match: VocabularyMatch, auxiliary: Tensor) -> None:
    """Fill the rows of new tokens with sparse combinations of similar shared tokens."""
    vectors = torch.nn.functional.normalize(auxiliary.to(torch.float32), dim=1)
    has = vectors.abs().sum(dim=1) > 0
    shared = torch.tensor([index for index in sorted(match.shared) if bool(has[index])], dtype=torch.long)
    wanted = torch.tensor([index for index in sorted(match.pieces) if bool(has[index])], dtype=torch.long)
    if not len(shared):
        return
    rows = known[[match.shared[int(index)] for index in shared]]
    for start in range(0, len(wanted), 1024):
        part = wanted[start : start + 1024]
        weights = sparsemax(vectors[part] @ vectors[shared].t())
        new[part] = weights @ rows


def sparsemax(scores: Tensor) -> Tensor:
    """Project each row of `scores`, `[rows, n]`, onto the simplex (Martins and Astudillo 2016).

    Few of the resulting weights are above 0.
    """
    ordered = scores.sort(dim=-1, descending=True).values
    total = ordered.cumsum(dim=-1) - 1.0
    rank = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    support = (ordered * rank > total).sum(dim=-1, keepdim=True)
    threshold = total.gather(-1, support - 1) / support.to(scores.dtype)
    return (scores - threshold).clamp(min=0.0)


def auxiliary_vectors(
    documents: Iterable[Sequence[int]], vocab_size: int, *, size: int = AUXILIARY_SIZE, context: int = CONTEXT
) -> Tensor:
    """Compute vectors that are similar for tokens in similar contexts, `[vocab_size, size]`.

    FOCUS trains fastText on the tokenized text. This is the factorisation that skip-gram converges to (Levy
    and Goldberg 2014): the leading singular vectors of the positive pointwise mutual information of token and
    context, times the root of the singular values. Tokens that do not occur get zeros.
    """
    import numpy as np

    keys: list[np.ndarray] = []
    waiting = 0
    pairs: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.int64), np.zeros(0, np.int64))

    def merged() -> tuple[np.ndarray, np.ndarray]:
        found, counts = np.unique(np.concatenate(keys), return_counts=True)
        together = np.concatenate((pairs[0], found))
        amounts = np.concatenate((pairs[1], counts))
        distinct, places = np.unique(together, return_inverse=True)
        return distinct, np.bincount(places, weights=amounts).astype(np.int64)

    for document in documents:
        ids = np.asarray(document, dtype=np.int64)
        for distance in range(1, context + 1):
            left, right = ids[:-distance], ids[distance:]
            keys += [left * vocab_size + right, right * vocab_size + left]
            waiting += 2 * len(left)
        if waiting > 20_000_000:
            pairs, keys, waiting = merged(), [], 0
    if keys:
        pairs = merged()
    if not len(pairs[0]):
        return torch.zeros(vocab_size, size)
    rows, columns = pairs[0] // vocab_size, pairs[0] % vocab_size
    counts = pairs[1].astype(np.float64)
    margin = np.bincount(rows, weights=counts, minlength=vocab_size)
    information = np.log(counts * counts.sum() / (margin[rows] * margin[columns]))
    keep = information > 0
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack((rows[keep], columns[keep]))),
        torch.from_numpy(information[keep]).to(torch.float32),
        (vocab_size, vocab_size),
    ).coalesce()
    width = min(size, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, _ = torch.svd_lowrank(matrix, q=width, niter=2)
    vectors = u * s.sqrt()
    known = torch.zeros(vocab_size, dtype=torch.bool)
    known[torch.from_numpy(rows[keep])] = True
    # For a token without any context, the factorisation gives only rounding errors.
    return vectors * known[:, None]
