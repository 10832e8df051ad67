"""`koine align reward`: train a reward model on pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koine.cli.arguments import MODEL
from koine.cli.commands import Command
from koine.cli.training_options import training_options
from koine.cli.training_run import run_training
from koine.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from koine.align.reward_evaluation import RewardProbe
    from koine.data.shards import TokenSource
    from koine.model.reward_model import RewardModel


@click.command(cls=Command)
@click.option(
    "--model",
    type=MODEL,
    required=True,
    help="Language model that gets a new head, or reward model to train further: a folder, or OWNER/NAME.",
)
@click.option(
    "--evaluate-pairs",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="TOKENS",
    help="Held-out pairs, tokenized like --data: accuracy, calibration and length correlation by language.",
)
@click.option(
    "--evaluate-limit",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Number of pairs of each language of --evaluate-pairs at most.",
)
@click.option(
    "--margins/--no-margins", default=True, show_default=True, help="Use the margins of the records."
)
@click.option(
    "--centring",
    type=float,
    default=0.0,
    show_default=True,
    help="Weight of the term that keeps scores around 0, for example 0.01.",
)
@training_options(packing="no_split", documents=False)
def reward(
    model: Path,
    evaluate_pairs: Path | None,
    evaluate_limit: int,
    margins: bool,
    centring: float,
    **options: Any,
) -> None:
    """Train a reward model on pairs with the Bradley-Terry loss.

    --data is written by `koine data tokenize --kind preferences`. Labels may be soft: a tie has the probability
    0.5. For a second stage, give the first stage's folder as --model.
    """
    from koine.align.reward_evaluation import RewardProbe, open_pairs
    from koine.align.reward_objective import BradleyTerry

    objective = BradleyTerry(margins=margins, centring=centring)
    probe = None
    _check_options(evaluate_pairs, options)
    if evaluate_pairs is not None:
        tokenizer = options["tokenizer"] or model
        held_out = open_pairs(evaluate_pairs, _fingerprint(tokenizer))
        probe = RewardProbe(held_out, time=options["sequence_length"], limit=evaluate_limit)
    out, device = options["out"], options["device"]
    run_training(
        lambda vocab_size: _open(model, options["seed"]),
        lambda order: objective,
        model,
        dict(options),
        check_sources=_check_pairs,
        groups=True,
        make_monitor=None if probe is None or not options["evaluate_every"] else lambda model: probe,
        report=None if probe is None else lambda: _report(probe, out, device),
    )


def _open(path: Path, seed: int) -> RewardModel:
    from koine.model.reward_model import start_reward_model

    if not path.is_dir():
        raise UserError("no such model directory", where=path, hint="give a folder that holds config.json")
    return start_reward_model(path, seed=seed)


def _check_options(evaluate_pairs: Path | None, options: dict[str, Any]) -> None:
    """Raise `UserError` for options of an evaluation without pairs to evaluate on."""
    for name in ("evaluate_every", "best_metric", "stop_on"):
        if options[name] and evaluate_pairs is None:
            raise UserError(
                f"--{name.replace('_', '-')} without --evaluate-pairs", hint="give held-out pairs"
            )


def _fingerprint(tokenizer: Path) -> str | None:
    from koine.files import sha256_file

    path = tokenizer / "tokenizer.json"
    return sha256_file(path) if path.is_file() else None


def _check_pairs(sources: Iterable[TokenSource]) -> None:
    from koine.align.reward_evaluation import check_pairs

    for source in sources:
        check_pairs(source)


def _report(probe: RewardProbe, out: Path, device: str) -> tuple[dict[str, Any], Callable[[], object]]:
    """Evaluate the finished model and write the figures; return them, and what shows them in a terminal."""
    from koine.align.reward_evaluation import EVALUATION, evaluation_blocks
    from koine.cli.evaluate.output import print_table_block
    from koine.files import write_json
    from koine.hardware import chosen_device
    from koine.model.reward_model import load_reward_model

    found = probe.evaluation(load_reward_model(out, device=chosen_device(device)))
    write_json(out / EVALUATION, found)

    def show() -> None:
        for block in evaluation_blocks(found):
            print_table_block(block, left=("language", "confidence"))

    return {"evaluation": found}, show
