"""KTO's reference point: of the whole step, whatever its micro batches and processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from koine.align import preference_objective, reference_log_probabilities
from koine.data import PreferenceOrder, TokenSource
from koine.data.mismatched import MismatchedSource
from koine.errors import UserError
from koine.model.decoder import Decoder
from koine.train import TrainSettings, train
from tests.align.world import mixture_of, model_of, write_labelled, write_tokenizer
from tests.train.test_distributed import run

WORKER = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from tests.align.test_kto_step import run_training
run_training(Path(sys.argv[1]), Path(sys.argv[2]), micro_batch_size=1)
"""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kto")
    return write_labelled(folder, write_tokenizer(folder / "tokenizer"))


def run_training(tokens: Path, out: Path, *, micro_batch_size: int) -> list[dict[str, float]]:
    """Train three steps by KTO; return the figures of each."""
    order = PreferenceOrder(mixture_of(tokens))
    reference = reference_log_probabilities(
        model_of(0), order, cache=tokens.parent / "cache", mismatched=True
    )
    settings = TrainSettings(
        dtype="float32", threads=1, learning_rate=1e-2, micro_batch_size=micro_batch_size
    )
    objective = preference_objective("kto:beta=0.3", reference)
    train(model_of(1), objective, order, settings, out=out, progress=False, device="cpu")
    return figures(out)


def figures(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("loss", "reference_point", "units")} for line in lines]


@torch.no_grad()
def row_log_probability(model: Decoder, prompt: list[int], completion: list[int], mask: list[int]) -> float:
    """Sum the log-probabilities of a completion after a prompt, in a row of its own."""
    logits = model.logits(model(torch.tensor([prompt + completion])))[0].double().log_softmax(dim=-1)
    found = [
        logits[len(prompt) + index - 1, token]
        for index, (token, counts) in enumerate(zip(completion, mask, strict=True))
        if counts
    ]
    return float(torch.stack(found).sum())


def test_reference_point_is_the_mean_log_ratio_of_exchanged_completions(tokens: Path, tmp_path: Path) -> None:
    """Compared with plain forward passes of each prompt and the other record's completion."""
    order = PreferenceOrder(mixture_of(tokens))
    source = TokenSource(tokens)
    partner = MismatchedSource(source).partner
    assert sorted(partner) == list(range(len(source)))
    assert all(int(other) != number for number, other in enumerate(partner))
    policy, reference = model_of(1), model_of(0)
    ratios = []
    for group in order.batch(0).groups:
        prompt, _ = source.segments(group.document)
        other = int(partner[group.document])
        start = source.segments(other)[0].length
        rows = (
            source.tokens(group.document, 0, prompt.length).tolist(),
            source.tokens(other, start).tolist(),
            source.mask(other, start).tolist(),
        )
        ratios.append(row_log_probability(policy, *rows) - row_log_probability(reference, *rows))
    expected = max(0.0, sum(ratios) / len(ratios))
    assert expected > 0.1
    [first, *_] = run_training(tokens, tmp_path / "run", micro_batch_size=0)
    assert first["reference_point"] == pytest.approx(expected, rel=1e-5)


def test_micro_batches_and_processes_do_not_change_it(tokens: Path, tmp_path: Path) -> None:
    whole = run_training(tokens, tmp_path / "whole", micro_batch_size=0)
    split = run_training(tokens, tmp_path / "split", micro_batch_size=1)
    run(2, tokens, tmp_path / "two", worker=WORKER)
    for other in (split, figures(tmp_path / "two")):
        for one, found in zip(whole, other, strict=True):
            assert found == pytest.approx(one, rel=2e-5, abs=2e-5)


def test_one_record_has_no_other_completion(tmp_path: Path) -> None:
    tokens = write_labelled(tmp_path, write_tokenizer(tmp_path / "tokenizer"), count=1)
    with pytest.raises(UserError, match="completions of other records"):
        MismatchedSource(TokenSource(tokens))
