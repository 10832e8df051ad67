"""The monitor: its figures by hand, and files that a kill leaves as they would be without it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pytest
import torch

from koine.align.behaviour import expectation_adjusted_distinct
from koine.align.behaviour_table import SAMPLES, TABLE, append_lines, evaluations_before, read_table
from koine.align.completion_logits import mean_log_likelihoods
from koine.align.monitor import Monitor
from koine.align.overoptimisation import Constants
from koine.align.own_samples import sample_completions
from koine.errors import UserError
from koine.generate.sampling import Sampling
from koine.train.fingerprint import objective_identity

from . import policies

SAMPLING = Sampling(temperature=0.8, top_p=0.9, seed=3, max_new_tokens=16)


class Identified(NamedTuple):
    code: str


def identify(text: str, candidates: Any) -> Identified:
    """A stand-in: even lengths are German."""
    assert list(candidates) == ["de", "en", "hi"]
    return Identified("de" if len(text) % 2 == 0 else "hi")


def wanted_number(conversation: Any, completion: str, record: Mapping[str, Any]) -> float | None:
    return None if record["wanted"] == 0 else float(record["wanted"])


def monitor(**more: Any) -> Monitor:
    return Monitor(
        policies.tokenizer(),
        **{
            "pairs": policies.pairs(),
            "prompts": policies.prompts(),
            "sampling": SAMPLING,
            "quiet": True,
            **more,
        },
    )


def test_pairs_by_hand() -> None:
    model, pairs = policies.policy(), policies.pairs()
    figures = monitor(prompts=())(model, 50)
    with torch.no_grad():
        means = mean_log_likelihoods(model, [one for pair in pairs for one in pair.continuations])
    chosen, rejected = means[::2], means[1::2]
    assert figures["chosen"] == pytest.approx(fmean(chosen))
    assert figures["margin"] == pytest.approx(fmean(chosen) - fmean(rejected))
    right = [a > b for a, b in zip(chosen, rejected, strict=True)]
    assert 0 < sum(right) < 6
    assert figures["accuracy"] == pytest.approx(sum(right) / 6) == pytest.approx(1 - figures["error"])
    of_hindi = [one for one, pair in zip(right, pairs, strict=True) if pair.language == "hi"]
    assert figures["accuracy/hi"] == pytest.approx(sum(of_hindi) / 2)
    assert next(iter(figures)) == "error"


def test_samples_by_hand() -> None:
    """Every figure of the samples from one sample at a time, all logits at once."""
    model, reference, prompts = policies.policy(), policies.policy(seed=1), policies.prompts()
    figures = monitor(pairs=(), reference=reference, identify=identify, rewards={"wanted": wanted_number})(
        model, 1
    )
    tokenizer = policies.tokenizer()
    stops = {tokenizer.end_of_turn_id, tokenizer.eos_id}
    samples = sample_completions(model, [one.tokens for one in prompts], SAMPLING, stop_ids=stops)
    positions: list[tuple[float, float, float, str]] = []
    sequence_kls = []
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = torch.tensor([[*prompt.tokens, *sample.tokens]])
        with torch.no_grad():
            p, q = (
                one.logits(one(ids))[0, len(prompt.tokens) - 1 : -1].log_softmax(-1)
                for one in (model, reference)
            )
        kl = (p.exp() * (p - q)).sum(-1)
        top = p.exp().sort(descending=True).values[:, :10]
        share = top / top.sum(-1, keepdim=True)
        entropy = -(share * share.log2()).sum(-1)
        rows = zip(kl.tolist(), entropy.tolist(), top.sum(-1).tolist(), strict=True)
        positions += [(*row, prompt.language) for row in rows]
        sequence_kls.append(kl.sum().item())
    for place, name in enumerate(("kl", "entropy", "mass")):
        assert figures[name] == pytest.approx(fmean(row[place] for row in positions), abs=1e-5)
        of_hindi = [row[place] for row in positions if row[3] == "hi"]
        assert figures[f"{name}/hi"] == pytest.approx(fmean(of_hindi), abs=1e-5)
    assert figures["kl_sequence"] == pytest.approx(fmean(sequence_kls), abs=1e-4)
    shown = [one.tokens[:-1] if one.stopped else one.tokens for one in samples]
    assert figures["length"] == fmean(map(len, shown))
    assert figures["cut_off"] == fmean(not one.stopped for one in samples)
    eads = [expectation_adjusted_distinct(shown, n, tokenizer.vocab_size) for n in range(1, 6)]
    assert figures["ead"] == pytest.approx(fmean(eads))
    assert figures["ead_5"] == pytest.approx(eads[4])
    texts = [tokenizer.decode(tokens) for tokens in shown]
    right = [
        identify(text, ["de", "en", "hi"]).code == one.language
        for text, one in zip(texts, prompts, strict=True)
    ]
    assert figures["asked_language"] == pytest.approx(fmean(right))
    # Prompt 0 has no reward: it is counted, and not a reward of 0.
    assert figures["reward/wanted"] == pytest.approx(3.0)
    assert figures["reward_failures/wanted"] == pytest.approx(1 / 6)
    assert figures["reward_failures/wanted/hi"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    "more",
    [{}, {"pairs": ()}, {"prompts": ()}, {"identify": identify, "rewards": {"wanted": wanted_number}}],
)
def test_names_are_those_of_the_figures(more: dict[str, Any]) -> None:
    """So an unmeasured metric is refused before training."""
    one = monitor(**more, reference=policies.policy(seed=1))
    assert sorted(one.names) == sorted(one(policies.policy(), 50))
    one.check_metric("-error/hi" if one.pairs else "-entropy/hi")
    with pytest.raises(UserError, match="no metric 'errors'"):
        one.check_metric("errors")


def test_a_policy_has_no_divergence_from_itself() -> None:
    figures = monitor(pairs=(), reference=policies.policy())(policies.policy(), 50)
    assert abs(figures["kl"]) < 1e-6


def test_measuring_changes_neither_the_model_nor_the_next_figures() -> None:
    model, one = policies.policy(), monitor()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = one(model, 50)
    assert one(model, 100) == first
    assert monitor()(model, 50) == first
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_class_of_transformers_is_measured_too() -> None:
    figures = monitor(reference=policies.llama(seed=1))(policies.llama(), 50)
    assert 0 < figures["entropy"] < 3.33
    assert figures["kl"] > 0


def test_the_files_hold_languages_the_worst_and_the_verdict(tmp_path: Path) -> None:
    one = monitor(folder=tmp_path, constants=Constants(rise=0.0, fall=0.0))
    one(policies.policy(), 50)
    one(policies.policy(seed=1), 100)
    first, second = read_table(tmp_path / TABLE)
    assert (first["step"], second["step"]) == (50, 100)
    accuracies = {code: figures["accuracy"] for code, figures in first["languages"].items()}
    assert set(accuracies) == {"de", "hi"}
    assert first["worst"]["accuracy"] == min(accuracies, key=lambda code: accuracies[code])
    assert first["worst"]["error"] == first["worst"]["accuracy"]
    assert "entropy" not in first["worst"]
    assert first["verdict"] == {"state": "early", "text": "1 evaluation so far: too early to say"}
    assert second["verdict"]["state"] in ("none", "begins")
    assert evaluations_before(tmp_path, 100) == [{"step": 50, **monitor()(policies.policy(), 50)}]
    samples = read_table(tmp_path / SAMPLES)
    assert [line["id"] for line in samples] == [f"p{n}" for n in range(6)] * 2
    assert samples[0]["messages"] == list(policies.prompts()[0].messages)


def test_lines_of_later_steps_and_a_cut_line_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for step in (1, 2, 3):
        append_lines(path, step, [{"step": step, "value": "\u2028ü"}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    append_lines(path, 3, [{"step": 3, "value": "\u2028ü"}])
    assert path.read_bytes() == whole
    append_lines(path, 2, [{"step": 2, "value": "new"}])
    assert [json.loads(line)["value"] for line in path.read_text().split("\n")[:-1]] == ["\u2028ü", "new"]


def test_another_monitor_has_another_identity() -> None:
    found = objective_identity(monitor(), what="evaluation")
    assert found == objective_identity(monitor(), what="evaluation")
    for more in (
        {"pairs": policies.pairs(5)}, {"prompts": policies.prompts(5)}, {"reference": policies.policy()},
        {"sampling": Sampling(seed=4)}, {"rewards": {"wanted": wanted_number}}, {"identify": identify},
    ):  # fmt: skip
        assert objective_identity(monitor(**more), what="evaluation") != found


def test_what_it_refuses() -> None:
    with pytest.raises(UserError, match="without pairs and prompts"):
        monitor(pairs=(), prompts=())
    with pytest.raises(UserError, match="no seed"):
        monitor(sampling=Sampling())


PARENT = """
import sys, warnings
from pathlib import Path

warnings.simplefilter("ignore")
import torch
import torch.distributed.checkpoint
import tensorboardX
from koine.align.monitor import Monitor
from koine.align.stopping import StopAtLimit
import koine.model.formats.directory, torch.optim.adamw, torch._dynamo, koine.train.loop
import koine.generate.scheduler
from koine.train import LanguageModelling, TrainSettings, train
from tests.align import policies
from tests.align.test_monitor import monitor
from tests.kills import kill_and_repeat
from tests.train.fakes import fake_order

torch.set_num_threads(1)
folder = Path(sys.argv[1])
policies.tokenizer(), policies.pairs(), policies.prompts()
order = fake_order(folder / "source", steps=(30,))
settings = TrainSettings(
    dtype="float32", threads=1, checkpoint_every=5, learning_rate=3e-3, schedule="constant", evaluate_every=2
)
FILES = ("model.safetensors", "training.json", "README.md", "metrics-behaviour.jsonl", "metrics-samples.jsonl")

def run(out):
    watching = monitor(folder=out, reference=policies.policy())
    more = {"out": out, "evaluate": watching, "progress": False, "device": "cpu"}
    train(policies.policy(), LanguageModelling(), order, settings, stop=StopAtLimit("kl", 0.07), **more)

kill_and_repeat(run, folder, kills=int(sys.argv[2]), seed=11, files=FILES)
print(koine.train.loop.read_json(folder / "whole" / "training.json")["stopped"])
"""


@pytest.mark.slow
def test_a_killed_run_stops_at_the_same_step_with_the_same_files(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT, str(tmp_path), "10"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'reason': 'kl is 0." in done.stdout
