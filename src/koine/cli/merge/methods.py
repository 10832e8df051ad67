"""`koine merge METHOD MODEL...`: one command per merge method, built from the method's signature."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koine.cli.groups import HelpGroup
from koine.cli.merge.options import method_parameters, parse_numbers, parse_pattern, parse_shard_size
from koine.cli.recording import recorded_output
from koine.terminal import plain_console

if TYPE_CHECKING:
    from koine.combine.merging.config import MergeConfig
    from koine.combine.merging.method_registry import MergeMethod

OTHER_COMMANDS = {"cross-modal": "koine.cli.merge.cross_modal", "search": "koine.cli.merge.search"}
"""Commands that are no merge method, and the modules that define them under the name `command`."""

SHOWN_TENSORS = 8
"""Rows of the table that a merge prints."""


class MethodGroup(HelpGroup):
    """The methods of `koine.combine.merging.methods`; a method that is added there is a command here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from koine.combine.merging.methods import METHODS

        return [*METHODS, *OTHER_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in OTHER_COMMANDS:
            import importlib

            found = importlib.import_module(OTHER_COMMANDS[cmd_name]).command
            assert isinstance(found, click.Command)
            return found
        from koine.combine.merging.methods import METHODS

        return None if cmd_name not in METHODS else command_of(METHODS[cmd_name])

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
    """Merge checkpoints of one architecture into one of the same size.

    Tensors are merged one by one, so that memory does not grow with the model. `koine merge METHOD --help`
    describes a method and its options.
    """


def command_of(method: MergeMethod) -> click.Command:
    """Return the command of a method."""

    def run(**given: Any) -> None:
        run_method(method, **given)

    summary = inspect.getdoc(method.function) or ""
    return click.Command(
        method.name,
        callback=run,
        params=method_parameters(method),
        help=f"{summary}\n\nSource: {method.source}",
        short_help=re.split(r"[.:;] ", " ".join(summary.split()))[0].rstrip(".") + ".",
        context_settings={"max_content_width": 110},
    )


def run_method(method: MergeMethod, *, models: tuple[Path, ...], out: Path, **given: Any) -> None:
    """Merge, or print what the merge would need."""
    from koine.allocator import keep_freed_memory
    from koine.combine.merging.config import MergeConfig
    from koine.combine.merging.runner import run_merge
    from koine.hardware import usable_cores

    weights: tuple[float, ...] = ()
    if method.takes("weights"):
        text = given["weights"]
        weights = (1.0 / len(models),) * len(models) if text is None else parse_numbers(text, "--weights")
    config = MergeConfig(
        method=method.name,
        models=models,
        base=given.get("base"),
        weights=weights,
        weights_for=tuple(parse_pattern(one) for one in given.get("weights_for", ())),
        options={name: given[name] for name in method.options if given[name] is not None},
        seed=given.get("seed", 0),
        tokenizer=given["tokenizer"],
        unrelated=given["unrelated"],
        dtype=given["dtype"],
        max_shard_bytes=parse_shard_size(given["max_shard_size"]),
    )
    if given["dry_run"]:
        print_estimate(config, out, threads=given["threads"] or usable_cores())
        return
    keep_freed_memory()
    with recorded_output(out, {"models": config.models, "base": config.base}):
        report = with_progress(
            lambda on_progress: run_merge(
                config, out, threads=given["threads"], on_progress=on_progress, overwrite=given["overwrite"]
            )
        )
    print_differences(report)
    click.echo(f"written to {out}")


def print_estimate(config: MergeConfig, out: Path, *, threads: int) -> None:
    """Print tensors, size, memory and time of a merge, without running it."""
    from koine.combine.merging.budget import estimate_merge
    from koine.combine.merging.plan import plan_merge
    from koine.files import check_inside
    from koine.plan.formatting import duration, size

    check_inside(out, [*config.models, *([] if config.base is None else [config.base])])
    plan = plan_merge(config)
    found = estimate_merge(plan, threads)
    plan.close()
    click.echo(
        f"{found.tensors:,} tensors, {size(found.output_bytes)} to write; "
        f"about {size(found.peak_memory_bytes)} of memory and {duration(found.seconds)} on {threads} threads"
    )


def with_progress(run: Callable[[Callable[[int, int], None]], dict[str, Any]]) -> dict[str, Any]:
    """Run with a progress bar, where standard error is a terminal."""
    import sys

    if not sys.stderr.isatty():
        return run(lambda done, total: None)
    from rich.progress import Progress

    with Progress(console=plain_console(stderr=True), transient=True) as progress:
        task = progress.add_task("tensors", total=None)
        return run(lambda done, total: progress.update(task, completed=done, total=total))


def print_differences(report: dict[str, Any]) -> None:
    """Print a table of the tensors that are farthest apart, or most in conflict."""
    from rich.table import Table

    measured = {name: one for name, one in report["tensors"].items() if one.get("distance")}
    conflicts = any("sign_conflicts" in one for one in measured.values())

    def order(name: str) -> float:
        one = measured[name]
        return float(one.get("sign_conflicts") or max(value or 0.0 for value in one["distance"]))

    what = "most in conflict" if conflicts else "farthest apart"
    table = Table(title=f"Where the models are {what} ({SHOWN_TENSORS} of {len(measured)} tensors)")
    for column in ("tensor", "distance", *(("cosine", "sign conflicts") if conflicts else ())):
        table.add_column(column, justify="left" if column == "tensor" else "right", overflow="fold")
    for name in sorted(measured, key=order, reverse=True)[:SHOWN_TENSORS]:
        one = measured[name]
        cells = [" ".join("–" if value is None else f"{value:.3f}" for value in one["distance"])]
        if conflicts:
            cells += [f"{one['cosine']:.2f}", f"{one['sign_conflicts']:.0%}"]
        table.add_row(name, *cells)
    plain_console().print(table)
