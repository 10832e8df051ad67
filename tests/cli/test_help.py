"""Every command's help follows the same rules, and one option means the same in all commands."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from koine.cli.main import ELSEWHERE, cli


def walk(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield a command and all below it, each with its words."""
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=words[-1] if words else "koine")
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from walk(found, (*words, name))


COMMANDS = dict(walk(cli, ()))
GROUPS = [words for words, command in COMMANDS.items() if isinstance(command, click.Group)]


def name_of(words: tuple[str, ...]) -> str:
    return " ".join(("koine", *words))


def help_of(words: tuple[str, ...], width: int = 110) -> str:
    result = CliRunner().invoke(
        cli, [*words, "--help"], prog_name="koine", terminal_width=width, catch_exceptions=False
    )
    assert result.exit_code == 0
    return result.output


def options(name: str) -> dict[str, click.Option]:
    """The option `name` of each command that has it."""
    return {
        name_of(words): parameter
        for words, command in COMMANDS.items()
        for parameter in command.params
        if isinstance(parameter, click.Option) and name in parameter.opts
    }


def test_the_walk_finds_commands_three_words_deep() -> None:
    assert {("model", "export"), ("merge", "linear"), ("merge", "search"), ("tokenizer", "extend")} <= set(
        COMMANDS
    )


@pytest.mark.parametrize("words", GROUPS, ids=name_of)
def test_a_group_without_arguments_prints_its_help_and_succeeds(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, list(words), prog_name="koine", catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output == CliRunner().invoke(cli, [*words, "--help"], prog_name="koine").output
    assert "Commands:" in result.output


@pytest.mark.parametrize("words", COMMANDS, ids=name_of)
def test_help_has_no_double_full_stop_and_no_text_that_is_cut(words: tuple[str, ...]) -> None:
    text = help_of(words, width=80)
    # `MODEL...` in a usage is an argument that may be repeated.
    rest = re.sub(r"(\[ARGS\]|\[?[A-Z]+\]?)\.\.\.", "", text)
    assert ".." not in rest


@pytest.mark.parametrize("words", COMMANDS, ids=name_of)
def test_help_begins_with_words(words: tuple[str, ...]) -> None:
    text = COMMANDS[words].help or ""
    first = text.partition("\n\n")[0]
    assert re.match(r"[A-Z][a-z-]+[ ,]", first), first
    formulas = [code for code in re.findall(r"`([^`]*)`", first) if re.search(r"[=_^]| [-+*/] ", code)]
    assert formulas == []
    assert first.endswith(".")


@pytest.mark.parametrize("words", COMMANDS, ids=name_of)
def test_required_options_are_marked(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    context = click.Context(command, info_name="koine")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            record = parameter.get_help_record(context)
            assert record is not None, parameter.name
            assert parameter.help, f"{parameter.name} has no help"
            # `required=True`, or a note by hand where it depends on another option
            assert parameter.required == ("[required]" in record[1]) or "[required" in parameter.help
        elif isinstance(parameter, click.Argument) and words:
            shown = parameter.make_metavar(context)
            assert parameter.required == (not shown.startswith("[")), shown


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "dare-linear", "dare-ties", "model-stock"])
def test_a_merge_that_needs_a_base_marks_it(method: str) -> None:
    assert re.search(r"--base PATH .*\[required\]", help_of(("merge", method)))


def test_a_seed_is_an_integer_everywhere() -> None:
    found = options("--seed")
    assert {"koine upcycle btx", "koine extend", "koine train pretrain", "koine evaluate"} <= set(found)
    for name, option in found.items():
        assert isinstance(option.type, (click.types.IntParamType, click.IntRange)), name
        assert (option.help or "").startswith("Random seed"), name


def test_a_device_has_one_default_and_one_help() -> None:
    found = options("--device")
    assert {"koine chat", "koine evaluate", "koine train pretrain", "koine align train"} <= set(found)
    assert {(option.default, option.show_default) for option in found.values()} == {("auto", True)}
    assert len({option.help for option in found.values()}) == 1


def kind(option: click.Option) -> str:
    """A switch, a number, or a text (a path and a choice are texts)."""
    if option.is_flag:
        return "switch"
    numbers = (click.types.IntParamType, click.types.FloatParamType)
    return "number" if isinstance(option.type, numbers) else "text"


def test_an_option_is_a_switch_a_number_or_a_text_in_all_commands() -> None:
    kinds: dict[str, dict[str, list[str]]] = {}
    for words, command in COMMANDS.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                for name in parameter.opts:
                    kinds.setdefault(name, {}).setdefault(kind(parameter), []).append(name_of(words))
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


def test_the_first_help_says_where_export_and_extend_are() -> None:
    text = help_of(())
    for words, summary in ELSEWHERE:
        assert words in text
        assert summary.endswith(".")
    assert {"model export", "tokenizer extend", "run extend"} == {words for words, _ in ELSEWHERE}
    assert ("model", "export") in COMMANDS
    from koine.recipes import RECIPES

    assert "extend" in RECIPES
