"""Steps of several shapes: micro-batches, figures, loss spikes, resuming and estimates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from koine.cli.train import train as command
from koine.data import DataOrder, LongRows, Mixture, Phase, Source
from koine.data.inspect_step import documents_at_step
from koine.errors import UserError
from koine.model import Decoder, preset
from koine.model.formats.directory import load_model
from koine.train import LanguageModelling, TrainSettings, estimate_training, train

from .fakes import FunctionObjective
from .models import small_config
from .tokens import write_tokens

SETTINGS = TrainSettings(
    dtype="float32", threads=1, learning_rate=1e-2, schedule="constant", micro_batch_size=2
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def mixture(shards: dict[str, Path], steps: int = 8) -> Mixture:
    short, books = (
        Source(name=name, path=shards[name], proportion=1.0, max_epochs=99.0) for name in ("short", "books")
    )
    long = LongRows(every=4, sequence_length=64, batch_size=4, sources=(books,))
    phase = Phase(name="p", steps=steps, sources=(short,), long=long)
    return Mixture(phases=(phase,), sequence_length=16, batch_size=8)


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(small_config(350))


def run(out: Path, mix: Mixture, settings: TrainSettings = SETTINGS, **more: Any) -> Decoder:
    trained = model()
    train(
        trained,
        more.pop("objective", LanguageModelling()),
        DataOrder(mix),
        settings,
        out=out,
        progress=False,
        device="cpu",
        **more,
    )
    return trained


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_micro_batches_of_long_rows_hold_no_more_tokens(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    seen: list[tuple[int, ...]] = []

    def spy(trained: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        seen.append(tuple(batch.tokens.shape))
        return LanguageModelling()(trained, batch)

    small = run(tmp_path / "small", mixture(made[1]), objective=FunctionObjective(spy))
    # Two rows of 16 at once; a row of 64 is more than that, and goes alone.
    one = [(2, 16)] * 4
    assert seen == (one * 3 + [(1, 64)] * 4) * 2
    seen.clear()
    run(
        tmp_path / "eight",
        mixture(made[1], 4),
        replace(SETTINGS, micro_batch_size=8),
        objective=FunctionObjective(spy),
    )
    assert seen == [(8, 16)] * 3 + [(2, 64)] * 2
    whole = run(tmp_path / "whole", mixture(made[1]), replace(SETTINGS, micro_batch_size=0))
    for name, tensor in small.named_parameters():
        torch.testing.assert_close(tensor, dict(whole.named_parameters())[name], rtol=1e-4, atol=1e-4)
    figures = lines(tmp_path / "small")
    assert [line["sequence_length"] for line in figures] == [16, 16, 16, 64] * 2
    order = DataOrder(mixture(made[1]))
    assert [line["units"] for line in figures] == [
        int((order.batch(step).targets != -100).sum()) for step in range(8)
    ]


class StoppedError(Exception):
    pass


def test_resumes_to_the_same_bits_after_a_long_batch(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, checkpoint_every=4, evaluate_every=1)

    def evaluate(trained: nn.Module, done: int) -> dict[str, float]:
        if done == 6 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise StoppedError
        return {}

    with pytest.raises(StoppedError):
        run(tmp_path / "o", mixture(made[1]), settings, evaluate=evaluate)
    resumed = run(tmp_path / "o", mixture(made[1]), settings, evaluate=evaluate)
    whole = run(tmp_path / "w", mixture(made[1]), settings)
    for name, tensor in resumed.named_parameters():
        assert torch.equal(tensor, dict(whole.named_parameters())[name])


def test_long_rows_of_another_loss_are_no_spike(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    def harder(trained: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        loss, measured = LanguageModelling()(trained, batch)
        return loss * (4.0 if batch.tokens.shape[1] == 64 else 1.0), measured

    run(
        tmp_path / "o",
        mixture(made[1], 24),
        replace(SETTINGS, spike_window=8),
        objective=FunctionObjective(harder),
    )
    assert len(lines(tmp_path / "o")) == 24


def test_the_estimate_follows_the_shapes() -> None:
    """Rows of 8,192 tokens have 16 times the activations of 512; gradient checkpointing more than halves it."""
    config = preset("koine-8m", 4096)
    source = Source(name="a", path=Path("a"), proportion=1.0)

    def estimate(long: LongRows | None, **fields: Any) -> Any:
        phase = Phase(name="p", steps=8, sources=(source,), long=long)
        mix = Mixture(phases=(phase,), sequence_length=512, batch_size=2)
        return estimate_training(config, TrainSettings(threads=1, **fields), mix)

    long = LongRows(every=4, sequence_length=8192, batch_size=1)
    short, both, again = (
        estimate(None),
        estimate(long, micro_batch_size=2),
        estimate(long, gradient_checkpointing=True),
    )
    # Projections (q, k, v, gate, up) 1,920 wide and what hangs on them; 8 blocks; 2 bytes; 8,192 tokens.
    assert both.peak_bytes - short.peak_bytes > 8 * 2 * (8192 - 1024) * 1920
    assert again.peak_bytes - short.peak_bytes < 0.5 * (both.peak_bytes - short.peak_bytes)
    assert both.seconds > 1.5 * short.seconds


def test_the_command_with_long_sequences(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    tokenizer, shards = made

    def pretrain(*arguments: str) -> str:
        words = [
            "pretrain", "--data", str(shards["short"]), "--sequence-length", "32", "--batch-size", "4", "--device", "cpu",
            "--threads", "1", "--learning-rate", "0.003", *arguments,
        ]  # fmt: skip
        return CliRunner().invoke(command, words, catch_exceptions=False).output

    long = ("--long-every", "2", "--long-sequence-length", "96", "--long-batch-size", "2")
    more = ("--long-data", str(shards["books"]))
    first = ("--preset", "koine-0.5m", "--tokenizer", str(tokenizer), "--attention", "rope", "--steps", "2")
    pretrain(*first, "--out", str(tmp_path / "one"))
    told = pretrain(*first, *long, *more, "--dry-run", "--out", str(tmp_path / "two"))
    assert "tokens       320 in 2 steps (1 of 4 x 32, 1 of 2 x 96)" in told
    going_on = ("--model", str(tmp_path / "one"), "--rope-theta", "2e6", "--steps", "4")
    pretrain(*going_on, *long, *more, "--out", str(tmp_path / "two"))
    assert [line["sequence_length"] for line in lines(tmp_path / "two")] == [32, 96, 32, 96]
    config = load_model(tmp_path / "two").config
    assert config.rope_theta == 2e6
    assert config.layers == load_model(tmp_path / "one").config.layers
    about = json.loads((tmp_path / "two" / "training.json").read_text())
    assert about["identity"]["model"]["rope_theta"] == 2e6
    assert about["mixture"]["phases"][0]["long"]["every"] == 2
    assert about["sources"].keys() == {"short", "long-books"}
    told_later = documents_at_step(tmp_path / "two", 1)
    assert {one["source"] for one in told_later} == {"long-books"}
    assert max(one["column"] + one["end"] - one["start"] for one in told_later) >= 96
    for wrong, line in (
        (("--attention", "rope", "--window", "8"), "rope has no use for a window"),
        (("--long-every", "2"), "batches of long sequences are not wholly described"),
        ((*long[:3], "16", *long[4:]), "its long rows have 16 tokens, the others 32"),
    ):
        with pytest.raises(UserError, match=line):
            pretrain(*going_on, *wrong, "--out", str(tmp_path / "three"))
    assert not (tmp_path / "three").exists()
