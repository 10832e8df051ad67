"""`koine model describe`: the numbers that it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from koine.cli.model import model
from koine.errors import UserError
from koine.model import PRESETS, Decoder, preset, save_model


def described(*arguments: str) -> str:
    return CliRunner().invoke(model, ["describe", *arguments], catch_exceptions=False).output


def test_the_numbers_of_the_largest_preset() -> None:
    """Eight full and 24 windowed (4,096) layers, 8 KV heads of 128, two bytes: a position costs 2 * 8 * 128 * 2 = 4,096 bytes a layer.

    8k: 8 * 8,192 + 24 * 4,095 = 163,816 positions; all full: 32 * 8,192 = 262,144.
    128k: 8 * 131,072 + 24 * 4,095 = 1,146,856; all full: 4,194,304.
    Forward at one token: 2 * (8,028,033,024 - 33 norms of 4,096) for the matrices (the tied embedding is the output matrix) and
    4 * 4,096 for one pair in each of 32 layers.
    """
    got = json.loads(described("koine-8b", "--length", "1", "--json"))
    assert got["model_type"] == "cohere2"
    assert got["parameters"]["total"] == 8_028_033_024
    assert got["cache_bytes"]["per_token"] == 32 * 4_096
    assert got["cache_bytes"]["8k"] == 163_840 * 4_096
    assert got["cache_bytes"]["8k_share_of_all_full"] == 163_840 / 262_144
    assert got["cache_bytes"]["128k"] == 1_146_880 * 4_096
    assert got["cache_bytes"]["128k_share_of_all_full"] == 1_146_880 / 4_194_304
    forward = 2 * (8_028_033_024 - 33 * 4_096) + 32 * 4 * 4_096
    assert got["flops_per_token"] == {"forward": forward, "training": 3 * forward}
    table = described("koine-8b")
    assert "8,028,033,024" in table
    assert "4,697,620,480" in table


def test_every_preset_is_the_size_of_its_name() -> None:
    totals = {one["preset"]: one["parameters"] for one in json.loads(described("--json"))["presets"]}
    assert totals.keys() == PRESETS.keys()
    units = {"m": 1e6, "b": 1e9}
    for name, total in totals.items():
        size = name.removeprefix("koine-")
        assert abs(total / (float(size[:-1]) * units[size[-1]]) - 1) < 0.12, name
    assert min(totals.values()) < 0.6e6
    assert max(totals.values()) > 8e9


def test_a_directory(tmp_path: Path) -> None:
    config = preset("koine-0.5m", 300)
    save_model(Decoder(config), tmp_path / "model")
    got = json.loads(described(str(tmp_path / "model"), "--json"))
    assert got["vocab_size"] == 300
    assert got["parameters"]["total"] == sum(p.numel() for p in Decoder(config).parameters())


def test_describing_eight_billion_parameters_allocates_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was made")

    for name in ("empty", "zeros", "ones", "randn"):
        monkeypatch.setattr(torch, name, refuse)
    assert "8,028,033,024" in described("koine-8b")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'koine-35m'"):
        described("koine-36m")
    with pytest.raises(UserError, match="no such model directory; give a folder"):
        described("runs/nothing/model")
    with pytest.raises(UserError, match="holds no config.json"):
        described(str(tmp_path))
    save_model(Decoder(preset("koine-0.5m", 300)), tmp_path)
    with pytest.raises(UserError, match="--vocab-size is for presets"):
        described(str(tmp_path), "--vocab-size", "400")
