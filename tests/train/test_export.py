"""A checkpoint becomes a model directory with the weights of its step, in any architecture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from koine.cli.evaluate.commands import evaluate as evaluate_command
from koine.cli.model import model as model_command
from koine.cli.train import train as train_command
from koine.errors import UserError
from koine.model.causal_lm import load_causal_lm
from koine.model.config import MixtureConfig
from koine.model.decoder import Decoder
from koine.model.formats.directory import load_model
from koine.train import LanguageModelling, TrainSettings, train
from koine.train.export import export_checkpoint

from .fakes import fake_order
from .models import small_config, small_model
from .test_model_adapters import gpt2, llama, order
from .tokens import write_tokens

SETTINGS = TrainSettings(dtype="float32", threads=1, learning_rate=1e-2, checkpoint_every=2, evaluate_every=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def trained(model: nn.Module, data: Any, out: Path, **more: Any) -> dict[str, Tensor]:
    """Train to the end; return the weights after step 3, whose evaluation is the best."""
    kept: dict[str, Tensor] = {}

    def evaluate(model: nn.Module, done: int) -> dict[str, float]:
        if done == 3:
            kept.update({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
        return {"figure": abs(done - 3.0)}

    more = {"out": out, "evaluate": evaluate, "progress": False, "device": "cpu", **more}
    train(model, LanguageModelling(), data, SETTINGS, **more)
    return kept


def test_the_best_checkpoint_becomes_a_model(tmp_path: Path) -> None:
    kept = trained(small_model(), fake_order(tmp_path / "s", steps=(6,)), tmp_path / "o")
    checkpoint = tmp_path / "o" / "checkpoints" / "step-000003"
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-000003"]
    export_checkpoint(checkpoint, tmp_path / "model")
    found = load_model(tmp_path / "model").state_dict()
    assert found.keys() == kept.keys()
    for name, tensor in kept.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    export_checkpoint(checkpoint, tmp_path / "half", dtype=torch.bfloat16)
    assert load_model(tmp_path / "half").norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("make", [llama, gpt2])
def test_of_other_architectures_too(make: Any, made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    tokenizer, shards = made
    kept = trained(make(), order(shards, steps=4), tmp_path / "o", tokenizer=tokenizer)
    export_checkpoint(tmp_path / "o" / "checkpoints" / "step-000003", tmp_path / "model")
    stored = load_causal_lm(tmp_path / "model").stored_tensors()
    # Our decoder may open what was trained through `transformers`.
    found = {name.removeprefix("inner."): tensor for name, tensor in stored.items()}
    for name, tensor in kept.items():
        torch.testing.assert_close(found[name.removeprefix("inner.")], tensor, rtol=0, atol=0)
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_a_mixture_keeps_its_buffers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mixture = MixtureConfig(experts=("a", "b"), domain_size=8)
    model = Decoder(replace(small_config(), mixture=mixture))
    assert dict(model.named_buffers())
    kept = trained(model, fake_order(tmp_path / "s", steps=(4,)), tmp_path / "o")
    export_checkpoint(tmp_path / "o" / "checkpoints" / "step-000003", tmp_path / "model")
    found = load_model(tmp_path / "model").state_dict()
    for name, tensor in kept.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_a_damaged_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    trained(small_model(), fake_order(tmp_path / "s", steps=(4,)), tmp_path / "o")
    checkpoint = tmp_path / "o" / "checkpoints" / "step-000003"
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(UserError, match="damaged checkpoint"):
        export_checkpoint(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def invoke(command: Any, *arguments: Any) -> Result:
    done = CliRunner().invoke(command, [str(word) for word in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_figures_during_training_equal_those_of_the_exported_model(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    tokenizer, shards = made
    text = tmp_path / "text.jsonl"
    rows = [
        {"text": "the river runs down to the sea", "language": "en", "domain": "tale"},
        {"text": "der Fluss fließt zum Meer", "language": "de", "domain": "tale"},
    ]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    invoke(
        train_command, "pretrain", "--preset", "koine-0.5m", "--tokenizer", tokenizer, "--data", shards["short"],
        *("--steps", 4, "--batch-size", 2, "--sequence-length", 16, "--dtype", "float32", "--threads", 1),
        *("--evaluate-every", 2, "--evaluate-data", text, "--best-metric", "bits_per_byte/de", "--out", out),
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"] + 1: line for line in lines if "evaluation/bits_per_byte" in line}
    assert list(found) == [2, 4]
    best = min(found, key=lambda step: found[step]["evaluation/bits_per_byte/de"])
    assert json.loads((out / "training.json").read_text())["best"]["step"] == best
    checkpoint = out / "checkpoints" / f"step-{best:06d}"
    invoke(model_command, "export", checkpoint, "--format", "safetensors", "--out", tmp_path / "best")
    invoke(evaluate_command, tmp_path / "best", "--data", text, "--out", tmp_path / "results.json")
    again = json.loads((tmp_path / "results.json").read_text())
    measured = found[best]
    of = {code: again["languages"][code]["bits_per_byte"] for code in ("de", "en")}
    assert measured["evaluation/bits_per_byte"] == pytest.approx(again["overall"]["bits_per_byte"], rel=1e-4)
    assert measured["evaluation/bits_per_byte/de"] == pytest.approx(of["de"], rel=1e-4)
    assert measured["evaluation/bits_per_byte_languages"] == pytest.approx(sum(of.values()) / 2, rel=1e-4)
    assert measured["evaluation/bits_per_byte/domain/tale"] == pytest.approx(
        measured["evaluation/bits_per_byte_domains"]
    )
    # Going on from it with other settings is an ordinary training.
    invoke(
        train_command, "pretrain", "--model", tmp_path / "best", "--data", shards["short"],
        *("--steps", 1, "--batch-size", 2, "--sequence-length", 16, "--learning-rate", 1e-4, "--seed", 1),
        *("--out", tmp_path / "on"),
    )  # fmt: skip
    assert (tmp_path / "on" / "model.safetensors").exists()
