"""Options of `koine merge`, read from the signatures of the merge methods."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING

import click

from koine.cli.arguments import MODEL
from koine.cli.outputs import OutputFolder
from koine.errors import UserError

if TYPE_CHECKING:
    from koine.combine.merging.method_registry import MergeMethod


def method_parameters(method: MergeMethod) -> list[click.Parameter]:
    """Return all arguments and options of a method's command."""
    parameters: list[click.Parameter] = [
        click.Argument(["models"], nargs=-1, required=True, type=MODEL, metavar="MODEL..."),
        click.Option(["--out"], type=OutputFolder(), required=True, help="Folder to write to."),
    ]
    if method.takes("weights"):
        parameters += [
            click.Option(["--weights"], help="One per model, separated by commas.  [default: equal]"),
            click.Option(
                ["--weights-for"],
                multiple=True,
                metavar="PATTERN=W,W",
                help="Other weights for the tensors that a pattern names, such as "
                "'model.layers.[0-3].*=0.2,0.8'. The first pattern that fits counts.",
            ),
        ]
    if method.takes("base"):
        parameters.append(
            click.Option(
                ["--base"],
                type=MODEL,
                help="The models' common ancestor.  [required]",
            )
        )
    parameters += [own_option(method, name) for name in method.options]
    if method.takes("generator"):
        parameters.append(
            click.Option(
                ["--seed"], type=int, default=0, show_default=True, help="Random seed for DARE's dropout."
            )
        )
    return [*parameters, *shared_options()]


def own_option(method: MergeMethod, name: str, *, with_default: bool = True) -> click.Option:
    """Return one option of a method: a number or a switch."""
    default = method.parameters[name].default
    required = default is inspect.Parameter.empty
    given = default if with_default and not required else None
    switch = f"--{name}/--no-{name}" if method.is_switch(name) else f"--{name}"
    return click.Option(
        [switch],
        type=bool if method.is_switch(name) else float,
        default=given,
        show_default=given is not None,
        help=method.options[name].help + ("  [required]" if required else ""),
    )


def shared_options() -> list[click.Parameter]:
    """Return the options that all methods have."""
    return [
        click.Option(
            ["--tokenizer"],
            default="",
            metavar="first|base|MODEL",
            help="Whose tokenizer and chat template the result has.  "
            "[default: the first model's; tokenizers must then be equal]",
        ),
        click.Option(["--unrelated"], is_flag=True, help="Also merge models without a common ancestor."),
        click.Option(["--dtype"], help="float32, bfloat16 or float16.  [default: the first model's]"),
        click.Option(["--max-shard-size"], default="5GB", show_default=True, help="Largest file of weights."),
        click.Option(
            ["--threads"],
            type=click.IntRange(1),
            help="CPU threads: each merges one tensor.  [default: the cores]",
        ),
        click.Option(["--overwrite"], is_flag=True, help="Replace an existing output."),
        click.Option(["--dry-run"], is_flag=True, help="Print peak memory, time and size; write nothing."),
    ]


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Return the numbers of a list with commas; raise `UserError` naming the option."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"'{text}' is no list of numbers", where=option, hint="for example 0.5,0.5") from None


def parse_pattern(text: str) -> tuple[str, tuple[float, ...]]:
    """Return pattern and weights of `PATTERN=W,W`; raise `UserError` where it is not of that form."""
    pattern, equals, weights = text.rpartition("=")
    if not equals or not pattern:
        raise UserError(
            f"'{text}' is not PATTERN=W,W", where="--weights-for", hint="for example '*.mlp.*=0.2,0.8'"
        )
    return pattern, parse_numbers(weights, "--weights-for")


def parse_shard_size(text: str) -> int:
    """Return the bytes of `5GB`, `200MB` or a plain number; raise `UserError` for anything else."""
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
    unit = text[-2:].lower()
    try:
        count = float(text[:-2]) * units[unit] if unit in units else float(text)
    except ValueError:
        count = 0.0
    if not 1 <= count < math.inf:
        raise UserError(f"'{text}' is no size", where="--max-shard-size", hint="for example 5GB or 200MB")
    return int(count)
