"""The training loop beside torch's own optimiser, its errors, and its files."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koine.data import DataOrder, Mixture, Phase, Source, tokenize
from koine.errors import KoineWarning, UserError
from koine.files import exclusive
from koine.model.decoder import Decoder
from koine.model.formats.directory import load_model
from koine.train import LanguageModelling, SupervisedFineTuning, TrainingStopped, TrainSettings, train
from koine.train.distributed import Ranks
from koine.train.progress import final_metrics
from tests.data.conftest import document, write_records

from .fakes import FakeBatch, FakeOrder, FunctionObjective, fake_order
from .models import small_config, small_model
from .tokens import write_tokens

BASE = TrainSettings(dtype="float32", threads=1, learning_rate=1e-2, schedule="constant")


def run(out: Path, order: FakeOrder, settings: TrainSettings = BASE, **more: Any) -> nn.Module:
    model = small_model()
    train(
        model,
        more.pop("objective", LanguageModelling()),
        order,
        settings,
        out=out,
        progress=False,
        device="cpu",
        **more,
    )  # type: ignore[arg-type]
    return model


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def test_equals_a_plain_loop_with_torch(tmp_path: Path) -> None:
    order = fake_order(tmp_path / "s", steps=(6,))
    ours = run(tmp_path / "out", order)
    theirs = small_model()
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        fused=False,
    )
    losses = []
    for step in range(6):
        batch = order.batch(step)
        logits = theirs.logits(theirs(batch.tokens))
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert [line["loss"] for line in lines(tmp_path / "out")] == pytest.approx(losses, rel=1e-5)
    # Adam divides by the gradient's size, so where a gradient is nearly zero its rounding shows in full: 1 %
    # of the rate a step.
    for name, tensor in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], tensor, rtol=1e-4, atol=6 * 1e-4)


def test_muon_on_two_processes_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(rank=0, world_size=2, device=torch.device("cpu"))
    monkeypatch.setattr("koine.train.loop.join_ranks", lambda _: nullcontext(ranks))
    with pytest.raises(UserError, match="muon trains on one process, and this training has 2"):
        run(tmp_path / "out", fake_order(tmp_path / "s", steps=(2,)), replace(BASE, optimiser="muon"))
    assert not (tmp_path / "out").exists()


def test_muon_equals_a_plain_loop_with_torch(tmp_path: Path) -> None:
    """Matrices of the blocks go to `torch.optim.Muon`; the embedding and the norms to AdamW."""
    order = fake_order(tmp_path / "s", steps=(6,))
    ours = run(tmp_path / "out", order, replace(BASE, optimiser="muon"))
    theirs = small_model()
    named = dict(theirs.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and not name.startswith("embedding")]
    vectors = [p for p in named.values() if p.dim() == 1]
    muon = torch.optim.Muon(
        matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [named["embedding.weight"]], "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for step in range(6):
        batch = order.batch(step)
        logits = theirs.logits(theirs(batch.tokens))
        F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for optimiser in (muon, adamw):
            optimiser.step()
            optimiser.zero_grad()
    # Muon computes its update in bfloat16 (eps 4e-3), and rounding adds up over six steps. The
    # difference stays within 10 % of the way that a tensor went; with AdamW it is about as long as the way.
    first = dict(small_model().named_parameters())
    for name, tensor in weights(ours).items():
        moved = (named[name] - first[name]).norm()
        assert (tensor - named[name]).norm() <= 0.1 * moved, name


def test_micro_batches_give_the_same_gradient(tmp_path: Path) -> None:
    # Rows hold different numbers of targets: a mean of means would differ in the first digits.
    order = fake_order(tmp_path / "s", steps=(4,))
    for size in (0, 1, 3):
        run(tmp_path / str(size), order, replace(BASE, micro_batch_size=size))
    whole = lines(tmp_path / "0")
    for size in (1, 3):
        for a, b in zip(whole, lines(tmp_path / str(size)), strict=True):
            assert (a["loss"], a["gradient_norm"]) == pytest.approx((b["loss"], b["gradient_norm"]), rel=1e-4)


def test_bfloat16_follows_float32_and_keeps_float32_weights(tmp_path: Path) -> None:
    order = fake_order(tmp_path / "s", steps=(30,))
    settings = replace(BASE, learning_rate=3e-3)
    run(tmp_path / "32", order, settings)
    model = run(tmp_path / "16", order, replace(settings, dtype="bfloat16"))
    # Losses near 4 nats: rounding of 2^-9 of a logit moves single tokens both ways, their mean by less than
    # 2e-3. (At 1e-2 this model's training is unstable and any rounding grows.)
    for a, b in zip(lines(tmp_path / "32"), lines(tmp_path / "16"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)
    saved = load_model(tmp_path / "16")
    for name, tensor in weights(saved).items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, weights(model)[name], rtol=0, atol=0)
    assert any((t.bfloat16().float() != t).any() for t in weights(saved).values())


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    order = fake_order(tmp_path / "s", steps=(3,))
    plain = run(tmp_path / "a", order)
    again = run(tmp_path / "b", order, replace(BASE, gradient_checkpointing=True))
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(again)[name], tensor, rtol=1e-5, atol=1e-5)


def test_schedule_restarts_with_each_phase(tmp_path: Path) -> None:
    run(
        tmp_path / "o",
        fake_order(tmp_path / "s", steps=(4, 4)),
        replace(BASE, schedule="linear", min_lr_ratio=0.0),
    )
    rates = [line["learning_rate"] for line in lines(tmp_path / "o")]
    assert rates[:4] == rates[4:] == pytest.approx([0.0075, 0.005, 0.0025, 0.0])


def test_a_complete_folder_is_left_alone(tmp_path: Path) -> None:
    order = fake_order(tmp_path / "s", steps=(3,))
    run(tmp_path / "o", order)
    before = (tmp_path / "o" / "model.safetensors").stat().st_mtime_ns
    run(tmp_path / "o", order)
    assert (tmp_path / "o" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"settings.learning_rate: 0.01 -> 0.5"):
        run(tmp_path / "o", order, replace(BASE, learning_rate=0.5))


class StoppedError(Exception):
    pass


def stopping_at(step: int) -> Any:
    def evaluate(model: nn.Module, done: int) -> dict[str, float]:
        if done == step:
            raise StoppedError
        return {"figure": float(-done)}

    return evaluate


def interrupted(out: Path, order: FakeOrder, settings: TrainSettings) -> None:
    with pytest.raises(StoppedError):
        run(out, order, replace(settings, evaluate_every=1), evaluate=stopping_at(8))


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    order = fake_order(tmp_path / "s", steps=(10,))
    interrupted(tmp_path / "o", order, BASE)
    with pytest.raises(UserError, match=r"settings.beta2: 0.95 -> 0.9.*another --out"):
        run(tmp_path / "o", order, replace(BASE, beta2=0.9))
    with pytest.warns(KoineWarning, match="micro_batch_size: 0 -> 2"):
        run(tmp_path / "o", order, replace(BASE, micro_batch_size=2))
    assert [line["step"] for line in lines(tmp_path / "o") if "loss" in line] == list(range(10))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    order = fake_order(tmp_path / "s", steps=(10,))
    interrupted(tmp_path / "o", order, BASE)
    found = sorted((tmp_path / "o" / "checkpoints").iterdir())
    file = next(found[-1].glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{file.name}: damaged.*remove {found[-1].name} to go on from {found[-2].name}"
    ):
        run(tmp_path / "o", order)


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    order = fake_order(tmp_path / "s", steps=(10,))

    def evaluate(model: nn.Module, done: int) -> dict[str, float]:
        if done == 9:
            raise StoppedError
        return {"figure": abs(done - 3.0)}

    with pytest.raises(StoppedError):
        run(
            tmp_path / "o",
            order,
            replace(BASE, evaluate_every=1, checkpoint_every=2, keep_last=2),
            evaluate=evaluate,
        )
    names = sorted(path.name for path in (tmp_path / "o" / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000006", "step-000008"]


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_sigterm_saves_and_resumes_to_the_same_bits(tmp_path: Path, optimiser: Any) -> None:
    order = fake_order(tmp_path / "s", steps=(9,))
    settings = replace(BASE, optimiser=optimiser)

    def objective(model: nn.Module, batch: FakeBatch) -> tuple[Tensor, dict[str, float]]:
        if not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return LanguageModelling()(model, batch)  # type: ignore[arg-type]

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "o", order, settings, objective=FunctionObjective(objective))
    assert stopped.value.code == 143
    assert (tmp_path / "o" / "checkpoints" / "step-000001").is_dir()
    resumed = run(tmp_path / "o", order, settings, objective=FunctionObjective(objective))
    whole = run(tmp_path / "w", order, settings)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], tensor, rtol=0, atol=0)


def failing_at(step: int, kind: str) -> Any:
    calls = [0]

    def objective(model: nn.Module, batch: FakeBatch) -> tuple[Tensor, dict[str, float]]:
        loss, measured = LanguageModelling()(model, batch)  # type: ignore[arg-type]
        calls[0] += 1
        if calls[0] == step + 1:
            loss = loss * float("nan") if kind == "nan" else loss * 5
        return loss, measured

    return FunctionObjective(objective)


@pytest.mark.parametrize(("kind", "says"), [("nan", "the loss is nan"), ("spike", "the loss jumped to")])
def test_a_problem_stops_before_the_step(tmp_path: Path, kind: str, says: str) -> None:
    order = fake_order(tmp_path / "s", steps=(12,))
    settings = replace(BASE, checkpoint_every=4, spike_window=8)
    with pytest.raises(TrainingStopped, match=rf"{says}.*at step 9.*doc-9-0.*step-000008"):
        run(tmp_path / "o", order, settings, objective=failing_at(9, kind))
    incident = json.loads((tmp_path / "o" / "incident-step-9.json").read_text())
    assert [document["id"] for document in incident["documents"]] == [f"doc-9-{row}" for row in range(4)]
    assert [line["step"] for line in lines(tmp_path / "o")] == list(range(9))


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    order = fake_order(tmp_path / "s", steps=(2,))
    with (
        exclusive(tmp_path / "o" / ".lock", doing="x"),
        pytest.raises(UserError, match="another process is training"),
    ):
        run(tmp_path / "o", order)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; did you mean 'cosine'"),
        ({"warmup_steps": 1.5}, "warmup_steps is 1.5; it must be an integer"),
        ({"min_lr_ratio": 2}, "min_lr_ratio is 2; it must be at most 1"),
    ],
)
def test_settings_are_checked(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        TrainSettings(**given)


def test_checkpoints_left_by_a_kill_are_removed_by_the_next_call(tmp_path: Path) -> None:
    order = fake_order(tmp_path / "s", steps=(4,))
    settings = replace(BASE, checkpoint_every=1, keep_last=4)
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_: Any, **__: Any) -> None:
            raise StoppedError

        patch.setattr("koine.train.export.OutputFolder.remove_checkpoints", killed)
        with pytest.raises(StoppedError):
            run(tmp_path / "o", order, settings)
    assert len(list((tmp_path / "o" / "checkpoints").iterdir())) == 4
    run(tmp_path / "o", order, settings)
    assert not (tmp_path / "o" / "checkpoints").exists()


class TickingClock:
    """A clock that advances by half a second at each call."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.5
        return self.now


def test_rates_equal_those_computed_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koine.train.loop.time", TickingClock())
    monkeypatch.setattr("koine.train.step_costs.model_matmul_rate", lambda *_: 1e7)
    run(tmp_path / "o", fake_order(tmp_path / "s", steps=(2,)))
    # A step is 4 rows of 16 tokens in half a second.
    tokens_per_second = 4 * 16 / 0.5
    # Matrices of a block: q and o of 32 x 32, k and v of 32 x 16, three of the feed-forward of 32 x 48; the
    # logits: 64 x 32.
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 64 * 32
    # Queries see keys: 1 + 2 + ... + 16 in the full layer; 1 + ... + 8, then 8 times 8 in the layer of window
    # 8. A pair costs a product of q and k and one with v, of 2 heads of 16.
    pairs = 136 + (36 + 64)
    forward = (2 * 16 * matrices + pairs * 2 * 2 * 2 * 16) / 16
    for line in lines(tmp_path / "o"):
        assert line["tokens_per_second"] == pytest.approx(tokens_per_second, rel=1e-12)
        assert line["matmul_rate_share"] == pytest.approx(tokens_per_second * 3 * forward / 1e7, rel=1e-12)


def chats_with_long_prompts(folder: Path, tokenizer: Path, *, long: int) -> Path:
    """Token shards of 12 chats, of which `long` have a prompt of 80 words."""
    records = [
        {
            "id": f"{number}",
            "language": "en",
            "messages": [
                {"role": "user", "content": document(number, 80 if number < long else 3)},
                {"role": "assistant", "content": document(number, 3)},
            ],
        }
        for number in range(12)
    ]
    tokenize(write_records(folder / "chats.jsonl", records), tokenizer, out=folder / "chats")
    return folder / "chats"


def chat_order(path: Path) -> DataOrder:
    source = Source(name="chats", path=path, proportion=1.0, max_epochs=99.0)
    phase = Phase(name="p", steps=3, sources=(source,))
    return DataOrder(Mixture(phases=(phase,), sequence_length=64, batch_size=4, packing="no_split"))


def test_text_that_is_cut_off_stands_in_the_metrics_and_the_record(tmp_path: Path) -> None:
    tokenizer, _ = write_tokens(tmp_path)
    with pytest.warns(KoineWarning, match=r"3 of 12 chats \(25.0 %\) lose every completion token"):
        data = chat_order(chats_with_long_prompts(tmp_path, tokenizer, long=3))
    out = tmp_path / "o"
    train(
        Decoder(small_config(vocab_size=350)),
        SupervisedFineTuning(),
        data,
        BASE,
        out=out,
        progress=False,
        device="cpu",
    )
    [counts] = json.loads((out / "training.json").read_text())["cut_text"]
    assert (counts["sequence_length"], counts["documents"], counts["cut_documents"]) == (64, 12, 3)
    shares = {
        "cut/documents": 0.25,
        "cut/tokens": counts["cut_tokens"] / counts["tokens"],
        "cut/chats_without_completion": 0.25,
    }
    first, *others = lines(out)
    assert {key: value for key, value in first.items() if key.startswith("cut/")} == shares
    assert not any(key.startswith("cut/") for line in others for key in line)
    assert final_metrics(out / "metrics.jsonl").items() >= shares.items()


def test_chats_without_completions_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    tokenizer, _ = write_tokens(tmp_path)
    with pytest.warns(KoineWarning, match="lose every completion token"):
        data = chat_order(chats_with_long_prompts(tmp_path, tokenizer, long=4))
    with pytest.raises(UserError, match=r"4 of 12 chats \(33.3 %\) lose every completion token"):
        train(Decoder(small_config(vocab_size=350)), SupervisedFineTuning(), data, BASE, out=tmp_path / "o")
    assert not (tmp_path / "o").exists()
