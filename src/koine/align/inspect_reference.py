"""Read pairs with a model before training: its accuracy on them, and their CHES scores.

Shapes: d hidden size, C completions, G pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from koine.align.ches import ches_scores, state_sums
from koine.align.log_probabilities import head_log_probabilities, predicting_states
from koine.align.source_batches import source_batches
from koine.data.groups import Group, fewest_tokens
from koine.data.shards import TokenSource
from koine.model.language_model import LanguageModel


class PairReading(NamedTuple):
    """What a model says of a pair; log-probabilities in nats.

    ches, ches_means: see `koine.align.ches`.
    """

    group: Group
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    ches: float
    ches_means: float

    @property
    def margin(self) -> float:
        """Log-probability of the chosen answer minus that of the rejected one."""
        return self.chosen - self.rejected

    @property
    def margin_of_means(self) -> float:
        """The same of log-probabilities a token."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


def read_pairs(
    model: LanguageModel,
    source: TokenSource,
    groups: Iterable[int],
    *,
    time: int,
    rows: int = 4,
    device: str = "cpu",
) -> Iterator[PairReading]:
    """Yield what a model says of some pairs of a source, in their order, a few rows at a time.

    The model is on `device` already. Of a group with revisions only the answers to the prompt are read; pairs
    that fit no row of `time` tokens are left out.
    """
    fitting = (number for number in groups if fewest_tokens(source.segments(number)) <= time)
    for packed, _ in source_batches(source, source.path.name, fitting, time=time, rows=rows):
        batch = packed.to(device)
        with torch.inference_mode():
            hidden_nd, targets_n = predicting_states(model, batch)
            tokens_n = head_log_probabilities(model, hidden_nd, targets_n)
            sums_c = tokens_n.new_zeros(batch.completions).index_add(0, batch.completion_of, tokens_n)
            states_cd = state_sums(hidden_nd, batch.completion_of, batch.completions)
            lengths_c = batch.completion_lengths
            # The first completion of each group is the chosen one, the second the rejected one.
            first_g = torch.searchsorted(
                batch.group_of, torch.arange(len(batch.groups), device=batch.group_of.device)
            )
            both = (first_g, first_g + 1)
            scores = ches_scores(*(states_cd[one] for one in both), *(lengths_c[one] for one in both))
            columns = [
                *(sums_c[one].tolist() for one in both),
                *(lengths_c[one].tolist() for one in both),
                scores.sums.tolist(),
                scores.means.tolist(),
            ]
        for index, group in enumerate(batch.groups):
            chosen, rejected, chosen_tokens, rejected_tokens, ches, means = (one[index] for one in columns)
            yield PairReading(group, chosen, rejected, chosen_tokens, rejected_tokens, ches, means)
