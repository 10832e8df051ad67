"""Mixtures from JSON: every field is of its type, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from koine.data import DataOrder, Mixture, tokenize
from koine.errors import UserError
from tests.data.conftest import document, write_records

SOUND: dict[str, Any] = {
    "phases": [
        {
            "name": "pretrain",
            "steps": 4,
            "sources": [{"name": "tales", "path": "tokens", "proportion": 1}],
            "long": {"every": 2, "sequence_length": 64, "batch_size": 1},
        }
    ],
    "sequence_length": 32,
    "batch_size": 2,
    "seed": 0,
    "packing": "concat",
}


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("source.languages", ["de"], r'languages of the source \'tales\' is \["de"\]; .*an object with numbers or null'),
        ("source.languages", {"de": "1"}, "languages of the source 'tales'"),
        ("source.languages", {"de": True}, "languages of the source 'tales'"),
        ("source.temperature", "3", 'temperature of the source \'tales\' is "3"; it must be a number or null'),
        ("source.proportion", True, "proportion of the source 'tales' is true; it must be a number"),
        ("source.min_tokens", 2.5, "min_tokens of the source 'tales' is 2.5; it must be an integer or null"),
        ("source.path", 3, "path of the source 'tales' is 3; it must be a string"),
        ("phase.steps", 4.0, "steps of the phase 'pretrain' is 4.0; it must be an integer"),
        ("phase.steps", True, "steps of the phase 'pretrain' is true; it must be an integer"),
        ("phase.name", None, "name of a phase is null; it must be a string"),
        ("phase.sources", {}, "sources of the phase 'pretrain' is {}; it must be a list"),
        ("phase.long", [2], r"long of the phase 'pretrain' is \[2\]; it must be an object or null"),
        ("long.every", 2.0, "every of a long rows is 2.0; it must be an integer"),
        ("batch_size", 2.0, "batch_size of a mixture is 2.0; it must be an integer"),
        ("seed", 1.5, "seed of a mixture is 1.5; it must be an integer"),
        ("packing", ["concat"], r'packing of a mixture is \["concat"\]; it must be "concat" or "no_split" or "one_per_row"'),
        ("cross_document_attention", "no", 'cross_document_attention of a mixture is "no"; it must be true or false'),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_refused_by_name(place: str, value: Any, says: str) -> None:
    given = copy.deepcopy(SOUND)
    phase = given["phases"][0]
    where, _, name = place.rpartition(".")
    {"": given, "phase": phase, "source": phase["sources"][0], "long": phase["long"]}[where][name] = value
    with pytest.raises(UserError, match=says):
        Mixture.from_json(given, where="mixture.json")


def test_numbers_may_be_whole_and_a_mixture_comes_back_from_its_own_json() -> None:
    mixture = Mixture.from_json(SOUND)
    assert Mixture.from_json(mixture.to_json(), relative_to=Path("/")).to_json() == mixture.to_json()


@pytest.mark.parametrize("temperature", [0.001, 1e-300])
def test_a_temperature_near_zero_draws_the_largest_language(
    temperature: float, tokenizer: Path, tmp_path: Path
) -> None:
    records = [{"id": str(n), "text": document(n), "language": "de" if n % 3 else "en"} for n in range(120)]
    tokens = tmp_path / "tokens"
    tokenize(write_records(tmp_path / "text.jsonl", records), tokenizer, out=tokens)
    given = copy.deepcopy(SOUND)
    del given["phases"][0]["long"]
    given["phases"][0]["sources"][0] |= {"path": str(tokens), "temperature": temperature}
    drawn = {use.language: use.tokens for use in DataOrder(Mixture.from_json(given)).usage()}
    assert np.argmax([drawn["de"], drawn["en"]]) == 0
    assert drawn["en"] <= 32
