"""`koine merge METHOD MODEL...`: a command for each method, its options read off the method's own parameters."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koine.terminal import plain_console

if TYPE_CHECKING:
    from koine.combine.merging.methods import MergeMethod

OWN = {"cross-modal": "koine.cli.merge.cross_modal", "search": "koine.cli.merge.search"}
"""Commands that are no method of the table, and the modules that hold them under the name `command`."""


class MethodGroup(click.Group):
    """The methods of `koine.combine.merging.methods`; a method that is added there is a command here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from koine.combine.merging.methods import METHODS

        return [*METHODS, *OWN]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in OWN:
            import importlib

            found = importlib.import_module(OWN[cmd_name]).command
            assert isinstance(found, click.Command)
            return found
        from koine.combine.merging.methods import METHODS

        return None if cmd_name not in METHODS else command_of(cmd_name, METHODS[cmd_name])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            from koine.errors import UserError, did_you_mean

            raise UserError(f"unknown method '{args[0]}'", hint=did_you_mean(args[0], known))
        return super().resolve_command(ctx, args)


@click.group(cls=MethodGroup)
def merge() -> None:
    """Merge checkpoints of one architecture, tensor by tensor, whatever their size; `koine merge METHOD --help` says what it does and takes."""


def command_of(name: str, info: MergeMethod) -> click.Command:
    """The command of a method."""

    def run(**given: Any) -> None:
        run_merge(name, info, **given)

    parameters: list[click.Parameter] = [
        click.Argument(
            ["models"], nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL..."
        ),
        click.Option(["--out"], type=click.Path(path_type=Path), required=True, help="Folder to write to."),
    ]
    if info.takes("weights"):
        parameters += [
            click.Option(["--weights"], help="One a model, with commas between.  [default: equal]"),
            click.Option(
                ["--weights-for"], multiple=True, metavar="PATTERN=W,W",
                help="Other weights for the tensors that a pattern names, such as 'model.layers.[0-3].*=0.2,0.8'; the first that fits counts.",
            ),
        ]  # fmt: skip
    if info.takes("base"):
        parameters.append(
            click.Option(["--base"], type=click.Path(path_type=Path), help="The models' common ancestor.")
        )
    for key, parameter in info.parameters.items():
        if parameter.default is True or parameter.default is False:
            parameters.append(
                click.Option(
                    [f"--{key}/--no-{key}"], default=parameter.default, show_default=True, help=HELP.get(key)
                )
            )
        else:
            required = parameter.default is inspect.Parameter.empty
            parameters.append(
                click.Option(
                    [f"--{key}"], type=float, help=HELP.get(key), show_default=not required,
                    default=None if required else parameter.default,
                )
            )  # fmt: skip
    if info.takes("generator"):
        parameters.append(
            click.Option(["--seed"], type=int, default=0, show_default=True, help="Of what is dropped.")
        )
    parameters += COMMON
    function: Callable[..., None] = run
    summary = inspect.getdoc(info.function) or ""
    return click.Command(
        name, callback=function, params=parameters, help=f"{summary}\n\nSource: {info.source}",
        short_help=re.split(r"[.:;] ", " ".join(summary.split()))[0] + ".", context_settings={"max_content_width": 110},
    )  # fmt: skip


HELP = {
    "t": "Share of the way from the first model to the second.",
    "density": "Share of each difference's entries that is kept.",
    "scale": "Factor on the merged difference (lambda).",
    "normalize": "Divide by the sum of the weights (of the models that take part in an entry).",
}
COMMON: list[click.Parameter] = [
    click.Option(
        ["--tokenizer"], default="", metavar="first|base|MODEL",
        help="Whose tokenizer and chat template the result has.  [default: the first's; tokenizers must not differ then]",
    ),
    click.Option(["--unrelated"], is_flag=True, help="Merge models without a common ancestor too."),
    click.Option(["--dtype"], help="float32, bfloat16 or float16.  [default: the first model's]"),
    click.Option(["--max-shard-size"], default="5GB", show_default=True, help="Largest file of weights."),
    click.Option(["--threads"], type=click.IntRange(1), help="Tensors at a time.  [default: the cores]"),
    click.Option(["--overwrite"], is_flag=True, help="Replace what is there already."),
    click.Option(["--dry-run"], is_flag=True, help="Say peak memory, time and size; write nothing."),
]  # fmt: skip


def run_merge(name: str, info: MergeMethod, *, models: tuple[Path, ...], out: Path, **given: Any) -> None:
    """Merge, or say what it would take."""
    from koine.allocator import keep_freed_memory
    from koine.combine.merging.budget import estimate_merge
    from koine.combine.merging.config import MergeConfig
    from koine.combine.merging.plan import plan_merge
    from koine.combine.merging.runner import merge
    from koine.files import check_inside
    from koine.hardware import usable_cores
    from koine.plan.formatting import duration, size

    weights: tuple[float, ...] = ()
    if info.takes("weights"):
        text = given.pop("weights")
        weights = (1.0 / len(models),) * len(models) if text is None else numbers(text, "--weights")
    patterns = tuple(pattern_of(one) for one in given.pop("weights_for", ()))
    config = MergeConfig(
        method=name,
        models=models,
        base=given.pop("base", None),
        weights=weights,
        weights_for=patterns,
        options={key: given.pop(key) for key in info.parameters if given.get(key) is not None},
        seed=given.pop("seed", 0),
        tokenizer=given["tokenizer"],
        unrelated=given["unrelated"],
        dtype=given["dtype"],
        max_shard_bytes=bytes_of(given["max_shard_size"]),
    )
    if given["dry_run"]:
        check_inside(out, [*models, *([] if config.base is None else [config.base])])
        plan = plan_merge(config)
        threads = given["threads"] or usable_cores()
        found = estimate_merge(plan, threads)
        plan.close()
        click.echo(
            f"{found.tensors:,} tensors, {size(found.output_bytes)} to write; about {size(found.peak_memory_bytes)} of memory "
            f"and {duration(found.seconds)} on {threads} threads"
        )
        return
    keep_freed_memory()
    report = with_progress(
        lambda on_progress: merge(
            config, out, threads=given["threads"], on_progress=on_progress, overwrite=given["overwrite"]
        )
    )
    show(report)
    click.echo(f"written to {out}")


def with_progress(run: Callable[[Callable[[int, int], None]], dict[str, Any]]) -> dict[str, Any]:
    """Run with a bar, where there is a terminal."""
    import sys

    if not sys.stderr.isatty():
        return run(lambda done, total: None)
    from rich.progress import Progress

    with Progress(console=plain_console(stderr=True), transient=True) as progress:
        task = progress.add_task("tensors", total=None)
        return run(lambda done, total: progress.update(task, completed=done, total=total))


def show(report: dict[str, Any], most: int = 8) -> None:
    """The tensors that are farthest apart, or most in conflict."""
    from rich.table import Table

    measured = {name: one for name, one in report["tensors"].items() if one.get("distance")}
    conflicts = any("sign_conflicts" in one for one in measured.values())

    def order(name: str) -> float:
        one = measured[name]
        return float(one.get("sign_conflicts") or max(value or 0.0 for value in one["distance"]))

    table = Table(
        title=f"Where the models are {'most in conflict' if conflicts else 'farthest apart'} ({most} of {len(measured)} tensors)"
    )
    for column in ("tensor", "distance", *(("cosine", "sign conflicts") if conflicts else ())):
        table.add_column(column, justify="left" if column == "tensor" else "right", overflow="fold")
    for name in sorted(measured, key=order, reverse=True)[:most]:
        one = measured[name]
        cells = [" ".join("–" if value is None else f"{value:.3f}" for value in one["distance"])]
        if conflicts:
            cells += [f"{one['cosine']:.2f}", f"{one['sign_conflicts']:.0%}"]
        table.add_row(name, *cells)
    plain_console().print(table)


def numbers(text: str, option: str) -> tuple[float, ...]:
    """The numbers of a list with commas; raises `UserError` naming the option."""
    from koine.errors import UserError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"'{text}' is no list of numbers", where=option, hint="for example 0.5,0.5") from None


def pattern_of(text: str) -> tuple[str, tuple[float, ...]]:
    """`PATTERN=W,W`."""
    from koine.errors import UserError

    pattern, equals, weights = text.rpartition("=")
    if not equals or not pattern:
        raise UserError(
            f"'{text}' is not PATTERN=W,W", where="--weights-for", hint="for example '*.mlp.*=0.2,0.8'"
        )
    return pattern, numbers(weights, "--weights-for")


def bytes_of(text: str) -> int:
    """`5GB`, `200MB`, or a number of bytes."""
    from koine.errors import UserError

    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
    unit = text[-2:].lower()
    try:
        count = float(text[:-2]) * units[unit] if unit in units else float(text)
    except ValueError:
        count = 0.0
    if not 1 <= count < math.inf:
        raise UserError(f"'{text}' is no size", where="--max-shard-size", hint="for example 5GB or 200MB")
    return int(count)
