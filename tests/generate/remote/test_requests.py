"""A request's key in the response cache: it must not change, or paid responses are requested again."""

from __future__ import annotations

import pytest

from koine.generate.remote.requests import build_calls
from koine.generate.sampling import Sampling

# Keys of two equal conversations, as they were when the first caches were written.
KEYS: list[tuple[Sampling, list[str]]] = [
    (
        Sampling(),
        [
            "c2cf2da4f39e860f4232f87d1672c03b83096bb486e513f09c7fc53a4c6bd0c2",
            "e3e97517147f8640abcfd945471ba2a6f1d08d0efde78931d9b9e169f025a87f",
        ],
    ),
    (
        Sampling(temperature=0),
        [
            "5fb9831fabe9e3f342faaa3905773f001b7cfe276678d51897c8583ea45c17f5",
            "5fb9831fabe9e3f342faaa3905773f001b7cfe276678d51897c8583ea45c17f5",
        ],
    ),
    (
        Sampling(temperature=0.0),
        [
            "f00a490fb5873b38ffe06f2dbf58aeb740023cf999dd0c61a8ccfa226724cae5",
            "f00a490fb5873b38ffe06f2dbf58aeb740023cf999dd0c61a8ccfa226724cae5",
        ],
    ),
    (
        Sampling(seed=5),
        [
            "bad1acc6d9b6345239271af55f9a7f7f43e03312d0871458c17f1b733bac8c31",
            "8bc4ef750dc17ad17426273ef9d3996889de0e7021d32978abf2ad5e6d4af1c9",
        ],
    ),
    (
        Sampling(
            temperature=0.7,
            top_k=5,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.1,
            seed=3,
            max_new_tokens=7,
            stop=("END",),
            json_schema={"type": "object", "properties": {"b": {}, "a": {}}},
        ),
        [
            "39f6d4af4ae5aba2f8da44000604242208445e06e5c1632dcd6d6960a59049ed",
            "c874f6c69a2d1e9b9dc0bba1d29de38f6d261a769e03c14ee0a31e6879a5f152",
        ],
    ),
]


@pytest.mark.parametrize(("sampling", "keys"), KEYS, ids=["default", "greedy", "0.0", "seed", "all settings"])
def test_keys_of_cached_responses_stay(sampling: Sampling, keys: list[str]) -> None:
    calls = build_calls(
        [[{"role": "user", "content": "What is the currency of Japan?"}]] * 2,
        sampling,
        url="http://x/v1/chat/completions",
        model="m",
        length_field="max_tokens",
        log_probabilities=True,
        budget=None,
    )
    assert [call.key for call in calls] == keys
