"""Values of options from `KOINE_*` environment variables and from a TOML file.

The command line counts first, then the environment, then the file, then the option's default. A variable is
named after command and option: `KOINE_TOKENIZER_TRAIN_VOCAB_SIZE`. In the file, tables are commands and keys
are options:

    [tokenizer.train]
    vocab-size = 32000
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from koine.cli.commands import Command, SharedVariableOption, expand_home
from koine.errors import UserError, did_you_mean
from koine.fields import short_repr

Words = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """The value of an option, and the variable or the file's key that it is from."""

    value: Any
    origin: str


def command_words(context: click.Context) -> Words:
    """Return the words of a command after `koine`: `("tokenizer", "train")`."""
    words: list[str] = []
    current: click.Context | None = context
    while current is not None and (current.parent is not None or not words):
        words.insert(0, str(current.info_name if current.parent is not None else current.command.name))
        current = current.parent
    return tuple(words)


def options_of(command: click.Command) -> list[click.Option]:
    """Return the options of a command, its own first; without `--help`."""
    shared = command.shared if isinstance(command, Command) else []
    return [one for one in (*command.params, *shared) if isinstance(one, click.Option)]


def key_of(option: click.Option) -> str:
    """Return an option's key in a file: its name without the dashes before it."""
    return next(name for name in option.opts if name.startswith("--"))[2:]


def prefix_of(words: Words) -> str:
    """Return the beginning of the names of a command's variables: `KOINE_TOKENIZER_TRAIN_`."""
    return "_".join(["KOINE", *words, ""]).replace("-", "_").upper()


def variable_of(words: Words, option: click.Option) -> str:
    """Return the name of the environment variable of an option."""
    return prefix_of(words) + key_of(option).replace("-", "_").upper()


def settings_of(context: click.Context, config: Path | None) -> dict[str, Setting]:
    """Return the values of a command's options from the environment and the file, by parameter name.

    config: the file that the command line names; without it, the file that the environment names.

    Raises:
        UserError: the file cannot be read, or holds an unknown table or key, or a value of another type.
    """
    words, command = command_words(context), context.command
    environment = environment_settings(words, command)
    where = None
    named = environment.pop("config", None)
    if config is None and named is not None:
        config, where = Path(named.value), named.origin
    found: dict[str, Setting] = {}
    if config is not None:
        root = context.find_root().command
        tables = read_tables(config, where)
        found = file_settings(config, tables, root, words, command)
    return found | environment


def environment_settings(words: Words, command: click.Command) -> dict[str, Setting]:
    """Return the values of a command's options from the environment; an empty variable counts as not set.

    An option of every command also has a variable without the command's name, such as `KOINE_QUIET`. The
    values of an option that may be repeated are separated as in a shell.
    """
    found: dict[str, Setting] = {}
    shared = command.shared if isinstance(command, Command) else []
    for option in options_of(command):
        names = [variable_of(words, option)]
        if option in shared:
            names.append(variable_of((), option))
        if isinstance(option, SharedVariableOption):
            names.append(str(option.envvar))
        name = next((name for name in names if os.environ.get(name)), None)
        if name is None:
            continue
        text: str | list[str] = os.environ[name]
        if option.multiple:
            try:
                text = [expand_home(word) for word in shlex.split(os.environ[name])]
            except ValueError as error:
                raise UserError(
                    f"cannot be split into values: {error}", where=name, hint="quote them as in a shell"
                ) from None
        else:
            text = expand_home(os.environ[name])
        found[str(option.name)] = Setting(text, name)
    return found


def read_tables(path: Path, variable: str | None) -> dict[str, Any]:
    """Return the content of a TOML file; `variable`: the one that names the file."""
    hint = f"{variable} names this file" if variable else "give a TOML file to --config"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"is no TOML: {error}", where=path, hint=hint) from None
    except OSError as error:
        raise UserError(str(error.strerror or error).lower(), where=path, hint=hint) from None


def file_settings(
    path: Path, tables: Mapping[str, Any], root: click.Command, words: Words, command: click.Command
) -> dict[str, Setting]:
    """Return the values of a command's options from the tables of a file, all of which are checked."""
    found: dict[Words, dict[str, Setting]] = {}
    if isinstance(root, click.Group):
        _check_group(path, tables, root, _unread(root, "koine"), (), found)
    else:  # a command that is called without the group above it
        _check_command(path, tables.get(words[0], {}), _unread(root, words[0]), words, found)
    known = {str(option.name) for option in options_of(command)}
    everywhere = {name: value for name, value in found.get((), {}).items() if name in known}
    return everywhere | found.get(words, {})


def _check_group(
    path: Path,
    table: Mapping[str, Any],
    group: click.Group,
    context: click.Context,
    words: Words,
    found: dict[Words, dict[str, Setting]],
) -> None:
    """Read the tables of a group's commands; at the top of the file also options of every command."""
    commands = {name.replace("-", "_"): name for name in group.list_commands(context)}
    shared = {} if words else _by_key(Command("every").shared)
    for key, value in table.items():
        name = commands.get(key.replace("-", "_"))
        if name is None and key.replace("-", "_") in shared:
            option = shared[key.replace("-", "_")]
            found.setdefault((), {})[str(option.name)] = _setting(path, key, value, option, words, context)
            continue
        shown = ".".join([*words, key])
        if name is None:
            raise UserError(
                f"unknown {f'table [{shown}]' if isinstance(value, Mapping) else f'key {shown!r}'}",
                where=path,
                hint=did_you_mean(key, [*commands.values(), *map(key_of, shared.values())]),
            )
        if not isinstance(value, Mapping):
            raise UserError(
                f"'{shown}' is a command, and here it is {_kind(value)}",
                where=path,
                hint=f"write its options below [{shown}]",
            )
        command = group.get_command(context, name)
        assert command is not None
        inner = _unread(command, name, context)
        if isinstance(command, click.Group):
            _check_group(path, value, command, inner, (*words, name), found)
        else:
            _check_command(path, value, inner, (*words, name), found)


def _unread(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    """Return a context in which values are checked only: a name on the hub is not fetched."""
    return click.Context(command, parent=parent, info_name=name, resilient_parsing=True)


def _check_command(
    path: Path,
    table: Mapping[str, Any],
    context: click.Context,
    words: Words,
    found: dict[Words, dict[str, Setting]],
) -> None:
    """Read the keys of a command's table."""
    options = _by_key(options_of(context.command))
    arguments = {one.human_readable_name.lower() for one in context.command.params} - options.keys()
    for key, value in table.items():
        option = options.get(key.replace("-", "_"))
        if option is None:
            hint = did_you_mean(key, map(key_of, options.values()))
            if key.lower() in arguments:
                hint = "it is an argument, and stands on the command line only"
            raise UserError(f"unknown key '{key}'", where=f"{path}: [{'.'.join(words)}]", hint=hint)
        setting = _setting(path, key, value, option, words, context)
        found.setdefault(words, {})[str(option.name)] = setting


def _by_key(options: Sequence[click.Option]) -> dict[str, click.Option]:
    """Return the options that a file may set, by key with underscores; a file names no other file."""
    return {key_of(one).replace("-", "_"): one for one in options if key_of(one) != "config"}


def _setting(
    path: Path, key: str, value: Any, option: click.Option, words: Words, context: click.Context
) -> Setting:
    """Return a checked value of the file; raise `UserError` naming file, table and key."""
    origin = f"{path}: [{'.'.join(words)}] {key}" if words else f"{path}: {key}"
    checked = _native_value(value, option, where=origin)
    check_value(option, checked, context, where=origin)
    return Setting(checked, origin)


def _native_value(value: Any, option: click.Option, *, where: str) -> Any:
    """Return a TOML value as the option takes it; raise `UserError` for another type.

    A repeatable option of the form NAME=VALUE takes a table too.
    """
    if option.multiple:
        if isinstance(value, Mapping) and "=" in (option.metavar or ""):
            return [expand_home(f"{name}={_as_text(one)}") for name, one in value.items()]
        if not isinstance(value, list):
            raise UserError(
                f"is {_kind(value)}, and --{key_of(option)} may be repeated",
                where=where,
                hint="give a list: [" + (f'"{value}"' if isinstance(value, str) else "...") + "]",
            )
        return [_native_item(one, option, where=where) for one in value]
    return _native_item(value, option, where=where)


def _native_item(value: Any, option: click.Option, *, where: str) -> Any:
    if option.is_flag:
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(option.type, click.types.IntParamType):
        fits, wanted = type(value) is int, "an integer"
    elif isinstance(option.type, click.types.FloatParamType):
        fits, wanted = type(value) in (int, float), "a number"
    else:
        # Numbers among texts, such as a share or `none`, are texts on the command line too.
        takes_number = not isinstance(option.type, click.Path | click.types.StringParamType | click.Choice)
        fits = isinstance(value, str) or (takes_number and type(value) in (int, float))
        wanted = "text"
    if not fits:
        raise UserError(f"is {_kind(value)}", where=where, hint=f"it must be {wanted}")
    return expand_home(value) if isinstance(value, str) else value


def _as_text(value: Any) -> str:
    """Return a TOML value as one would type it after `=`."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_as_text, value)) if isinstance(value, list) else str(value)


def _kind(value: Any) -> str:
    """Return type and value in words: `the text 'a'`, `a table`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list):
        return "a list"
    kind = {str: "the text", int: "the integer", float: "the number"}.get(type(value), "the date or time")
    return f"{kind} {short_repr(value) if isinstance(value, str) else value}"


def check_value(parameter: click.Parameter, value: Any, context: click.Context, *, where: str) -> None:
    """Raise `UserError` with the origin `where` if the parameter does not take a value."""
    try:
        parameter.type_cast_value(context, value)
    except click.BadParameter as error:
        if isinstance(parameter.type, click.types.BoolParamType):
            # Click's message lists twelve spellings, the empty one too.
            raise UserError(f"'{value}' is neither true nor false", where=where) from None
        raise UserError(error.message.rstrip("."), where=where) from None
    except UserError as error:
        raise UserError(error.what, where=where, hint=error.hint) from None


def speaks_of(error: UserError, option: click.Parameter, value: Any) -> bool:
    """Return whether an error is about an option: it names the option, or its value as the place."""
    names = "|".join(map(re.escape, {*option.opts, *option.secondary_opts}))
    text = f"{error.where or ''} {error.what}"
    values = value if isinstance(value, list) else [value]
    return (
        re.search(rf"(?<![\w-])(?:{names})(?![\w-])", text) is not None
        or re.match(rf"{option.name}\b(?! of)", error.what) is not None
        or (error.where is not None and error.where in map(str, values))
    )
