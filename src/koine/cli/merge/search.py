"""`koine merge search`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from koine.cli.arguments import named_paths
from koine.cli.outputs import OVERWRITE, output_files
from koine.terminal import plain_console


@click.command("search")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL...")
@click.option(
    "--data",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Text to measure bits per byte on; a figure for each.",
)
@click.option(
    "--questions",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Questions with exact answers; the share that is answered wrong, a figure for each.",
)
@click.option("--method", default="linear", show_default=True, help="A method that takes weights, or slerp.")
@click.option(
    "--base", type=click.Path(path_type=Path), help="The common ancestor, for methods that need it."
)
@click.option("--density", type=float, help="Of a method that has one.")
@click.option("--scale", type=float, help="Of a method that has one.")
@click.option("--normalize/--no-normalize", default=None, help="Of a method that has it.")
@click.option(
    "--tokenizer",
    default="",
    metavar="first|base|MODEL",
    help="Whose tokenizer the texts are cut by, where equal vocabularies are cut otherwise.",
)
@click.option("--unrelated", is_flag=True, help="Models without a common ancestor too.")
@click.option(
    "--parts",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Parts into which the grid cuts the whole.",
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
@click.option("--limit", type=click.IntRange(1), default=64, show_default=True, help="Records of each PATH.")
@click.option("--out", type=click.Path(path_type=Path), help="Write all trials as JSON to this file.")
@OVERWRITE
def command(
    models: tuple[Path, ...], data: tuple[str, ...], questions: tuple[str, ...], method: str, base: Path | None, density: float | None, scale: float | None,
    normalize: bool | None, tokenizer: str, unrelated: bool, parts: int, rounds: int, budget: int, limit: int, out: Path | None,
    overwrite: bool,
) -> None:  # fmt: skip
    """Search the weights of a merge by bits per byte or wrong answers, without writing any merge; and tell which models collide.

    The mean of the figures decides. Shown are the best, the Pareto front, and how each figure changes when a model is left out of the best.
    """
    from koine.combine.merging.methods import METHODS
    from koine.combine.merging.vocabularies import tokenizer_source
    from koine.combine.merging.weight_search import InMemoryMerge, leave_one_out, pareto_front, search_weights
    from koine.errors import UserError, did_you_mean
    from koine.evaluate import bits_per_byte, question_accuracy
    from koine.files import write_json
    from koine.tokenizer import load_tokenizer

    if method not in METHODS:
        raise UserError(f"unknown method '{method}'", hint=did_you_mean(method, METHODS))
    if len(models) < 2:
        raise UserError("one model is given", hint="give at least two: there is nothing to weigh")
    if not data and not questions:
        raise UserError("nothing to measure by is given", hint="give --data, --questions or both")
    reads = [*models, base, *(one.rpartition("=")[2] for one in (*data, *questions))]
    with output_files({"--out": out}, overwrite=overwrite, reads=reads) as targets:
        texts, asked = named_records(data, limit), named_records(questions, limit)
        if twice := sorted(texts.keys() & asked.keys()):
            raise UserError(f"two figures are named '{twice[0]}'", hint="name them: --questions NAME=PATH")
        given = {"density": density, "scale": scale, "normalize": normalize}
        merged = InMemoryMerge(
            models, method=method, base=base, tokenizer=tokenizer, unrelated=unrelated,
            options={name: value for name, value in given.items() if value is not None},
        )  # fmt: skip
        inputs = [*models, *([] if base is None else [base])]
        cutter = load_tokenizer(
            inputs[tokenizer_source(inputs, with_base=base is not None, policy=tokenizer)]
        )

        def evaluate(weights: tuple[float, ...]) -> dict[str, float]:
            model: Any = merged.set(weights)
            return {
                name: bits_per_byte(model, cutter, records, resamples=1)["overall"]["bits_per_byte"]
                for name, records in texts.items()
            } | {
                name: wrong_share(question_accuracy(model, cutter, records, resamples=1))
                for name, records in asked.items()
            }

        trials = search_weights(evaluate, len(models), parts=parts, rounds=rounds, budget=budget)
        best = min(trials, key=lambda trial: trial.mean)
        front = pareto_front(trials)
        left_out = leave_one_out(evaluate, best.weights)
        if (target := targets["--out"]) is not None:
            write_json(
                target,
                {
                    "models": [str(path) for path in models],
                    "method": method,
                    "best": {"weights": best.weights, "scores": best.scores},
                    "front": [{"weights": trial.weights, "scores": trial.scores} for trial in front],
                    "trials": [{"weights": trial.weights, "scores": trial.scores} for trial in trials],
                    "left_out": dict(zip(map(str, models), left_out, strict=True)),
                },
            )
    show(models, [*texts, *asked], trials, best, front, left_out)
    if out is not None:
        click.echo(f"written to {out}")
    if METHODS[method].takes("weights"):
        click.echo(f"--weights {','.join(f'{weight:g}' for weight in best.weights)}")
    else:
        click.echo(f"--t {best.weights[1]:g}")


def named_records(given: tuple[str, ...], limit: int) -> dict[str, list[Mapping[str, Any]]]:
    """The records of each `[NAME=]PATH`, at most `limit`."""
    from itertools import islice

    from koine.data import read_records
    from koine.errors import UserError

    named = named_paths(given, what="figures", hint="name them: NAME=PATH", name_of=lambda path: path.stem)
    for path in named.values():
        if not path.exists():
            raise UserError("no such file or folder", where=path)
    return {
        name: list(islice(read_records(path, split="all", carry=("answer",)), limit))
        for name, path in named.items()
    }


def wrong_share(accuracy: Mapping[str, Any]) -> float:
    """The share of all questions that `question_accuracy` found answered wrong."""
    kinds = accuracy["overall"].values()
    right, asked = (sum(int(kind[what]) for kind in kinds) for what in ("correct", "questions"))
    return 1.0 - right / asked


def show(
    models: tuple[Path, ...],
    names: list[str],
    trials: Any,
    best: Any,
    front: Any,
    left_out: list[dict[str, float | None]],
) -> None:
    """The best and the front, and what leaving a model out does."""
    from rich.table import Table

    console = plain_console()
    table = Table(title=f"{len(trials)} merges, lower is better: the best, and the Pareto front")
    for path in models:
        table.add_column(path.resolve().name, justify="right")
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
    console.print(table)
    table = Table(
        title="Change when a model is left out of the best (below 0: it collides with the others there)"
    )
    table.add_column("left out")
    for name in names:
        table.add_column(name, justify="right")
    for path, changes in zip(models, left_out, strict=True):
        cells = ("–" if changes[name] is None else f"{changes[name]:+.4f}" for name in names)
        table.add_row(path.resolve().name, *cells)
    console.print(table)
