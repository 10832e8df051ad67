"""Packing names of before 0.1.0 are still read: older runs, files and commands work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from koine.cli.train import train as train_command
from koine.data import DataOrder, Mixture, Phase, Source, tokenize
from koine.data.inspect_step import documents_at_step
from koine.errors import UserError
from koine.model import Decoder
from koine.train import LanguageModelling, TrainSettings, train
from tests.train.models import small_config

from .conftest import document, write_records

SETTINGS = TrainSettings(dtype="float32", threads=1, checkpoint_every=2, evaluate_every=1)


@pytest.fixture(scope="module")
def tokens(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    records = [{"id": str(n), "text": document(n), "language": "en"} for n in range(60)]
    tokenize(write_records(folder / "text.jsonl", records), tokenizer, out=folder / "tokens")
    return folder / "tokens"


def mixture(tokens: Path, **fields: Any) -> Mixture:
    source = Source(name="t", path=tokens, proportion=1.0, max_epochs=99)
    phase = Phase(name="p", steps=4, sources=(source,))
    return Mixture(phases=(phase,), sequence_length=64, batch_size=2, **fields)


class StoppedError(Exception):
    """Stands for a kill between two checkpoints."""


def run(tokens: Path, tokenizer: Path, out: Path, *, stop_at: int | None = None, **fields: Any) -> Decoder:
    def evaluate(model: nn.Module, done: int) -> dict[str, float]:
        if done == stop_at:
            raise StoppedError
        return {}

    torch.manual_seed(0)
    model = Decoder(small_config(350))
    order = DataOrder(mixture(tokens, **fields))
    train(
        model, LanguageModelling(), order, SETTINGS,
        out=out, tokenizer=tokenizer, evaluate=evaluate, progress=False, device="cpu",
    )  # fmt: skip
    return model


def rename_packing(record: Path, old: str, new: str) -> None:
    text = record.read_text()
    assert f'"packing": "{old}"' in text
    record.write_text(text.replace(f'"packing": "{old}"', f'"packing": "{new}"'))


@pytest.mark.parametrize(
    ("old", "new"), [("stream", "concat"), ("whole", "no_split"), ("alone", "one_per_row")]
)
def test_old_names_are_read_and_new_ones_written(tokens: Path, old: str, new: str) -> None:
    made = mixture(tokens, packing=old)
    assert made == mixture(tokens, packing=new)
    assert Mixture.from_json({**made.to_json(), "packing": old}).to_json()["packing"] == new


def test_the_command_accepts_old_names() -> None:
    context = train_command.commands["pretrain"].make_context(
        "pretrain", ["--packing", "whole", "--steps", "1", "--out", "o"], resilient_parsing=True
    )
    assert context.params["packing"] == "no_split"


def test_a_complete_run_of_the_version_before_is_recognised(
    tokens: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tokens, tokenizer, tmp_path)
    rename_packing(tmp_path / "training.json", "concat", "stream")
    assert documents_at_step(tmp_path, 1)
    weights = (tmp_path / "model.safetensors").stat().st_mtime_ns
    run(tokens, tokenizer, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(UserError, match="mixture.packing: concat -> no_split"):
        run(tokens, tokenizer, tmp_path, packing="no_split")


def test_a_checkpoint_of_the_version_before_resumes(tokens: Path, tokenizer: Path, tmp_path: Path) -> None:
    uninterrupted = run(tokens, tokenizer, tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(tokens, tokenizer, tmp_path / "out", stop_at=3)
    (checkpoint,) = (tmp_path / "out" / "checkpoints").glob("step-*")
    rename_packing(checkpoint / "checkpoint.json", "concat", "stream")
    resumed = run(tokens, tokenizer, tmp_path / "out")
    for name, tensor in resumed.named_parameters():
        assert torch.equal(tensor, dict(uninterrupted.named_parameters())[name])
