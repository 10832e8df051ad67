"""`koine align train` with a monitor, and `--stop-on`, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from koine.align import completion_log_probabilities
from koine.align.behaviour_table import SAMPLES, TABLE, evaluations_before, read_table
from koine.align.completion_logits import mean_log_likelihoods
from koine.align.held_out import encode_pairs, read_pairs
from koine.align.overoptimisation import verdict
from koine.cli.main import cli
from koine.data import tokenize
from koine.data.packing import DocumentSlice
from koine.data.preference_order import build_groups
from koine.data.shards import TokenSource
from koine.files import read_json

from . import policies
from .test_watch import records, write

TRAIN = (
    "align train --model base --data groups --loss dpo:beta=0.1 --steps 8 --batch-size 4 --sequence-length 128 "
    "--learning-rate 3e-3 --schedule constant --reference-cache cache --dtype float32 --out out --json "
)
MONITOR = "--monitor-pairs pairs.jsonl --monitor-limit 2 --monitor-max-new-tokens 8 --evaluate-every 2 "


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tokenizer = policies.save_tokenizer(tmp_path / "tokenizer")
    policies.policy().save(tmp_path / "base", tokenizer=tokenizer)
    write(tmp_path / "pairs.jsonl", records(24))
    tokenize(tmp_path / "pairs.jsonl", tokenizer, out=tmp_path / "groups", kind="preferences")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def koine(command: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli, command.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def test_the_monitor_follows_a_training(place: Path) -> None:
    answer = koine(TRAIN + MONITOR)
    assert answer["steps"] == 8
    assert "stopped" not in answer
    table = read_table(place / "out" / TABLE)
    assert [row["step"] for row in table] == [2, 4, 6, 8]
    assert table[-1]["overall"]["margin"] > table[0]["overall"]["margin"]
    assert table[-1]["overall"]["kl"] > table[0]["overall"]["kl"] > 0
    assert set(table[0]["languages"]) == {"de", "hi", "en"}
    assert table[-1]["verdict"]["text"] == verdict(evaluations_before(place / "out", 99)).text
    assert len(read_table(place / "out" / SAMPLES)) == 4 * 6
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    found = [line["evaluation/entropy/hi"] for line in lines if "evaluation/entropy/hi" in line]
    assert found == [row["languages"]["hi"]["entropy"] for row in table]


def test_a_monitor_changes_no_weight(place: Path) -> None:
    koine(TRAIN + MONITOR)
    koine(TRAIN.replace("--out out", "--out plain"))
    names = ("out/model.safetensors", "plain/model.safetensors")
    assert (place / names[0]).read_bytes() == (place / names[1]).read_bytes()


def test_the_kl_stops_a_training_and_the_checkpoint_before_is_kept(place: Path) -> None:
    koine(TRAIN + MONITOR)
    kl = {row["step"]: row["overall"]["kl"] for row in read_table(place / "out" / TABLE)}
    limit = (kl[4] + kl[6]) / 2
    answer = koine(f"{TRAIN.replace('--out out', '--out stopped')} {MONITOR} --stop-on kl={limit}")
    assert answer["stopped"]["step"] == 6
    assert answer["steps"] == 6
    assert answer["best"]["step"] == 4
    assert [path.name for path in (place / "stopped" / "checkpoints").iterdir()] == ["step-000004"]
    assert read_json(place / "stopped" / "training.json")["stopped"]["reason"].startswith("kl is 0.")
    koine("model export stopped/checkpoints/step-000004 --format safetensors --out best --json")
    koine("align watch best --data pairs.jsonl --reference base --limit 2 --max-new-tokens 8 --out w --json")
    [row] = read_table(place / "w" / TABLE)
    assert row["overall"]["kl"] == pytest.approx(kl[4], abs=1e-6)


def test_early_stopping_of_a_pretraining(place: Path) -> None:
    """A learning rate far too high: bits per byte gets worse from the first evaluation on."""
    write(place / "text.jsonl", [{"text": one["chosen"], "language": one["language"]} for one in records(24)])
    tokenize(place / "text.jsonl", place / "tokenizer", out=place / "tokens")
    answer = koine(
        "train pretrain --model base --data tokens --steps 20 --batch-size 2 --sequence-length 32 --dtype float32 "
        "--learning-rate 3 --schedule constant --spike-deviations 0 --evaluate-data text.jsonl --evaluate-every 1 "
        "--stop-on bits_per_byte --out worse --json"
    )
    best = answer["best"]["step"]
    assert answer["stopped"]["step"] == best + 2 < 20
    assert f"bits_per_byte was best at step {best}" in answer["stopped"]["reason"]


def test_likelihoods_are_those_of_the_preference_losses(place: Path) -> None:
    """The monitor scores rows of its own; training shares a prompt between its completions."""
    source = TokenSource(place / "groups")
    rows = [[(source, "s", DocumentSlice(n, 0, int(source.lengths[n])))] for n in range(len(source))]
    pairs = encode_pairs(read_pairs(place / "pairs.jsonl"), policies.tokenizer())
    model = policies.policy()
    with torch.no_grad():
        wanted = completion_log_probabilities(model, build_groups(rows, 128, list)).means.tolist()
        found = mean_log_likelihoods(model, [one for pair in pairs for one in pair.continuations])
    assert sorted(found) == pytest.approx(sorted(wanted), abs=1e-5)
