"""Groups of commands: without arguments they print their help, with a summary of each command in full."""

from __future__ import annotations

from typing import Any

import click

from koine.cli.commands import Command, shared_options
from koine.errors import UserError


class HelpGroup(click.Group):
    """A group that prints its help and ends with exit code 0 where no arguments are given."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["no_args_is_help"] = False  # click's own way ends with exit code 2
        super().__init__(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        word = args[0].partition("=")[0] if args else ""
        if any(word in option.opts for option in shared_options(answers=True)):
            raise UserError(
                f"{word} is an option of a command, and stands after it",
                hint=f"write {ctx.command_path} COMMAND {word}",
            )
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command with its summary; long ones are wrapped, where click cuts them."""
        rows = [
            (name, command.get_short_help_str(limit=1000))
            for name in self.list_commands(ctx)
            if (command := self.get_command(ctx, name)) is not None and not command.hidden
        ]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
