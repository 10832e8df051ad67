"""Online training: what is drawn, scored and trained on, and what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from koine.align import LossSpec
from koine.align.online import OnlineOrder, OnlineSettings, summary_of, train_online
from koine.align.prompts import encode_prompts
from koine.align.rewards import RewardFailure
from koine.align.rollouts import read_rollouts
from koine.cli.main import cli
from koine.errors import UserError
from koine.generate.sampling import Sampling
from koine.model import load_causal_lm
from koine.tokenizer import load_tokenizer
from koine.train import TrainSettings
from tests.align.world import model_of, write_tokenizer
from tests.data.conftest import document, write_records
from tests.train.test_distributed import run

RECORDS: list[dict[str, Any]] = [
    {"id": f"p{number}", "language": "en", "prompt": document(number, 3 + number % 3)} for number in range(6)
]

WORKER = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from tests.align.test_online import run_training
run_training(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if sys.argv[3] != "float32" else "rloo:beta=0.1")
"""


def letters(conversation: Any, completion: str, record: Any) -> float:
    """Reward the share of letters: a policy that learns finds them."""
    return sum(one.isascii() and one.isalpha() for one in completion) / max(1, len(completion))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    tokenizer = write_tokenizer(folder / "tokenizer")
    model_of().save(folder / "model", tokenizer=tokenizer)
    return folder / "model"


def online_settings(loss: str = "rloo:beta=0.1", **changed: Any) -> OnlineSettings:
    fields: dict[str, Any] = {
        "k": 3,
        "prompts": 4,
        "steps": 3,
        "sampling": Sampling(temperature=0.9, max_new_tokens=8),
        **changed,
    }
    return OnlineSettings(loss=LossSpec.parse(loss), **fields)


def run_training(
    start: Path,
    out: Path,
    loss: str = "rloo:beta=0.1",
    *,
    reward: Any = letters,
    learning_rate: float = 3e-3,
    micro_batch_size: int = 0,
    reference: Any = "start",
    dtype: Any = "float32",
    **changed: Any,
) -> Path:
    tokenizer = load_tokenizer(start)
    settings = TrainSettings(
        dtype=dtype,
        threads=1,
        learning_rate=learning_rate,
        schedule="constant",
        checkpoint_every=1,
        micro_batch_size=micro_batch_size,
        spike_deviations=0,
    )
    return train_online(
        start,
        encode_prompts(RECORDS, tokenizer),
        reward,
        reward_name="test",
        online=online_settings(loss, **changed),
        settings=settings,
        tokenizer=tokenizer,
        out=out,
        reference=reference,
        device="cpu",
        progress=False,
    )


def figures(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def files(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted((out / "rollouts").rglob("*.*"))
    }


@pytest.mark.parametrize("loss", ["rloo:beta=0.02", "copg:beta=0.1"])
def test_the_reward_grows(start: Path, tmp_path: Path, loss: str) -> None:
    run_training(start, tmp_path / "run", loss, steps=25, k=4, prompts=6, learning_rate=2e-2)
    scores = [line["score"] for line in figures(tmp_path / "run")]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.07
    first = figures(tmp_path / "run")[0]
    # On-policy: the trainer agrees with the engine, so a probability has not moved.
    assert first["moved"] < 1e-4
    assert first["log_ratio"] == pytest.approx(0, abs=1e-4)


def test_an_on_policy_step_has_the_gradient_of_reinforce(start: Path, tmp_path: Path) -> None:
    """The groups of step 0 through autograd, beside `-A_i / k * d log pi(y_i)` of plain rows."""
    from koine.align import preference_objective
    from koine.align.policy_losses import leave_one_out_advantages

    model, tokenizer = load_causal_lm(start), load_tokenizer(start)
    order = OnlineOrder(
        model,
        encode_prompts(RECORDS, tokenizer),
        letters,
        reward_name="test",
        settings=online_settings("rloo:beta=0"),
        tokenizer=tokenizer,
        seed=0,
        folder=tmp_path / "rollouts",
    )
    batch = order.batch(0)
    objective = preference_objective("rloo:beta=0", temperature=0.9)
    loss, metrics = objective(model, batch)
    loss.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters()}
    for one in model.parameters():
        one.grad = None
    drawn = read_rollouts(next((tmp_path / "rollouts" / "step-000000").glob("scores-*")))
    prompts = order.prompts_of(0)
    assert drawn is not None
    rewards = torch.tensor([one.score for one in drawn], dtype=torch.float32).view(4, 3)
    advantages = leave_one_out_advantages(rewards).flatten()
    total = torch.zeros(())
    for one, advantage in zip(drawn, advantages, strict=True):
        row = [*prompts[one.prompt].tokens, *one.tokens]
        logits = model.logits(model(torch.tensor([row])))[0] / 0.9
        begin = len(prompts[one.prompt].tokens)
        chosen = logits[begin - 1 : -1].log_softmax(dim=-1)[range(len(one.tokens)), list(one.tokens)]
        total = total - advantage / 3 * chosen.sum()
    total.backward()
    assert metrics["units"] == 4
    for name, one in model.named_parameters():
        assert torch.allclose(found[name], one.grad, atol=1e-4, rtol=1e-3), name


def test_micro_batches_change_rounding_only(start: Path, tmp_path: Path) -> None:
    run_training(start, tmp_path / "whole")
    run_training(start, tmp_path / "split", micro_batch_size=1)
    for one, other in zip(figures(tmp_path / "whole"), figures(tmp_path / "split"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


def test_a_kill_changes_nothing(start: Path, tmp_path: Path) -> None:
    """Killed while it draws, scores, trains and writes: the same rollouts and weights, bit for bit."""
    begin = time.monotonic()
    run_worker(start, tmp_path / "whole").wait()
    seconds = time.monotonic() - begin
    for share in (0.55, 0.7, 0.85):
        process = run_worker(start, tmp_path / "killed")
        try:
            process.wait(seconds * share)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert run_worker(start, tmp_path / "killed").wait() == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "killed").items():
        assert torch.equal(tensor, expected[name]), name


def run_worker(start: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(start), str(out), "copg"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_resumed_run_reads_and_repeats(start: Path, tmp_path: Path) -> None:
    """Step 1 is taken again from its checkpoint, with its rollouts lost: the same files and weights."""
    run_training(start, tmp_path / "whole")
    stopped = RuntimeError("stopped")
    calls = []

    def failing(conversation: Any, completion: str, record: Any) -> float:
        calls.append(completion)
        if len(calls) > 15:
            raise stopped
        return letters(conversation, completion, record)

    with pytest.raises(RuntimeError, match="stopped"):
        run_training(start, tmp_path / "again", reward=failing)
    # Drawn, not scored.
    [drawn] = (tmp_path / "again" / "rollouts" / "step-000001").iterdir()
    drawn.unlink()
    run_training(start, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(one, expected[name]) for name, one in weights(tmp_path / "again").items())


def test_two_processes_draw_half_of_the_prompts_each(start: Path, tmp_path: Path) -> None:
    run_training(start, tmp_path / "one", steps=3)
    run(2, start, tmp_path / "two", worker=WORKER)
    names = sorted(path.name for path in (tmp_path / "two" / "rollouts" / "step-000000").iterdir())
    assert [name for name in names if name.startswith("prompts")] == [
        "prompts-000000-000002.parquet",
        "prompts-000002-000004.parquet",
    ]
    for one, other in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-3)
        assert other["score"] == pytest.approx(one["score"], abs=1e-5)


def test_replay_trains_on_completions_of_an_earlier_policy(start: Path, tmp_path: Path) -> None:
    run_training(start, tmp_path / "run", "rloo:beta=0.1", steps=4, draw_every=2, learning_rate=1e-2)
    lines = figures(tmp_path / "run")
    moved = [line["moved"] for line in lines]
    # On-policy the surrogate is the mean of the advantages, which is 0.
    assert lines[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert abs(lines[1]["loss"]) > 1e-4
    assert moved[0] < 1e-4
    assert moved[2] < 1e-4
    assert moved[1] > 1e-2
    assert moved[3] > 1e-2


def test_a_lost_draw_of_an_earlier_policy_cannot_be_repeated(start: Path, tmp_path: Path) -> None:
    """The weights of the draw are gone; a later step says so, and does not draw from other weights."""
    calls = []

    def failing(conversation: Any, completion: str, record: Any) -> float:
        calls.append(completion)
        if len(calls) > 15:
            raise RuntimeError("stopped")
        return letters(conversation, completion, record)

    def again() -> None:
        run_training(start, tmp_path / "run", draw_every=3)

    with pytest.raises(RuntimeError, match="stopped"):
        run_training(start, tmp_path / "run", draw_every=3, reward=failing)
    for name, words in (("behaviour-*", "no log-probabilities"), ("prompts-*", "no completions of step 1")):
        [file] = (tmp_path / "run" / "rollouts" / "step-000001").glob(name)
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(UserError, match=words):
            again()
        file.write_bytes(content)
    again()
    run_training(start, tmp_path / "whole", draw_every=3)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_replay_in_bfloat16_measures_the_policy_and_not_the_rounding(start: Path, tmp_path: Path) -> None:
    """With a learning rate of almost 0 the ratio is 1 at later steps too, so the surrogate is 0."""
    run_training(
        start, tmp_path / "run", "rloo:beta=0", steps=2, draw_every=2, learning_rate=1e-12, dtype="bfloat16"
    )
    first, second = figures(tmp_path / "run")
    assert second["moved"] == pytest.approx(0, abs=1e-6)
    assert abs(second["loss"]) < 1e-6
    assert first["moved"] > 1e-3


def test_failures_are_counted_and_left_out(start: Path, tmp_path: Path) -> None:
    def failing(conversation: Any, completion: str, record: Any) -> float:
        if record["id"] == "p0":
            raise RewardFailure("no answer is known")
        if len(completion) % 3 == 0:
            raise RewardFailure("an odd length")
        return letters(conversation, completion, record)

    run_training(start, tmp_path / "run", reward=failing, k=6, steps=3)
    summary = summary_of(tmp_path / "run" / "rollouts")
    assert summary["scored"] + sum(summary["failures"].values()) == 3 * 4 * 6
    assert summary["failures"]["no answer is known"] % 6 == 0
    assert summary["failures"]["no answer is known"] > 0
    lines = figures(tmp_path / "run")
    assert min(line["units"] for line in lines) < 4
    assert max(line["failed"] for line in lines) > 0

    def never(conversation: Any, completion: str, record: Any) -> float:
        raise RewardFailure("the judge does not answer")

    with pytest.raises(UserError, match="no prompt of step 0") as error:
        run_training(start, tmp_path / "never", reward=never)
    assert "the judge does not answer" in str(error.value.hint)


@pytest.mark.parametrize("loss", ["dpo:beta=0.1", "nll"])
def test_rounds_of_pairs_with_merges(start: Path, tmp_path: Path, loss: str) -> None:
    """Each round draws once, starts from the last one's merge, and pairs the best with the worst completion."""
    last = run_training(
        start,
        tmp_path / "run",
        loss,
        reference="round" if loss.startswith("dpo") else "none",
        rounds=2,
        steps=2,
        draw_every=2,
        merge_weight=0.25,
        sampling=Sampling(temperature=1.0, top_p=0.9, max_new_tokens=8),
    )
    assert last == tmp_path / "run" / "merged-02"
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["merged-01", "merged-02", "round-01", "round-02"]
    before, after = weights(start), weights(tmp_path / "run" / "round-01")
    for name, tensor in weights(tmp_path / "run" / "merged-01").items():
        assert torch.allclose(tensor, 0.75 * before[name] + 0.25 * after[name], atol=1e-5)
    parents = json.loads((tmp_path / "run" / "round-02" / "training.json").read_text())["identity"]
    from koine.train.fingerprint import weights_digest

    merged = load_causal_lm(tmp_path / "run" / "merged-01")
    assert parents["first_weights"] == weights_digest(merged)
    # The same call again has nothing to do.
    assert (
        run_training(
            start,
            tmp_path / "run",
            loss,
            reference="round" if loss.startswith("dpo") else "none",
            rounds=2,
            steps=2,
            draw_every=2,
            merge_weight=0.25,
            sampling=Sampling(temperature=1.0, top_p=0.9, max_new_tokens=8),
            reward=None,
        )
        == last
    )


def test_bad_settings(start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="k is 1"):
        online_settings("copg", k=1)
    with pytest.raises(UserError, match="k is 1"):
        online_settings("rloo", k=1)
    for sampling in (
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"temperature": 0.0},
    ):
        with pytest.raises(UserError, match="policy itself|same completion"):
            online_settings("rloo", sampling=Sampling(**{"temperature": 1.0, **sampling}))
    with pytest.raises(UserError, match="rollouts do not make"):
        online_settings("kto")
    with pytest.raises(UserError, match="rollouts do not make"):
        online_settings("srpo")
    with pytest.raises(UserError, match="needs a reference"):
        run_training(start, tmp_path / "none", "copg", reference="none")
    assert not (tmp_path / "none").exists()
    run_training(start, tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="k: 3 -> 4"):
        run_training(start, tmp_path / "run", steps=1, k=4)


def test_an_adapter_learns_and_its_base_stays(start: Path, tmp_path: Path) -> None:
    """An adapter is in no packed weight: completions come from the model as it is, adapter included."""
    arguments = ["align", "online", "--model", str(start), "--prompts", str(write_prompts(tmp_path))]
    # The share of letters differs from completion to completion, on each processor: the first step learns.
    arguments += ["--loss", "rloo:beta=0.1", "--reward", "tests.align.test_online:letters"]
    arguments += ["--k", "3", "--prompts-per-step", "3"]
    arguments += ["--steps", "2", "--max-new-tokens", "6", "--lora-rank", "4", "--learning-rate", "1e-2"]
    arguments += ["--lora-alpha", "64", "--dtype", "float32", "--out", str(tmp_path / "adapter")]
    result = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rounds"][0]["scored"] == 2 * 3 * 3
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    lines = figures(tmp_path / "adapter")
    assert lines[0]["log_ratio"] == pytest.approx(0, abs=1e-4)
    # After the first update the trainer still agrees with the engine, and both have left the reference.
    assert lines[1]["moved"] < 1e-4
    assert abs(lines[1]["log_ratio"]) > 1e-3


def test_the_step_of_plans(start: Path, tmp_path: Path) -> None:
    from koine.steps.alignment import train_online_model

    train_online_model(
        start,
        write_prompts(tmp_path),
        loss="copg:beta=0.1",
        reward="length:most=2",
        settings=TrainSettings(dtype="float32", threads=1),
        steps=2,
        k=2,
        prompts_per_step=2,
        max_new_tokens=4,
        out=tmp_path / "model",
    )
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert metrics["scored"] == 8
    assert load_causal_lm(tmp_path / "model").vocab_size > 0


def write_prompts(folder: Path) -> Path:
    return write_records(folder / "prompts.jsonl", RECORDS)


def test_a_reward_model_scores_and_another_one_is_another_training(start: Path, tmp_path: Path) -> None:
    from koine.model.reward_model import start_reward_model

    prompts, folder = write_prompts(tmp_path), tmp_path / "reward"

    def run_with(seed: int) -> Any:
        torch.manual_seed(seed)
        model = start_reward_model(start)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save(folder, tokenizer=start)
        arguments = [
            "align",
            "online",
            "--model",
            str(start),
            "--prompts",
            str(prompts),
            "--loss",
            "rloo:beta=0.1",
        ]
        arguments += ["--reward", "reward-model", "--reward-model", str(folder), "--k", "2", "--steps", "1"]
        arguments += [
            "--prompts-per-step",
            "2",
            "--max-new-tokens",
            "4",
            "--out",
            str(tmp_path / "policy"),
            "--json",
        ]
        return CliRunner().invoke(cli, arguments, catch_exceptions=False)

    result = run_with(1)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rounds"][0]["scored"] == 2 * 2
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="reward: reward-model; reward model"):
        run_with(2)
