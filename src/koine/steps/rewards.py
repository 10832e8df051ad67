"""The step that trains a reward model."""

from __future__ import annotations

from pathlib import Path

from koine.files import write_json
from koine.plan import step
from koine.steps import checks
from koine.steps.corpus_files import write_step_report
from koine.train.settings import TrainSettings


@step(version="1", check=checks.reward_training, threads=0)
def train_reward_model(
    model: Path,
    pairs: Path,
    held_out: Path | None = None,
    *,
    settings: TrainSettings,
    steps: int,
    batch_size: int = 8,
    sequence_length: int = 1024,
    margins: bool = True,
    centring: float = 0.0,
    limit: int | None = 256,
    out: Path,
) -> None:
    """Train a reward model on pairs with the Bradley-Terry loss.

    A second stage is a second step, whose `model` is the first one's result.

    Args:
        model: folder of a language model, which gets a new head, or of a reward model to train further.
        pairs: folder of pairs, tokenized with `kind="preferences"`.
        held_out: held-out pairs, tokenized alike; None: nothing is evaluated.
        settings: how to train. `evaluate_every` is for the held-out pairs.
        steps: training steps.
        batch_size: rows of a step.
        sequence_length: tokens of a row; longer completions are cut.
        margins: whether the records' margins are part of the loss.
        centring: weight of the term that keeps scores around 0.
        limit: held-out pairs of each language at most; None: all.
        out: folder to write to.
    """
    from koine.align.reward_evaluation import (
        EVALUATION,
        RewardProbe,
        check_pairs,
        evaluation_blocks,
        open_pairs,
        tracked_figures,
    )
    from koine.align.reward_objective import BradleyTerry
    from koine.data import Mixture, PreferenceOrder
    from koine.data.mixture import Phase, Source
    from koine.data.shards import TokenSource
    from koine.files import sha256_file
    from koine.model.reward_model import load_reward_model, start_reward_model
    from koine.train import train
    from koine.train.model_adapters import check_data_fits_model
    from koine.train.progress import final_metrics
    from koine.train.tracking.run_logger import logger_from_environment

    tokens = TokenSource(pairs)
    check_pairs(tokens)
    fingerprint = sha256_file(model / "tokenizer.json")
    open_pairs(pairs, fingerprint)
    source = Source(name="pairs", path=pairs, proportion=1.0)
    mixture = Mixture(
        phases=(Phase(name="pairs", steps=steps, sources=(source,)),),
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=settings.seed,
        packing="no_split",
    )
    start = start_reward_model(model, seed=settings.seed)
    check_data_fits_model(start, mixture, tokens.vocab_size)
    probe = None
    if held_out is not None:
        probe = RewardProbe(open_pairs(held_out, fingerprint), time=sequence_length, limit=limit)
    train(
        start,
        BradleyTerry(margins=margins, centring=centring),
        PreferenceOrder(mixture),
        settings,
        out=out,
        tokenizer=model,
        init_from=model,
        evaluate=probe,
        logger=logger_from_environment(),
    )
    metrics = final_metrics(out / "metrics.jsonl")
    if probe is not None:
        found = probe.evaluation(load_reward_model(out))
        write_json(out / EVALUATION, found)
        metrics |= tracked_figures(found)
        write_step_report(out, "Reward model", evaluation_blocks(found))
    write_json(out / "metrics.json", metrics)
