"""Build an endpoint's calls from conversations: content, cache key, and worst-case cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from koine.errors import UserError
from koine.generate.messages import Message
from koine.generate.remote.budget import Budget
from koine.generate.remote.protocol import LengthField, max_prompt_tokens, request_body
from koine.generate.remote.response_cache import request_key
from koine.generate.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request.

    number: of the first conversation that needs it, from 1.
    key: its key in the cache, the hash of `request`.
    content: the body to send.
    prompt_tokens, completion_tokens, cost: upper bounds of one attempt; the cost is 0 without a budget.
    """

    number: int
    key: str
    request: dict[str, Any]
    content: bytes
    prompt_tokens: int
    completion_tokens: int
    cost: Decimal

    @property
    def name(self) -> str:
        """Name of the call in messages."""
        return f"conversation {self.number}"


@dataclass(frozen=True, kw_only=True)
class CallEstimate:
    """The calls, tokens and money that `generate` would need.

    calls: calls to make. cached: completions in the cache.
    prompt_tokens, completion_tokens: upper bounds.
    cost: upper bound in the budget's currency, without retries; None without a budget.
    """

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    cost: Decimal | None

    def described(self) -> str:
        """Return the estimate in one line."""
        price = "" if self.cost is None else f", a cost of {self.cost.normalize():f}"
        return (
            f"{self.calls:,} calls ({self.cached:,} answers are in the cache), at most "
            f"{self.prompt_tokens:,} tokens of prompts and {self.completion_tokens:,} of answers{price}"
        )


def build_calls(
    conversations: Sequence[Sequence[Message]],
    sampling: Sampling,
    *,
    url: str,
    model: str,
    length_field: LengthField,
    log_probabilities: bool,
    budget: Budget | None,
) -> list[Call]:
    """Return one call for each conversation, in order. Equal calls have equal keys.

    At temperature 0 equal conversations are one call. Above, conversation i has the seed `seed + i`; without
    a seed, the first, second, ... occurrence of the same conversation are different calls.
    Raises `UserError` for messages or settings that cannot be sent.
    """
    greedy = sampling.temperature == 0
    occurrences: Counter[str] = Counter()
    calls = []
    for index, messages in enumerate(conversations):
        body = request_body(
            model,
            messages,
            sampling,
            seed=None if sampling.seed is None or greedy else sampling.seed + index,
            length_field=length_field,
            log_probabilities=log_probabilities,
        )
        try:
            content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except (TypeError, ValueError) as error:
            raise UserError(
                f"conversation {index + 1} cannot be sent ({error})", hint="give messages of valid text"
            ) from None
        request: dict[str, Any] = {"url": url, "body": body}
        if not greedy and sampling.seed is None:
            same = request_key(request)
            occurrences[same] += 1
            request["draw"] = occurrences[same]
        prompt_tokens = max_prompt_tokens(body)
        calls.append(
            Call(
                number=index + 1,
                key=request_key(request),
                request=request,
                content=content,
                prompt_tokens=prompt_tokens,
                completion_tokens=sampling.max_new_tokens,
                cost=Decimal(0) if budget is None else budget.cost(prompt_tokens, sampling.max_new_tokens),
            )
        )
    return calls


def missing_calls(calls: Sequence[Call], known: Collection[str]) -> list[Call]:
    """Return the calls whose key is not in `known`, each once, in order."""
    first: dict[str, Call] = {}
    for call in calls:
        first.setdefault(call.key, call)
    return [call for key, call in first.items() if key not in known]
