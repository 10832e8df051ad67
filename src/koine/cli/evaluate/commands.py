"""`koine evaluate`: the table of evaluations, or the long-context suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from koine.cli.arguments import DEVICE, MODEL
from koine.cli.evaluate import long_context, records
from koine.cli.evaluate.output import write_outcome
from koine.cli.outputs import OVERWRITE, OutputFile, output_files, say_written
from koine.errors import UserError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _all(options: Iterable[Decorator]) -> Decorator:
    """Apply options to a command, in their order in its help."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(list(options)):
            command = option(command)
        return command

    return decorate


def _names(options: Iterable[Decorator]) -> set[str]:
    """Return the parameter names of options."""

    def nothing() -> None:
        """Carry the options."""

    return {str(parameter.name) for parameter in click.command()(_all(options)(nothing)).params}


@click.command()
@click.argument("model", type=MODEL)
@_all(records.OPTIONS)
@click.option("--out", type=OutputFile(), help="Write the results as JSON to this file.")
@click.option("--page", type=OutputFile(), help="Write a page with plots to this HTML file.")
@click.option(
    "--language",
    help="Language of records that name none; with --suite long, of haystack and needles.  "
    "[default: the haystack's, or en]",
)
@DEVICE
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Precision.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Random seed of the intervals and of the suite's prompts.",
)
@click.option(
    "--suite",
    type=click.Choice(["long"]),
    help="long: needles, RULER-class tasks, loss per position, attention; the options below belong to it.",
)
@_all(long_context.OPTIONS)
@OVERWRITE
@click.pass_context
def evaluate(
    context: click.Context,
    /,
    model: Path,
    out: Path | None,
    page: Path | None,
    language: str | None,
    device: str,
    dtype: str,
    seed: int,
    suite: str | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Measure MODEL: bits per byte by language and domain, and the accuracy of its answers.

    A mixture of experts also gets the share of each domain's tokens by expert. With --suite long, the model
    is measured on long texts instead.
    Each document is scored on its own from its beginning, with all its bytes. The accuracy stands beside its
    majority baseline: the share that one constant answer for each kind of question and language gets right.
    Intervals are 95 %: bootstrap intervals over documents, Wilson score intervals over questions.
    """
    from koine.hardware import chosen_device

    if device == "auto" and (device := chosen_device(device)) != "cpu":
        click.echo(f"koine: note: evaluating on {device}; --device cpu computes on the processor", err=True)
    group: Any = records if suite is None else long_context
    names = _names(group.OPTIONS)
    _check_options(context, [name for name in options if name not in names], suite)
    chosen = {name: value for name, value in options.items() if name in names}
    run = records.evaluate_records if suite is None else long_context.evaluate_suite
    sources = ("data", "questions", "training_questions", "haystack")
    inputs = [model, *(path for name in sources for path in options[name]), options["qa"]]
    with output_files({"--out": out, "--page": page}, overwrite=overwrite, reads=inputs) as targets:
        outcome = run(model, language=language, device=device, dtype=dtype, seed=seed, **chosen)
        write_outcome(outcome, out=targets["--out"], page=targets["--page"])
    group.print_tables(outcome)
    say_written(out, page)


def _check_options(context: click.Context, names: Iterable[str], suite: str | None) -> None:
    """Raise `UserError` where an option was given that belongs to the other kind of evaluation."""
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UserError(
                f"{flags[name]} is not an option of "
                + ("the suite long" if suite else "an evaluation without --suite long"),
                hint=f"leave it out, or {'leave --suite out' if suite else 'add --suite long'}",
            )
