"""Training an adapter: equal to `peft` with plain AdamW, resumed exactly, and nothing of the base is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from koine.errors import UserError
from koine.model import LoraConfig, add_lora, load_causal_lm, load_model, save_model
from koine.model.lora.files import ADAPTER_WEIGHTS, read_adapter
from koine.train import LanguageModelling, TrainSettings, estimate_training, train
from koine.train.checkpoint_index import read_index
from koine.train.export import export_checkpoint
from koine.train.loop import Trainer
from koine.train.optimiser import Optimiser

from .fakes import fake_order
from .models import small_model
from .test_distributed import run as run_ranks

SETTINGS = TrainSettings(
    dtype="float32", threads=1, learning_rate=1e-2, schedule="constant", checkpoint_every=2, keep_last=9
)
LORA = LoraConfig(rank=3)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(small_model(), tmp_path / "base")
    return tmp_path / "base"


def start(base: Path, lora: LoraConfig = LORA) -> Any:
    model = load_causal_lm(base)
    add_lora(model, lora, base=base, seed=0)
    return model


def run(
    base: Path,
    out: Path,
    *,
    lora: LoraConfig = LORA,
    settings: TrainSettings = SETTINGS,
    steps: int = 6,
    **more: Any,
) -> Any:
    model = start(base, lora)
    order = fake_order(out.parent / "data", steps=(steps,))
    train(
        model,
        LanguageModelling(),
        order,
        settings,
        out=out,
        init_from=base,
        progress=False,
        device="cpu",
        **more,
    )
    return model


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_training_is_that_of_peft_with_adamw(base: Path, weight_decay: float, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the reference implementation needs the extra [peft]")
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    settings = replace(SETTINGS, weight_decay=weight_decay, micro_batch_size=2)
    first = start(base)
    first.adapter.save(tmp_path / "first", dict(first.named_parameters()))
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        tmp_path / "first",
        is_trainable=True,
    ).train()
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=weight_decay,
    )
    wanted = []
    order = fake_order(tmp_path / "data", steps=(6,))
    for step in range(6):
        batch = order.batch(step)
        logits = model(batch.tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimiser.step()
        optimiser.zero_grad()
        wanted.append(loss.item())

    run(base, tmp_path / "out", settings=settings)
    assert losses(tmp_path / "out") == pytest.approx(wanted, rel=1e-4)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = read_adapter(tmp_path / "out"), read_adapter(tmp_path / "theirs")
    assert ours.modules == theirs.modules
    for module in ours.modules:
        for one, other in zip(ours.pair(module), theirs.pair(module), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(base: Path, dtype: Any, tmp_path: Path) -> None:
    lora, settings = LoraConfig(rank=3, dropout=0.2), replace(SETTINGS, dtype=dtype)
    run(base, tmp_path / "whole", lora=lora, settings=settings)

    def interrupt(trainer: Trainer, original: Callable[..., Any], step: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return original(trainer, step)

    original = Trainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda self, step: interrupt(self, original, step))
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path / "halves", lora=lora, settings=settings)
    assert not (tmp_path / "halves" / ADAPTER_WEIGHTS).exists()
    torch.randn(7)  # the process has drawn other random numbers in between
    run(base, tmp_path / "halves", lora=lora, settings=settings)
    for name in (ADAPTER_WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


def test_only_the_adapter_is_trained_and_kept(base: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, evaluate_every=2)
    model = run(base, tmp_path / "out", settings=settings, evaluate=lambda model, done: {"figure": -done})
    plain = load_model(base).state_dict()
    state = model.state_dict()
    for name, tensor in plain.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)
    assert state.keys() - plain.keys() == set(model.adapter.parameters)
    assert any(state[name].abs().max() > 0 for name in model.adapter.parameters if ".lora_B." in name)

    optimiser = Optimiser(model, settings, dtype=torch.bfloat16)
    assert optimiser.masters.keys() == set(model.adapter.parameters)
    assert model.embedding.weight.dtype == torch.bfloat16

    checkpoint = tmp_path / "out" / "checkpoints" / "step-000006"
    names = {name.partition(".")[2] for name in read_index(checkpoint).state_dict_metadata}
    assert names == set(model.adapter.parameters)
    assert not (checkpoint / "config.json").exists()
    identity = json.loads((checkpoint / "checkpoint.json").read_text())["identity"]
    assert identity["base_weights"].startswith("sha256:")
    assert identity["adapter"]["rank"] == 3


def test_a_checkpoint_is_an_adapter_and_is_exported(base: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, evaluate_every=1)
    run(base, tmp_path / "out", settings=settings, evaluate=lambda model, done: {"figure": abs(done - 4)})
    checkpoint = tmp_path / "out" / "checkpoints" / "step-000004"
    export_checkpoint(checkpoint, tmp_path / "fourth")
    export_checkpoint(checkpoint, tmp_path / "half", dtype=torch.bfloat16)
    fourth, half, last = (read_adapter(tmp_path / name) for name in ("fourth", "half", "out"))
    assert fourth.base_digest == half.base_digest == last.base_digest is not None
    [module, *_] = fourth.modules
    torch.testing.assert_close(
        half.pair(module)[1], fourth.pair(module)[1].to(torch.bfloat16).float(), rtol=0, atol=0
    )
    assert not torch.equal(fourth.pair(module)[1], last.pair(module)[1])
    assert (tmp_path / "fourth" / "README.md").exists()


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "out")
    save_model(small_model(seed=1), tmp_path / "other")
    with pytest.raises(
        UserError, match=r"adapter of another base \(sha256 .*give the model that it was trained on"
    ):
        run(tmp_path / "other", tmp_path / "out")


def test_another_rank_is_another_training(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "out")
    with pytest.raises(UserError, match=r"adapter.rank: 3 -> 4"):
        run(base, tmp_path / "out", lora=LoraConfig(rank=4))


def test_muon_takes_a_and_b_as_matrices(base: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, optimiser="muon", learning_rate=0.1, checkpoint_every=99)
    run(base, tmp_path / "out", settings=settings, steps=60)
    found = losses(tmp_path / "out")
    # As AdamW does on this data: a frozen random head leaves little to learn.
    assert sum(found[-10:]) / 10 < sum(found[:10]) / 10 - 0.01
    optimiser = Optimiser(start(base), settings, dtype=torch.float32)
    assert optimiser.orthogonal >= optimiser.masters.keys()


@pytest.mark.parametrize("rank", [1, 4])
def test_both_matrices_are_decayed(base: Path, rank: int) -> None:
    optimiser = Optimiser(start(base, LoraConfig(rank=rank)), SETTINGS, dtype=torch.float32)
    [group] = optimiser.adamw.param_groups
    assert group["weight_decay"] == SETTINGS.weight_decay
    assert len(group["params"]) == len(optimiser.masters)


def test_gradient_checkpointing_changes_nothing(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "kept")
    run(base, tmp_path / "again", settings=replace(SETTINGS, gradient_checkpointing=True))
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")


def test_the_estimate_counts_moments_of_the_adapter_only(tmp_path: Path) -> None:
    config = small_model().config
    mixture: Any = fake_order(tmp_path / "data").mixture
    whole = estimate_training(config, SETTINGS, mixture)
    few = estimate_training(config, SETTINGS, mixture, adapter=1000)
    parameters = sum(one.numel() for one in small_model().parameters())
    head = 4 * config.vocab_size * config.hidden_size
    assert whole.peak_bytes - few.peak_bytes == 12 * parameters - 16 * 1000 + head
    assert few.kept_bytes == 4 * 1000


WORKER = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from tests.train.fakes import fake_order
from koine.model import LoraConfig, add_lora, load_causal_lm
from koine.train import TrainSettings, LanguageModelling, train

folder, out, dtype, stop = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
model = load_causal_lm(folder.parent / "base")
add_lora(model, LoraConfig(rank=3), base=folder.parent / "base")
settings = TrainSettings(
    dtype=dtype, threads=1, learning_rate=1e-2, schedule="constant", checkpoint_every=2, keep_last=9
)
order = fake_order(folder, steps=(6,))
train(model, LanguageModelling(), order, settings, out=out, progress=False, device="cpu")
"""


@pytest.mark.slow
def test_two_ranks_train_the_adapter_of_one(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "one")
    run_ranks(2, tmp_path / "data", tmp_path / "two", worker=WORKER)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two")
    for module in one.modules:
        for ours, theirs in zip(one.pair(module), two.pair(module), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
