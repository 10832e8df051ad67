"""Every command has `--json`, `--quiet` and `--config`, and reads its options from environment and file."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from koine import terminal
from koine.cli import main as entry
from koine.cli.answers import print_answer
from koine.cli.commands import Command
from koine.cli.groups import HelpGroup
from koine.cli.main import cli
from koine.cli.settings import options_of, variable_of
from koine.errors import KoineWarning, UserError

from .test_help import COMMANDS, help_of, name_of

LEAVES = {words: command for words, command in COMMANDS.items() if not isinstance(command, click.Group)}
WITHOUT_ANSWER = {("chat",), ("completion",)}
"""Commands that print a conversation or a script."""


@pytest.mark.parametrize("words", LEAVES, ids=name_of)
def test_every_command_has_the_options_of_every_command(words: tuple[str, ...]) -> None:
    command = LEAVES[words]
    assert isinstance(command, Command)
    context = click.Context(command, info_name=words[-1])
    names = [name for parameter in command.get_params(context) for name in parameter.opts]
    assert {"--quiet", "--config"} <= set(names)
    assert ("--json" in names) == (words not in WITHOUT_ANSWER)
    assert len(names) == len(set(names))
    # One switch each, and none of a command's own.
    assert {"quiet", "as_json", "config"}.isdisjoint(str(one.name) for one in command.params)


@pytest.mark.parametrize("words", LEAVES, ids=name_of)
def test_the_help_names_a_variable_and_a_table_of_the_command(words: tuple[str, ...]) -> None:
    text = " ".join(help_of(words).split())
    option = next(one for one in options_of(LEAVES[words]) if one.name != "config")
    assert variable_of(words, option) in text
    assert f"[{'.'.join(words)}]" in text


def test_variables_of_all_options_differ() -> None:
    names = [
        variable_of(words, option) for words, command in LEAVES.items() for option in options_of(command)
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("words", [(), ("merge",), ("data",)], ids=name_of)
@pytest.mark.parametrize("option", ["--json", "--quiet", "-q", "--config=x.toml"])
def test_an_option_before_its_command_is_told_where_it_stands(words: tuple[str, ...], option: str) -> None:
    word = option.partition("=")[0]
    with pytest.raises(UserError, match=f"{word} is an option of a command, and stands after it"):
        CliRunner().invoke(cli, [*words, option, "x"], prog_name="koine", catch_exceptions=False)


# A small command of our own, so that what the class does shows without torch.


def invoke(*arguments: str, body: Callable[..., object] | None = None) -> Result:
    """Run `koine tool work` with these arguments; it returns its values as the answer."""

    @click.group(cls=HelpGroup)
    def root() -> None:
        """Do things."""

    @root.group(cls=HelpGroup)
    def tool() -> None:
        """Do things."""

    @tool.command()
    @click.argument("place", required=False)
    @click.option("--vocab-size", type=click.IntRange(1), default=100)
    @click.option("--rate", type=float, default=0.5)
    @click.option("--mode", type=click.Choice(["fast", "slow"]), default="fast")
    @click.option("--set", "settings", multiple=True, metavar="KEY=VALUE")
    @click.option("--text", multiple=True)
    @click.option("--out", type=click.Path(path_type=Path))
    @click.option("--compare/--no-compare", default=False)
    def work(**values: object) -> None:
        """Do things."""
        if body is not None:
            body(**values)
        print_answer(values, lambda: click.echo(" ".join(f"{name}={one}" for name, one in values.items())))

    return CliRunner().invoke(root, ["tool", "work", *arguments], prog_name="koine", catch_exceptions=False)


def values_of(*arguments: str) -> dict[str, object]:
    found = json.loads(invoke(*arguments, "--json").stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "k.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_json_is_the_only_text_on_standard_output_and_precise(capsys: pytest.CaptureFixture[str]) -> None:
    def chatter(**_: object) -> None:
        print("from a library")
        click.echo("from us")
        terminal.note("written to x")

    result = invoke("--rate", "0.1234567890123456", "--json", body=chatter)
    assert json.loads(result.stdout)["rate"] == 0.1234567890123456
    assert "from a library\nfrom us\nwritten to x\n" in result.stderr
    assert "from a library" in invoke(body=chatter).stdout


@pytest.mark.parametrize("out", ["-", "/dev/stdout"])
def test_json_and_a_file_do_not_share_standard_output(out: str) -> None:
    with pytest.raises(UserError, match="--json and --out both go to standard output"):
        invoke("--json", "--out", out)
    assert invoke("--out", out).exit_code == 0
    assert values_of("--text", out)["text"] == [out]


def test_quiet_keeps_the_answer_and_drops_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def chatter(**_: object) -> None:
        seen.append(terminal.is_quiet())
        terminal.note("written to x")
        terminal.note("koine: note: y", err=True)

    assert "written to x" in invoke(body=chatter).output
    result = invoke("--quiet", body=chatter)
    assert result.stdout.startswith("place=None vocab_size=100")
    assert result.stderr == ""
    monkeypatch.setenv("KOINE_QUIET", "1")
    assert invoke(body=chatter).stdout == result.stdout
    assert seen == [False, True, True]
    assert not terminal.is_quiet()


def test_quiet_drops_warnings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(), terminal.quiet_output():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", entry.show_warning)
        warnings.warn("read twice", KoineWarning, stacklevel=1)
    assert capsys.readouterr().err == ""


def test_quiet_silences_bars_of_libraries_for_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    with terminal.quiet_output():
        assert os.environ["TQDM_DISABLE"] == "1"
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
    assert "TQDM_DISABLE" not in os.environ
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"


def test_the_command_line_counts_before_environment_file_and_default(
    monkeypatch: pytest.MonkeyPatch, config: Callable[[str], str]
) -> None:
    file = config("[tool.work]\nvocab-size = 3\nrate = 3\nmode = 'slow'\n")
    monkeypatch.setenv("KOINE_TOOL_WORK_VOCAB_SIZE", "2")
    monkeypatch.setenv("KOINE_TOOL_WORK_RATE", "2")
    found = values_of("--config", file, "--vocab-size", "1")
    assert (found["vocab_size"], found["rate"], found["mode"], found["compare"]) == (1, 2.0, "slow", False)


def test_variables_set_switches_lists_and_the_names_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("KOINE_TOOL_WORK_COMPARE", "true")
    monkeypatch.setenv("KOINE_TOOL_WORK_TEXT", "a 'b c' ~/d")
    monkeypatch.setenv("KOINE_TOOL_WORK_SET", "steps=3 rate=1")
    monkeypatch.setenv("KOINE_TOOL_WORK_OUT", "~/out")
    monkeypatch.setenv("KOINE_TOOL_WORK_MODE", "")
    found = values_of()
    assert found["compare"] is True
    assert found["text"] == ["a", "b c", "/home/me/d"]
    assert found["settings"] == ["steps=3", "rate=1"]
    assert found["out"] == "/home/me/out"
    assert found["mode"] == "fast"
    assert values_of("--no-compare")["compare"] is False


def test_the_variable_of_the_command_counts_before_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOINE_JSON", "1")
    assert json.loads(invoke().stdout)["rate"] == 0.5
    monkeypatch.setenv("KOINE_TOOL_WORK_JSON", "0")
    assert invoke().stdout.startswith("place=")


def test_the_variable_of_a_command_counts_before_one_of_several_commands(
    monkeypatch: pytest.MonkeyPatch, config: Callable[[str], str]
) -> None:
    def track(file: str = "") -> object:
        words = ("train", "sft")
        context = click.Context(LEAVES[words], info_name="sft", parent=_parent(words))
        arguments = ["--model", ".", "--out", "x", *(["--config", file] if file else [])]
        LEAVES[words].parse_args(context, arguments)
        return context.params["track"]

    file = config("[train.sft]\ntrack = 'trackio'\n")
    assert track() is None
    assert track(file) == "trackio"
    monkeypatch.setenv("KOINE_TRACK", "mlflow")
    assert track(file) == "mlflow"
    monkeypatch.setenv("KOINE_TRAIN_SFT_TRACK", "wandb")
    assert track(file) == "wandb"
    monkeypatch.setenv("KOINE_TRAIN_SFT_TRACK", "")
    monkeypatch.setenv("KOINE_TRACK", "wandbb")
    with pytest.raises(UserError, match="KOINE_TRACK: 'wandbb' is not one of"):
        track()


def _parent(words: tuple[str, ...]) -> click.Context:
    """The context around a command of the real tree."""
    root = click.Context(cli, info_name="koine")
    group = cli.get_command(root, words[0])
    assert group is not None
    return click.Context(group, info_name=words[0], parent=root)


def test_a_name_on_the_hub_is_fetched_quietly_and_for_its_own_command_only(
    monkeypatch: pytest.MonkeyPatch, config: Callable[[str], str], tmp_path: Path
) -> None:
    fetched = []

    def fetch(path: Path, files: object) -> Path:
        fetched.append((str(path), terminal.is_quiet()))
        return tmp_path

    monkeypatch.setattr("koine.hub.model_folder", fetch)
    monkeypatch.setenv(
        "KOINE_CONFIG", config("[merge.ties]\nbase = 'a/b'\n[data.tokenize]\ntokenizer = 'c/d'\n")
    )

    def parse(*more: str) -> None:
        words = ("data", "tokenize")
        context = click.Context(LEAVES[words], info_name="tokenize", parent=_parent(words))
        LEAVES[words].parse_args(context, ["text", "--out", "x", *more])

    parse("--quiet")
    parse()
    monkeypatch.setenv("KOINE_QUIET", "1")
    parse()
    assert fetched == [("c/d", True), ("c/d", False), ("c/d", True)]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("VOCAB_SIZE", "many", "KOINE_TOOL_WORK_VOCAB_SIZE: 'many' is not a valid integer"),
        ("VOCAB_SIZE", "0", "KOINE_TOOL_WORK_VOCAB_SIZE: 0 is not in the range"),
        ("MODE", "fats", "KOINE_TOOL_WORK_MODE: 'fats' is not one of"),
        ("COMPARE", "perhaps", "KOINE_TOOL_WORK_COMPARE: 'perhaps' is neither true nor false"),
        ("TEXT", "'a", "KOINE_TOOL_WORK_TEXT: cannot be split into values: No closing quotation"),
        ("CONFIG", "/no/such", "/no/such: no such file or directory; KOINE_TOOL_WORK_CONFIG names this file"),
    ],
)
def test_a_bad_value_of_the_environment_names_the_variable(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"KOINE_TOOL_WORK_{name}", value)
    with pytest.raises(UserError) as raised:
        invoke()
    assert str(raised.value).startswith(says)


def test_a_bad_value_that_is_not_used_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOINE_TOOL_WORK_VOCAB_SIZE", "many")
    assert values_of("--vocab-size", "7")["vocab_size"] == 7


def test_a_mistake_that_the_command_finds_names_the_variable_too(
    monkeypatch: pytest.MonkeyPatch, config: Callable[[str], str]
) -> None:
    def body(**_: object) -> None:
        raise UserError("vocab_size is 5", hint="take at least 6")

    monkeypatch.setenv("KOINE_TOOL_WORK_VOCAB_SIZE", "5")
    with pytest.raises(UserError) as raised:
        invoke(body=body)
    assert str(raised.value) == (
        "vocab_size is 5 (--vocab-size is set by KOINE_TOOL_WORK_VOCAB_SIZE); take at least 6"
    )

    def missing(**_: object) -> None:
        raise UserError("no such file", where="a.txt")

    file = config("[tool.work]\ntext = ['a.txt']\n")
    with pytest.raises(
        UserError, match=r"a.txt: no such file \(--text is set by .*k.toml: \[tool.work\] text"
    ):
        invoke("--config", file, body=missing)


def test_an_unknown_variable_of_the_command_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOINE_TOOL_WORK_VOCAB_SIZ", "5")
    with pytest.warns(
        KoineWarning, match="KOINE_TOOL_WORK_VOCAB_SIZ sets no option of koine tool work; did you"
    ):
        invoke()


def test_a_file_sets_options_of_every_kind(
    config: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(
        "quiet = true\n"
        "[tool.work]\n"
        "vocab_size = 3\n"
        "compare = true\n"
        "text = ['a', 'b']\n"
        "out = 'here'\n"
        "json = true\n"
        "[tool.work.set]\n"
        "steps = 3\nfast = true\nlanguages = ['de', 'fr']\n"
    )
    monkeypatch.setenv("KOINE_CONFIG", file)
    found = json.loads(invoke().stdout)
    assert (found["vocab_size"], found["compare"], found["text"], found["out"]) == (
        3,
        True,
        ["a", "b"],
        "here",
    )
    assert found["settings"] == ["steps=3", "fast=true", "languages=de,fr"]
    assert invoke(body=lambda **_: terminal.note("a note")).stderr == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[tol.work]\n", "k.toml: unknown table [tol]; did you mean 'tool'?"),
        ("[tool.wrok]\n", "k.toml: unknown table [tool.wrok]; did you mean 'work'?"),
        ("quite = true\n", "k.toml: unknown key 'quite'; did you mean 'quiet'?"),
        (
            "[tool]\nwork = 3\n",
            "k.toml: 'tool.work' is a command, and here it is the integer 3; write its options",
        ),
        (
            "[tool.work]\nvocab-siz = 3\n",
            "k.toml: [tool.work]: unknown key 'vocab-siz'; did you mean 'vocab-size'?",
        ),
        ("[tool.work]\nplace = 'x'\n", "k.toml: [tool.work]: unknown key 'place'; it is an argument"),
        ("[tool.work]\nconfig = 'x'\n", "k.toml: [tool.work]: unknown key 'config'"),
        (
            "[tool.work]\nvocab-size = '3'\n",
            "k.toml: [tool.work] vocab-size: is the text '3'; it must be an integer",
        ),
        (
            "[tool.work]\nvocab-size = true\n",
            "k.toml: [tool.work] vocab-size: is true; it must be an integer",
        ),
        ("[tool.work]\nvocab-size = 0\n", "k.toml: [tool.work] vocab-size: 0 is not in the range x>=1"),
        ("[tool.work]\nrate = 'a'\n", "k.toml: [tool.work] rate: is the text 'a'; it must be a number"),
        ("[tool.work]\nmode = 'fats'\n", "k.toml: [tool.work] mode: 'fats' is not one of 'fast', 'slow'"),
        ("[tool.work]\nmode = 1979-05-27\n", "k.toml: [tool.work] mode: is the date or time 1979-05-27"),
        (
            "[tool.work]\ncompare = 1\n",
            "k.toml: [tool.work] compare: is the integer 1; it must be true or false",
        ),
        (
            "[tool.work]\ntext = 'a'\n",
            "k.toml: [tool.work] text: is the text 'a', and --text may be repeated; give a",
        ),
        ("[tool.work]\ntext = ['a', 1]\n", "k.toml: [tool.work] text: is the integer 1; it must be text"),
        ("[tool.work\n", "k.toml: is no TOML: "),
    ],
)
def test_a_file_with_a_mistake_is_refused(text: str, says: str, config: Callable[[str], str]) -> None:
    with pytest.raises(UserError) as raised:
        invoke("--config", config(text))
    assert says in str(raised.value)


def test_every_option_of_every_command_can_stand_in_a_file(tmp_path: Path) -> None:
    """The default of each option, written as TOML, is taken by the whole tree of commands."""
    from koine.cli.settings import file_settings, key_of

    def value(option: click.Option) -> object:
        if option.multiple:
            return ["a=1"]
        if option.is_flag:
            return True
        if isinstance(option.type, click.Choice):
            return option.type.choices[0]
        if isinstance(option.type, click.types.IntParamType):
            return 1
        if isinstance(option.type, click.types.FloatParamType):
            return 0.5
        return "x" if isinstance(option.type, click.Path | click.types.StringParamType) else 0.5

    tables: dict[str, object] = {}
    for words, command in LEAVES.items():
        inner = tables
        for word in words:
            inner = inner.setdefault(word, {})  # type: ignore[assignment]
        inner |= {key_of(one): value(one) for one in options_of(command) if key_of(one) != "config"}
    for words, command in LEAVES.items():
        found = file_settings(tmp_path, tables, cli, words, command)
        assert found.keys() == {str(one.name) for one in options_of(command)} - {"config"}


def test_a_file_reaches_a_real_command(
    config: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config("[model.describe]\nvocab-size = 1000\njson = true\n")
    monkeypatch.setattr(sys, "argv", ["koine", "model", "describe", "koine-0.5m", "--config", file])
    entry.main()
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 1000


def test_help_and_completion_read_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOINE_CONFIG", "/no/such/file.toml")
    assert "Usage: koine doctor" in help_of(("doctor",))
