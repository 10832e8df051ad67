"""Weights of languages in tokenizer training (universal-tokenizer paper, Eq. 1).

    w_i = (wd_i * wb_i) / sum_n (wd_n * wb_n)

`wd_i` is the language's share of the data. `wb_i` depends on its bucket: the languages of the same family
*and* script. The paper allows two readings of the bucket's mass; both are here, as `bucket_mass`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from koine.errors import UserError
from koine.fields import check_choice, check_number

Scheme = Literal["bucketed", "natural", "uniform", "temperature"]
BucketMass = Literal["uniform", "data"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
BUCKET_MASSES: tuple[str, ...] = get_args(BucketMass)
ENGLISH = "en"


def language_weights(
    bytes_by_language: Mapping[str, int],
    *,
    scheme: Scheme = "bucketed",
    bucket_mass: BucketMass = "uniform",
    english_share: float | None = 0.30,
    temperature: float = 3.0,
) -> dict[str, float]:
    """Return weights that sum to 1, by language, in the order given.

    Args:
        bytes_by_language: bytes of text by language code.
        scheme: `bucketed`: Eq. 1 of the paper. `natural`: the share of the bytes. `uniform`: equal weights.
            `temperature`: proportional to share ** (1 / temperature).
        bucket_mass: for `bucketed`, with B buckets, `n_b` languages and `D_b` bytes in bucket b.
            `uniform`: `wb_i = 1 / (B n_b)`. `data`: `wb_i = D_b / n_b`.
        english_share: weight of English under any scheme; the others share the rest in proportion. `None`
            leaves English to the scheme. Without effect if English is absent or alone.
        temperature: 1 is natural, large is uniform.

    Raises:
        UserError: no language, a language without bytes, an unknown code or scheme, or a share outside (0,
            1).
    """
    if not bytes_by_language:
        raise UserError("no language to weigh", hint="give text in at least one language")
    for code, size in bytes_by_language.items():
        if size <= 0:
            raise UserError(f"language '{code}' has no text", hint="leave it out or add text")
    check_choice("scheme", scheme, SCHEMES)
    if english_share is not None and not 0.0 < english_share < 1.0:
        raise UserError(
            f"the share of English is {english_share}",
            hint="give a number between 0 and 1, or none for no fixed share",
        )
    total = sum(bytes_by_language.values())
    shares = {code: size / total for code, size in bytes_by_language.items()}
    if scheme == "bucketed":
        raw = _bucketed(shares, bucket_mass)
    elif scheme == "natural":
        raw = shares
    elif scheme == "uniform":
        raw = dict.fromkeys(shares, 1.0)
    else:
        check_number("temperature", temperature, above=0)
        raw = {code: share ** (1.0 / temperature) for code, share in shares.items()}
    return _pin_english(_normalise(raw), english_share)


def _bucketed(shares: Mapping[str, float], bucket_mass: str) -> dict[str, float]:
    """Return unnormalised weights of Eq. 1."""
    from koine.languages import bucket

    check_choice("bucket_mass", bucket_mass, BUCKET_MASSES)
    buckets = {code: bucket(code) for code in shares}
    members: dict[object, list[str]] = {}
    for code, key in buckets.items():
        members.setdefault(key, []).append(code)
    raw = {}
    for code, share in shares.items():
        inside = members[buckets[code]]
        mass = 1.0 / len(members) if bucket_mass == "uniform" else sum(shares[member] for member in inside)
        raw[code] = share * mass / len(inside)
    return raw


def _normalise(raw: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(raw.values())
    return {code: value / total for code, value in raw.items()}


def _pin_english(weights: dict[str, float], share: float | None) -> dict[str, float]:
    """Give English the weight `share`, and scale the others."""
    if share is None or ENGLISH not in weights or len(weights) == 1:
        return weights
    rest = 1.0 - weights[ENGLISH]
    return {
        code: share if code == ENGLISH else weight / rest * (1.0 - share) for code, weight in weights.items()
    }
