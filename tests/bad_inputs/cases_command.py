"""Bad inputs at the command line itself, and installations that are not whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import worlds
from .case import Case


def options(text: str) -> Callable[[Path], None]:
    """Write a koine.toml."""

    def prepare(folder: Path) -> None:
        (folder / "koine.toml").write_text(text, encoding="utf-8")

    return prepare


CASES = (
    Case(
        mistake="a verb with a typo",
        command="tran pretrain",
        says="unknown command 'tran'; did you mean 'train' or 'run'?",
    ),
    Case(
        mistake="a command that stands inside another",
        command="export model",
        says="unknown command 'export'; it is `koine model export`",
    ),
    Case(
        mistake="an option that does not exist",
        command="doctor --mesure",
        says="No such option '--mesure'. Did you mean '--measure'?",
    ),
    Case(
        mistake="an option without its value",
        command="doctor --path",
        says="Option '--path' requires an argument.",
    ),
    Case(
        mistake="an option of every command before the command",
        command="--quiet doctor",
        says="--quiet is an option of a command, and stands after it; write koine COMMAND --quiet",
    ),
    Case(
        mistake="a file of options with a typo in a table",
        command="doctor --config koine.toml",
        prepare=options("[tokeniser.train]\nvocab-size = 500\n"),
        says="koine.toml: unknown table [tokeniser]; did you mean 'tokenizer'?",
    ),
    Case(
        mistake="a file of options with a typo in a key",
        command="doctor --config koine.toml",
        prepare=options("[tokenizer.train]\nvocabsize = 500\n"),
        says="koine.toml: [tokenizer.train]: unknown key 'vocabsize'; did you mean 'vocab-size'?",
    ),
    Case(
        mistake="a file of options with a value of another type",
        command="doctor --config koine.toml",
        prepare=options('[tokenizer.train]\nvocab-size = "500"\n'),
        says="koine.toml: [tokenizer.train] vocab-size: is the text '500'; it must be an integer",
    ),
    Case(
        mistake="a file of options that is no TOML",
        command="doctor --config koine.toml",
        prepare=options("vocab-size: 500\n"),
        says="koine.toml: is no TOML: …; give a TOML file to --config",
    ),
    Case(
        mistake="a file of options that does not exist",
        command="doctor --config koine.toml",
        says="koine.toml: no such file or directory; give a TOML file to --config",
    ),
    Case(
        mistake="a command without its argument",
        command="chat",
        says="Missing argument 'MODEL'.",
    ),
    Case(
        mistake="a word where a number is needed",
        command="chat model --temperature warm",
        says="Invalid value for '--temperature': 'warm' is not a valid float.",
    ),
    Case(
        mistake="a sampling setting out of range",
        command="chat model --top-p 1.5",
        says="top-p is 1.5; it must be at most 1",
    ),
    Case(
        mistake="a sampling setting that is no number",
        command="chat model --temperature nan",
        says="temperature is nan; it must be a number",
    ),
    Case(
        mistake="a negative number of tokens",
        command="chat model --max-new-tokens -1",
        says="max-new-tokens is -1; it must be at least 1",
    ),
    Case(
        mistake="an unknown command in a chat's script",
        command="chat model",
        prepare=worlds.having("model"),
        during=worlds.standard_input(b"/rest\n"),
        simulated="`/rest` comes through a pipe",
        says="unknown command '/rest'; did you mean '/reset' or '/set' or '/system'?",
    ),
    Case(
        mistake="questions that are not UTF-8",
        command="chat model --max-new-tokens 1",
        prepare=worlds.having("model"),
        during=worlds.standard_input("Währung?\n".encode("latin-1")),
        simulated="a Latin-1 line comes through a pipe",
        says="standard input: line 1 is not UTF-8; convert it, for example with iconv",
    ),
    Case(
        mistake="a seed that is no integer",
        command="chat model --seed lucky",
        says="Invalid value for '--seed': 'lucky' is not a valid integer.",
    ),
    Case(
        mistake="a precision that does not exist",
        command="chat model --dtype float8",
        says="Invalid value for '--dtype': 'float8' is not one of 'auto', 'float32', 'bfloat16'.",
    ),
)
