"""Training of reward models: the loss, one loop, checkpoints, adapters, kills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from koine.align.reward_evaluation import RewardProbe, evaluate_pairs, score_pairs
from koine.align.reward_objective import BradleyTerry
from koine.align.reward_scores import completion_scores
from koine.data.preference_order import PreferenceOrder
from koine.data.shards import TokenSource
from koine.errors import UserError
from koine.model.decoder import Decoder
from koine.model.lora.config import LoraConfig
from koine.model.reward_model import RewardModel, load_reward_model
from koine.train import TrainSettings, train
from koine.train.export import export_checkpoint
from tests.align.pairs import pair_mixture, pair_records, write_pairs, write_tokenizer
from tests.train.models import small_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("reward") / "tokenizer")


@pytest.fixture(scope="module")
def pairs(tokenizer: Path) -> Path:
    return write_pairs(tokenizer.parent / "pairs", tokenizer)


def new_model(seed: int = 0) -> RewardModel:
    torch.manual_seed(seed)
    return RewardModel(Decoder(small_config(350)), seed=seed)


SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "warmup_steps": 1, "dtype": "float32", "threads": 1}


def test_loss_by_hand(pairs: Path) -> None:
    model = new_model().double()
    batch = PreferenceOrder(pair_mixture(pairs, batch_size=3)).batch(0)
    loss, metrics = BradleyTerry(centring=0.1)(model, batch)
    scores = completion_scores(model, batch).view(-1, 2)
    wanted = torch.zeros((), dtype=torch.float64)
    for (chosen, rejected), group in zip(scores, batch.groups, strict=True):
        logit = chosen - rejected - group.margin
        wanted = wanted - group.probability * F.logsigmoid(logit)
        wanted = wanted - (1 - group.probability) * F.logsigmoid(-logit)
        wanted = wanted + 0.1 * (chosen + rejected) ** 2
    assert {group.probability for group in batch.groups} > {0.5}, "the test needs a tie"
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    assert metrics["units"] == len(batch.groups)
    plain, _ = BradleyTerry(margins=False)(model, batch)
    assert abs(float(plain - loss)) > 1e-3


def test_micro_batches_change_nothing(pairs: Path) -> None:
    model, order = new_model().double(), PreferenceOrder(pair_mixture(pairs, batch_size=4))
    whole, metrics = BradleyTerry()(model, order.batch(1))
    parts = [BradleyTerry()(model, order.batch(1, micro_batch=slice(row, row + 1))) for row in range(4)]
    torch.testing.assert_close(whole, sum(loss for loss, _ in parts), rtol=1e-12, atol=1e-12)
    for name, value in metrics.items():
        assert sum(one[name] for _, one in parts) == pytest.approx(value)


def test_learns_saves_and_exports(tmp_path: Path, tokenizer: Path, pairs: Path) -> None:
    held_out = TokenSource(write_pairs(tmp_path / "held-out", tokenizer, pair_records(16, seed=5)))
    probe = RewardProbe(held_out, time=96)
    model = new_model()
    before = evaluate_pairs(score_pairs(model, held_out, time=96))["overall"]
    train(
        model,
        BradleyTerry(),
        PreferenceOrder(pair_mixture(pairs, steps=24, batch_size=4)),
        TrainSettings(**SETTINGS, evaluate_every=12, checkpoint_every=100),
        out=tmp_path / "reward",
        tokenizer=tokenizer,
        evaluate=probe,
        progress=False,
        device="cpu",
    )
    again = load_reward_model(tmp_path / "reward")
    after = evaluate_pairs(score_pairs(again, held_out, time=96))["overall"]
    assert after["loss"] < before["loss"] - 0.1
    assert after["accuracy"] >= 0.75
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)
    card = (tmp_path / "reward" / "README.md").read_text()
    assert "text-classification" in card
    [kept] = (tmp_path / "reward" / "checkpoints").iterdir()
    export_checkpoint(kept, tmp_path / "exported")
    exported = score_pairs(load_reward_model(tmp_path / "exported"), held_out, time=96)
    if kept.name == "step-000024":
        assert exported == score_pairs(again, held_out, time=96)
    assert evaluate_pairs(exported)["overall"]["loss"] < before["loss"]


def test_adapter_is_merged_when_saved(tmp_path: Path, tokenizer: Path, pairs: Path) -> None:
    model = new_model()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_lora(LoraConfig(rank=4))
    order = PreferenceOrder(pair_mixture(pairs, steps=3))
    settings = TrainSettings(**{**SETTINGS, "learning_rate": 0.03})
    train(
        model, BradleyTerry(), order, settings, out=tmp_path / "reward", tokenizer=tokenizer,
        progress=False, device="cpu",
    )  # fmt: skip
    for name, tensor in model.state_dict().items():
        if name in first and name != "score.weight":
            torch.testing.assert_close(tensor, first[name], rtol=0, atol=0)
    again = load_reward_model(tmp_path / "reward")
    batch = order.batch(0)
    with torch.no_grad():
        wanted = completion_scores(model.eval(), batch)
        torch.testing.assert_close(completion_scores(again, batch), wanted, rtol=0, atol=1e-5)
        model.load_state_dict(first, strict=False)
        model.backbone.adapter = None
    moved = again.state_dict()["backbone.embedding.weight"]
    torch.testing.assert_close(moved, first["backbone.embedding.weight"], rtol=0, atol=0)
    changed = [name for name, tensor in again.state_dict().items() if not torch.equal(tensor, first[name])]
    assert any("blocks." in name for name in changed), "the adapter must be in the matrices"


def test_other_data_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    from koine.data import tokenize
    from tests.data.conftest import write_records

    records = [
        {
            "prompt": f"{number}?",
            "completions": ["yes", "no", "maybe"],
            "scores": [1, 0, 0.5],
            "language": "en",
        }
        for number in range(4)
    ]
    tokenize(write_records(tmp_path / "s.jsonl", records), tokenizer, kind="scored", out=tmp_path / "scored")
    batch = PreferenceOrder(pair_mixture(tmp_path / "scored")).batch(0)
    with pytest.raises(UserError, match="learns from pairs"):
        BradleyTerry()(new_model(), batch)
    with pytest.raises(UserError, match="learns from pairs"):
        RewardProbe(TokenSource(tmp_path / "scored"), time=96).evaluation(new_model())
    with pytest.raises(UserError, match="centring is -1"):
        BradleyTerry(centring=-1)


PARENT = """
import sys, warnings
from pathlib import Path

warnings.simplefilter("ignore")
import torch
import torch.distributed.checkpoint
import tensorboardX
from tests.align.pairs import pair_mixture
from tests.align.test_reward_training import new_model
from tests.kills import kill_and_repeat
from koine.align.reward_objective import BradleyTerry
from koine.data.preference_order import PreferenceOrder
import torch.optim.adamw, torch._dynamo, koine.train.loop, koine.model.formats.reward_files
from koine.train import TrainSettings, train

torch.set_num_threads(1)
folder, tokenizer, pairs = map(Path, sys.argv[1:4])
order = PreferenceOrder(pair_mixture(pairs, steps=12))
settings = TrainSettings(
    dtype="float32", threads=1, checkpoint_every=3, warmup_steps=2, micro_batch_size=1, learning_rate=1e-2
)

def run(out):
    more = {"out": out, "tokenizer": tokenizer, "progress": False, "device": "cpu"}
    train(new_model(), BradleyTerry(centring=0.01), order, settings, **more)

files = ("model.safetensors", "config.json")
kill_and_repeat(run, folder, kills=int(sys.argv[4]), seed=5, files=files)
"""


def test_bit_identical_after_kills(tmp_path: Path, tokenizer: Path, pairs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT, str(tmp_path), str(tokenizer), str(pairs), "20"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
