"""Mixtures from JSON: a field of a wrong type is named in the error."""

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
        ("source.languages", ["de"], "source 'tales': languages is .'de'.; it must be an object of weights"),
        ("source.languages", {"de": "1"}, "source 'tales': the weight of 'de' is '1'; it must be a number"),
        ("source.languages", {"de": True}, "source 'tales': the weight of 'de' is True; it must be a number"),
        ("source.temperature", "3", "source 'tales': temperature is '3'; it must be a number"),
        ("source.proportion", True, "source 'tales': proportion is True; it must be a number"),
        ("source.min_tokens", 2.5, "source 'tales': min_tokens is 2.5; it must be an integer"),
        ("source.path", 3, "source 'tales': path is 3; it must be a string"),
        ("phase.steps", 4.0, "phase 'pretrain': steps is 4.0; it must be an integer"),
        ("phase.steps", True, "phase 'pretrain': steps is True; it must be an integer"),
        ("phase.name", None, "a phase: the field 'name' is missing; it needs name, steps, sources"),
        ("phase.sources", {}, "phase 'pretrain': the field 'sources' is {}; it must be a list"),
        ("phase.long", [2], r"phase 'pretrain': the field 'long' is \[2\]; it must be an object"),
        ("long.every", 2.0, "phase 'pretrain': long rows: every is 2.0; it must be an integer"),
        ("batch_size", 2.0, "mixture.json: batch_size is 2.0; it must be an integer"),
        ("seed", 1.5, "mixture.json: seed is 1.5; it must be an integer"),
        ("packing", ["concat"], r"packing is \['concat'\]; it must be one of concat, no_split, one_per_row"),
        ("cross_document_attention", "no", "cross_document_attention is 'no'; it must be true or false"),
    ],
)  # fmt: skip
def test_a_field_of_a_wrong_type_is_named(place: str, value: Any, says: str) -> None:
    given = copy.deepcopy(SOUND)
    phase = given["phases"][0]
    where, _, name = place.rpartition(".")
    {"": given, "phase": phase, "source": phase["sources"][0], "long": phase["long"]}[where][name] = value
    with pytest.raises(UserError, match=says):
        Mixture.from_json(given, where="mixture.json")


def test_integers_are_numbers_and_json_round_trips() -> None:
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
