"""The class of every command: its values from command line, environment and file, `--json`, `--quiet`."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from koine.errors import KoineWarning, UserError, did_you_mean
from koine.terminal import quiet_output

CONFIG_VARIABLE = "KOINE_CONFIG"
_SETTINGS = "koine.cli.commands.settings"


def expand_home(word: str) -> str:
    """Expand `~` at the beginning of an argument or after its `=`, where no shell does."""
    before, equals, path = word.rpartition("=")
    if path == "~" or path.startswith("~/"):
        return before + equals + os.path.expanduser(path)  # noqa: PTH111 - the rest stays as it was typed
    return word


class SharedVariableOption(click.Option):
    """An option with one variable for all its commands; a command's own variable counts before that."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return None: `koine.cli.settings` reads both variables."""
        return None


def shared_options(*, answers: bool) -> list[click.Option]:
    """Return the options of every command; `--json` only for those with an answer."""
    options = [
        click.Option(
            ["--json", "as_json"],
            is_flag=True,
            help="Print the answer as one JSON object, and nothing else on standard output.",
        ),
        click.Option(
            ["--config"],
            type=click.Path(path_type=Path),
            is_eager=True,
            callback=_read_settings,
            help=f"TOML file with values of options; {CONFIG_VARIABLE} names one too.",
        ),
        # After --config, which may set it, and before names on the hub, whose download shows its progress.
        click.Option(
            ["--quiet", "-q"],
            is_flag=True,
            is_eager=True,
            help="Print no progress and no notes; errors and answers stay.",
        ),
    ]
    return options if answers else options[1:]


def _read_settings(context: click.Context, option: click.Parameter, given: Path | None) -> Path | None:
    """Make the values of the environment and of the file the command's defaults."""
    if context.resilient_parsing:
        return given
    from koine.cli.settings import settings_of

    settings = settings_of(context, given)
    context.meta[_SETTINGS] = settings
    context.default_map = {name: setting.value for name, setting in settings.items()}
    return given


class Command(click.Command):
    """A command whose options are also set by `KOINE_*` variables and a TOML file.

    Args:
        answers: The command prints an answer, so that it has `--json`; see `koine.cli.answers`.
    """

    def __init__(self, *args: Any, answers: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared = shared_options(answers=answers)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help_option = super().get_params(ctx)
        return [*own, *self.shared, help_option]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options, then those that every command has."""
        *_, help_option = self.get_params(ctx)
        for title, options in (
            ("Options", self.params),
            ("Options of every command", [*self.shared, help_option]),
        ):
            rows = [row for one in options if (row := one.get_help_record(ctx)) is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Say how the environment and a file set an option, with one of this command's as the example."""
        super().format_epilog(ctx, formatter)
        from koine.cli.settings import command_words, key_of, options_of, variable_of

        words = command_words(ctx)
        option = next(one for one in options_of(self) if key_of(one) != "config")
        formatter.write_paragraph()
        formatter.write_text(
            f"Every option can also be set by an environment variable or in the file of --config: "
            f"{option.opts[0]} by {variable_of(words, option)}, or by '{key_of(option)}' in its table "
            f"[{'.'.join(words)}]. The command line counts first, then the environment, then the file."
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; an error in a value of the environment or the file names its origin."""
        try:
            return super().parse_args(ctx, args)
        except (click.BadParameter, UserError):
            self._check_settings(ctx)
            raise

    def _check_settings(self, context: click.Context) -> None:
        """Raise `UserError` for the first value in use that no option takes, with its origin."""
        from koine.cli.settings import check_value

        settings = context.meta.get(_SETTINGS, {})
        for option in self.get_params(context):
            setting = settings.get(option.name)
            if setting is not None and context.get_parameter_source(option.name) is _FROM_SETTINGS:
                check_value(option, setting.value, context, where=setting.origin)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command: quietly, and with JSON as its only output, where the user asked for that."""
        quiet, as_json = ctx.params.pop("quiet"), ctx.params.pop("as_json", False)
        ctx.params.pop("config")
        with ExitStack() as stack:
            stack.enter_context(quiet_output(quiet))
            if as_json:
                from koine.cli.answers import json_answer

                self._check_standard_output(ctx)
                stack.enter_context(json_answer(ctx))
            self._warn_of_unknown_variables(ctx)
            try:
                return super().invoke(ctx)
            except UserError as error:
                raise self._with_origin(ctx, error) from error

    def _check_standard_output(self, context: click.Context) -> None:
        """Raise `UserError` where a file too is to be written to standard output."""
        from koine.files import is_standard_output

        for option in self.params:
            value = context.params.get(str(option.name))
            if not (isinstance(option.type, click.Path) and isinstance(value, str | Path)):
                continue
            if str(value) == "-" or is_standard_output(Path(value)):
                raise UserError(
                    f"--json and {option.opts[0]} both go to standard output",
                    hint=f"leave one out, or give {option.opts[0]} a file",
                )

    def _warn_of_unknown_variables(self, context: click.Context) -> None:
        """Warn of variables that begin with this command's name and set none of its options."""
        from koine.cli.settings import command_words, options_of, prefix_of, variable_of

        words = command_words(context)
        known = [variable_of(words, option) for option in options_of(self)]
        for name in sorted(os.environ):
            if name.startswith(prefix_of(words)) and name not in known:
                warnings.warn(
                    f"{name} sets no option of koine {' '.join(words)}; {did_you_mean(name, known)}",
                    KoineWarning,
                    stacklevel=1,
                )

    def _with_origin(self, context: click.Context, error: UserError) -> UserError:
        """Return the error with the variable, or the file's key, of each option that it speaks of."""
        from koine.cli.settings import speaks_of

        settings = context.meta.get(_SETTINGS, {})
        origins = [
            f"{option.opts[0]} is set by {settings[option.name].origin}"
            for option in self.get_params(context)
            if option.name in settings
            and context.get_parameter_source(option.name) is _FROM_SETTINGS
            and speaks_of(error, option, settings[option.name].value)
        ]
        if not origins:
            return error
        return UserError(f"{error.what} ({', '.join(origins)})", where=error.where, hint=error.hint)


_FROM_SETTINGS = ParameterSource.DEFAULT_MAP
"""The source of values that are neither of the command line nor an option's own default."""
