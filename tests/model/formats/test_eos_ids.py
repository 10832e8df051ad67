"""The EOS ids of a model folder: read from both configurations, and saved again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from koine.model import Decoder, ModelConfig, load_model, save_model
from koine.model.formats.eos_ids import eos_ids


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 5]}, {"eos_token_id": 2}, {2, 3, 5}),
        ({"eos_token_id": 4}, {}, {4}),
        (None, {"text_config": {"eos_token_id": [6]}}, {6}),
        ({"eos_token_id": None}, {"eos_token_id": -1}, set()),
    ],
)
def test_eos_ids(generation: Any, config: Any, expected: set[int], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_ids(tmp_path) == expected


def test_eos_ids_of_our_decoder_are_loaded_and_saved(tiny: ModelConfig, tmp_path: Path) -> None:
    save_model(Decoder(tiny), tmp_path / "m")
    path = tmp_path / "m/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [98, 7]}))
    opened = load_model(tmp_path / "m")
    assert opened.eos_ids == {98, 7}
    save_model(opened, tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text())["eos_token_id"] == [98, 7]
