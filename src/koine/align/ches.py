"""CHES scores: which pairs a preference loss is likeliest to lower the chosen answer's likelihood of.

The centred hidden embedding similarity of a pair (arXiv 2410.08847, definition 2), with `h` the input of the
output head that predicts a token, summed over the answer's tokens `w` (chosen) and `l` (rejected):

    CHES            = <sum h_w, sum h_l> - |sum h_w|^2
    normalised CHES = <mean h_w, mean h_l> - |mean h_w|^2

The states are those that predict the answer's tokens: the prompt's last one is among them, that of the
answer's last token is not. The greater the score, the more the likelihood of the chosen answer is expected to
fall. The sums of long answers are large, so pairs of different lengths are compared by the normalised score.

Shapes: n completion tokens, d hidden size, C completions, G pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ChesScores(NamedTuple):
    """CHES of pairs: of sums, and of means over tokens; each `[G]`."""

    sums: Tensor
    means: Tensor


def state_sums(hidden_nd: Tensor, completion_of_n: Tensor, completions: int) -> Tensor:
    """Return the hidden states summed over the tokens of each completion, `[C, d]` float32 or wider."""
    wide = torch.promote_types(hidden_nd.dtype, torch.float32)
    sums_cd = hidden_nd.new_zeros(completions, hidden_nd.shape[-1], dtype=wide)
    return sums_cd.index_add(0, completion_of_n, hidden_nd.to(wide))


def ches_scores(
    chosen_gd: Tensor, rejected_gd: Tensor, chosen_lengths_g: Tensor, rejected_lengths_g: Tensor
) -> ChesScores:
    """Return the CHES scores of pairs from their summed states and their numbers of tokens."""
    product_g = (chosen_gd * rejected_gd).sum(-1)
    square_g = chosen_gd.square().sum(-1)
    means = product_g / (chosen_lengths_g * rejected_lengths_g) - square_g / chosen_lengths_g**2
    return ChesScores(product_g - square_g, means)
