"""`koine merge search`: find the weights of a merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from koine.cli.arguments import MODEL, named_paths
from koine.cli.merge.options import own_option
from koine.cli.outputs import OVERWRITE, OutputFile, output_files, say_written
from koine.combine.merging.methods import METHODS, find_method
from koine.errors import UserError
from koine.hub import model_name
from koine.terminal import plain_console

if TYPE_CHECKING:
    from koine.combine.merging.weight_search import InMemoryMerge, Trial
    from koine.tokenizer import Tokenizer

Command = TypeVar("Command", bound=click.Command)


def with_method_options(command: Command) -> Command:
    """Add the options of all merge methods, but the one that is searched."""
    known = {name: method for method in METHODS.values() for name in method.options if name != "t"}
    command.params += [own_option(method, name, with_default=False) for name, method in known.items()]
    return command


@with_method_options
@click.command("search", short_help="Search the weights of a merge.")
@click.argument("models", nargs=-1, required=True, type=MODEL, metavar="MODEL...")
@click.option(
    "--data",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Text on which to measure bits per byte; one score per PATH.  [required without --questions]",
)
@click.option(
    "--questions",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Questions with exact answers, for the share of wrong answers; one score per PATH.  "
    "[required without --data]",
)
@click.option("--method", default="linear", show_default=True, help="A method that takes weights, or slerp.")
@click.option("--base", type=MODEL, help="The common ancestor, for methods that need it.")
@click.option(
    "--tokenizer",
    default="",
    metavar="first|base|MODEL",
    help="Whose tokenizer to measure with, where tokenizers of one vocabulary differ.",
)
@click.option("--unrelated", is_flag=True, help="Also merge models without a common ancestor.")
@click.option(
    "--parts",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="The grid's step is 1/PARTS of the total weight.",
)
@click.option(
    "--rounds",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Rounds of finer steps around the best.",
)
@click.option(
    "--budget", type=click.IntRange(1), default=200, show_default=True, help="Merges to evaluate at most."
)
@click.option(
    "--limit", type=click.IntRange(1), default=64, show_default=True, help="Records to read of each PATH."
)
@click.option("--out", type=OutputFile(), help="Write all trials as JSON to this file.")
@OVERWRITE
def command(
    models: tuple[Path, ...],
    data: tuple[str, ...],
    questions: tuple[str, ...],
    method: str,
    base: Path | None,
    tokenizer: str,
    unrelated: bool,
    parts: int,
    rounds: int,
    budget: int,
    limit: int,
    out: Path | None,
    overwrite: bool,
    **options: float | bool | None,
) -> None:
    """Search the weights of a merge by bits per byte or wrong answers, without writing any merge.

    The merge with the lowest mean score is the best. Printed are the best, the Pareto front, and how each
    score changes when one model is left out of the best: below 0, that model collides with the others.
    """
    from koine.combine.merging.tokenizers import tokenizer_source
    from koine.combine.merging.weight_search import InMemoryMerge, leave_one_out, pareto_front, search_weights
    from koine.files import write_json
    from koine.tokenizer import load_tokenizer

    _check_arguments(models, method, data, questions)
    reads = [*models, base, *(one.rpartition("=")[2] for one in (*data, *questions))]
    with output_files({"--out": out}, overwrite=overwrite, reads=reads) as targets:
        texts, asked = named_records(data, limit), named_records(questions, limit)
        if twice := sorted(texts.keys() & asked.keys()):
            raise UserError(f"two scores are named '{twice[0]}'", hint="name them: --questions NAME=PATH")
        merged = InMemoryMerge(
            models,
            method=method,
            base=base,
            tokenizer=tokenizer,
            unrelated=unrelated,
            options={name: value for name, value in options.items() if value is not None},
        )
        everyone = [*models, *([] if base is None else [base])]
        source = tokenizer_source(everyone, with_base=base is not None, policy=tokenizer)
        evaluate = evaluation_of(merged, load_tokenizer(everyone[source]), texts, asked)
        trials = search_weights(evaluate, len(models), parts=parts, rounds=rounds, budget=budget)
        best = min(trials, key=lambda trial: trial.mean)
        front = pareto_front(trials)
        left_out = leave_one_out(evaluate, best.weights)
        if (target := targets["--out"]) is not None:
            write_json(target, search_report(models, method, trials, best, front, left_out))
    print_trials(models, [*texts, *asked], trials, best, front)
    print_left_out(models, [*texts, *asked], left_out)
    say_written(out)
    if METHODS[method].takes("weights"):
        click.echo(f"--weights {','.join(f'{weight:g}' for weight in best.weights)}")
    else:
        click.echo(f"--t {best.weights[1]:g}")


def _check_arguments(
    models: tuple[Path, ...], method: str, data: tuple[str, ...], questions: tuple[str, ...]
) -> None:
    find_method(method)
    if len(models) < 2:
        raise UserError("one model is given", hint="give at least two: there is nothing to weigh")
    if not data and not questions:
        raise UserError("nothing to measure by is given", hint="give --data, --questions or both")


def evaluation_of(
    merged: InMemoryMerge,
    tokenizer: Tokenizer,
    texts: Mapping[str, list[Mapping[str, Any]]],
    questions: Mapping[str, list[Mapping[str, Any]]],
) -> Callable[[tuple[float, ...]], dict[str, float]]:
    """Return a function from weights to the scores of their merge, lower is better."""
    from koine.evaluate import bits_per_byte, question_accuracy

    def evaluate(weights: tuple[float, ...]) -> dict[str, float]:
        model: Any = merged.set(weights)
        return {
            name: bits_per_byte(model, tokenizer, records, resamples=1)["overall"]["bits_per_byte"]
            for name, records in texts.items()
        } | {
            name: wrong_share(question_accuracy(model, tokenizer, records))
            for name, records in questions.items()
        }

    return evaluate


def search_report(
    models: tuple[Path, ...],
    method: str,
    trials: Sequence[Trial],
    best: Trial,
    front: Sequence[Trial],
    left_out: list[dict[str, float | None]],
) -> dict[str, Any]:
    """Return the search as JSON values."""
    return {
        "models": [str(path) for path in models],
        "method": method,
        "best": {"weights": best.weights, "scores": best.scores},
        "front": [{"weights": trial.weights, "scores": trial.scores} for trial in front],
        "trials": [{"weights": trial.weights, "scores": trial.scores} for trial in trials],
        "left_out": dict(zip(map(str, models), left_out, strict=True)),
    }


def named_records(given: tuple[str, ...], limit: int) -> dict[str, list[Mapping[str, Any]]]:
    """Return the records of each `[NAME=]PATH`, at most `limit` each."""
    from itertools import islice

    from koine.data import read_records
    from koine.data.piped import is_piped

    named = named_paths(given, what="scores", hint="name them: NAME=PATH", name_of=lambda path: path.stem)
    for path in named.values():
        if not (is_piped(path) or path.exists()):
            raise UserError("no such file or folder", where=path)
    return {
        name: list(islice(read_records(path, split="all", carry=("answer",)), limit))
        for name, path in named.items()
    }


def wrong_share(accuracy: Mapping[str, Any]) -> float:
    """Return the share of wrong answers among all questions of `question_accuracy`."""
    kinds = accuracy["overall"].values()
    right, asked = (sum(int(kind[what]) for kind in kinds) for what in ("correct", "questions"))
    return 1.0 - right / asked


def print_trials(
    models: tuple[Path, ...], names: list[str], trials: Sequence[Trial], best: Trial, front: Sequence[Trial]
) -> None:
    """Print the best merge and the Pareto front."""
    from rich.table import Table

    table = Table(title=f"{len(trials)} merges, lower is better: the best, and the Pareto front")
    for path in models:
        table.add_column(model_name(path), justify="right")
    for name in [*names, "mean"]:
        table.add_column(name, justify="right")
    others = sorted((trial for trial in front if trial != best), key=lambda trial: float(trial.mean))
    for number, trial in enumerate([best, *others[:9]]):
        table.add_row(
            *(f"{weight:g}" for weight in trial.weights),
            *(f"{trial.scores[name]:.4f}" for name in names),
            f"{trial.mean:.4f}",
            end_section=number == 0,
        )
    plain_console().print(table)


def print_left_out(
    models: tuple[Path, ...], names: list[str], left_out: list[dict[str, float | None]]
) -> None:
    """Print how each score changes when a model is left out."""
    from rich.table import Table

    table = Table(
        title="Change when a model is left out of the best (below 0: it collides with the others there)"
    )
    table.add_column("left out")
    for name in names:
        table.add_column(name, justify="right")
    for path, changes in zip(models, left_out, strict=True):
        cells = ("–" if changes[name] is None else f"{changes[name]:+.4f}" for name in names)
        table.add_row(model_name(path), *cells)
    plain_console().print(table)
