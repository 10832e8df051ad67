"""`koine train --lora-rank`, and `BASE+ADAPTER` wherever a command takes a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from koine.cli.main import cli
from koine.combine import merge_adapter
from koine.combine.adapters import split_adapter
from koine.model import load_model
from koine.model.lora.files import read_adapter
from tests.bad_inputs import worlds

TRAIN = (
    "train pretrain --model model --data tokens --steps 4 --batch-size 2 --sequence-length 32 --lora-rank 2"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a branch, an adapter and data."""
    worlds.having("text", "tokens", "model", "branch", "adapter")(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def koine(command: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, [*command.split(), "--json"], prog_name="koine", catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def same_weights(one: Path, other: Path) -> None:
    state = load_model(other).state_dict()
    for name, tensor in load_model(one).state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_train_evaluate_and_resume_an_adapter(place: Path) -> None:
    koine(f"{TRAIN} --learning-rate 0.05 --dtype float32 --out trained")
    assert not (place / "trained" / "config.json").exists()
    assert {path.name for path in (place / "trained").glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert (place / "trained" / "tokenizer.json").exists()
    before = (place / "trained" / "adapter_model.safetensors").read_bytes()
    assert koine(f"{TRAIN} --learning-rate 0.05 --dtype float32 --out trained")["steps"] == 4
    assert (place / "trained" / "adapter_model.safetensors").read_bytes() == before

    koine("model merge-adapter model trained --out whole")
    evaluate = "evaluate {} --data text.jsonl --limit 3"
    found = koine(evaluate.format("model+trained"))
    assert found["overall"] == koine(evaluate.format("whole"))["overall"]
    assert found["overall"] != koine(evaluate.format("model"))["overall"]


def test_a_dry_run_counts_what_is_trained(place: Path) -> None:
    found = koine(f"{TRAIN} --dry-run --out trained")
    whole = koine(f"{TRAIN.replace('--lora-rank 2', '')} --dry-run --out trained")
    assert 0 < found["trained_parameters"] < found["parameters"] / 10
    assert found["peak_memory_bytes"] < whole["peak_memory_bytes"]
    assert found["disk_bytes"] < whole["disk_bytes"] / 10


def test_a_merge_takes_base_and_adapter(place: Path) -> None:
    merge_adapter(place / "model", place / "adapter", place / "whole")
    koine("merge task-arithmetic model+adapter branch --base model --weights 0.5,0.5 --out new")
    koine("merge task-arithmetic whole branch --base model --weights 0.5,0.5 --out wanted")
    same_weights(place / "new", place / "wanted")
    record = json.loads((place / "new" / "artifact.json").read_text())
    assert [one["name"] for one in record["parents"]] == ["model", "adapter", "branch"]
    assert record["parameters"]["models"] == ["model+adapter", "branch"]
    assert "- model+adapter" in (place / "new" / "README.md").read_text()


def test_upcycling_and_extending_take_them_too(place: Path) -> None:
    merge_adapter(place / "model", place / "adapter", place / "whole")
    found = koine("upcycle btx --seed-model model --experts code=model+adapter branch --out new")
    assert found["experts"] == ["seed", "code", "branch"]
    koine("upcycle btx --seed-model model --experts code=whole branch --out wanted")
    same_weights(place / "new", place / "wanted")
    found = koine("extend new --expert model+adapter --reset-router --out more")
    assert found["experts"][-1] == "adapter"


def test_an_adapter_on_an_adapter(place: Path) -> None:
    merge_adapter(place / "model", place / "adapter", place / "whole")
    koine(f"{TRAIN.replace('--model model', '--model whole')} --learning-rate 0.05 --out second")
    assert split_adapter("model+adapter+second") == ("model+adapter", "second")
    evaluate = "evaluate {} --data text.jsonl --limit 3"
    assert koine(evaluate.format("model+adapter+second")) == koine(evaluate.format("whole+second"))
    assert koine("model describe model+adapter")["parameters"] == koine("model describe model")["parameters"]


def test_a_folder_whose_name_holds_a_plus_is_that_folder(place: Path) -> None:
    (place / "branch").rename(place / "model+adapter")
    found = koine("evaluate model+adapter --data text.jsonl --limit 3")
    (place / "model+adapter").rename(place / "branch")
    assert found["overall"] == koine("evaluate branch --data text.jsonl --limit 3")["overall"]
    (place / "adapter").rename(place / "an+adapter")
    (place / "model").rename(place / "a+model")
    assert split_adapter("a+model+an+adapter") == ("a+model", "an+adapter")


def test_a_checkpoint_is_exported_as_an_adapter(place: Path) -> None:
    koine(
        f"{TRAIN} --checkpoint-every 2 --evaluate-every 2 --evaluate-data text.jsonl --evaluate-limit 1 --out trained"
    )
    [checkpoint] = (place / "trained" / "checkpoints").iterdir()
    koine(f"model export {checkpoint} --format safetensors --dtype bfloat16 --out small")
    assert read_adapter(place / "small").modules == read_adapter(checkpoint).modules
    koine(f"evaluate model+{checkpoint} --data text.jsonl --limit 1")


def test_nothing_is_left_when_the_command_ends(place: Path) -> None:
    temporary = place / "temporary"
    temporary.mkdir()
    subprocess.run(
        [sys.executable, "-m", "koine", "model", "describe", "model+adapter"],
        check=True,
        capture_output=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "koine",
            *["evaluate", "model+adapter", "--data", "text.jsonl", "--limit", "1"],
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert [path.name for path in temporary.iterdir() if path.name.startswith("koine-")] == []
