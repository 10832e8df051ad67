"""Reward for an answer in the language that was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from koine.align.rewards.answers import asked_language
from koine.align.rewards.reward import Conversation, Record, RewardFailure
from koine.fields import check_number
from koine.language_id import UNDETERMINED, identify
from koine.languages import parse_languages


@dataclass(frozen=True, kw_only=True)
class Language:
    """1 where the completion is in the record's `language`, else 0 (`koine.language_id`).

    candidates: codes of all languages that completions may have, separated by spaces; empty for all that can be
        identified. Short answers are identified much better among few languages.
    soft: give the probability of the asked language in place of 1.
    undetermined: value of a completion without letters (a number); without it such a completion is a failure.
    """

    candidates: str = ""
    soft: bool = False
    undetermined: float | None = None

    def __post_init__(self) -> None:
        if self.candidates:
            parse_languages(",".join(self.candidates.split()))
        if self.undetermined is not None:
            check_number("undetermined", self.undetermined)

    def check(self, record: Record) -> None:
        """Raise `UserError` for a record without a language."""
        asked_language(record)

    def __call__(self, conversation: Conversation, completion: str, record: Record) -> float:
        """Return the value; raise `RewardFailure` where the completion has no letters."""
        asked = asked_language(record)
        candidates = {*self.candidates.split(), asked} if self.candidates else None
        found = identify(completion, sorted(candidates) if candidates else None)
        if found.code == UNDETERMINED and found.probability == 0 and not any(map(str.isalpha, completion)):
            if self.undetermined is None:
                raise RewardFailure("the completion has no letters, so that its language cannot be told")
            return self.undetermined
        if found.code != asked:
            return 0.0
        return found.probability if self.soft else 1.0
