"""The `koine` command: a table of verbs, imported when they are called, and the handling of errors."""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click

from koine import __version__
from koine.cli.commands import expand_home
from koine.cli.groups import HelpGroup
from koine.errors import KoineWarning, UserError, first_line
from koine.terminal import is_quiet, printable

# verb -> (module, attribute, one line for --help); the module is imported only when the verb is used
VERBS: dict[str, tuple[str, str, str]] = {
    "adopt": ("koine.cli.run", "adopt", "Register an existing folder as an artifact of a run."),
    "align": ("koine.cli.align.commands", "align", "Train a model on preferences."),
    "chat": ("koine.cli.chat", "chat", "Talk to a model in the terminal."),
    "completion": ("koine.cli.completion", "completion", "Print the completion script for your shell."),
    "data": ("koine.cli.data", "data", "Write sample data, tokenize text, show what a step reads."),
    "doctor": ("koine.cli.doctor", "doctor", "Print versions, hardware, and what each extra would add."),
    "evaluate": ("koine.cli.evaluate.commands", "evaluate", "Measure bits per byte and question accuracy."),
    "extend": ("koine.cli.upcycle", "extend", "Add an expert to a mixture, or remove one."),
    "lineage": ("koine.cli.run", "lineage", "Print an artifact's tree of ancestors."),
    "merge": ("koine.cli.merge.methods", "merge", "Merge checkpoints of one architecture."),
    "model": ("koine.cli.model", "model", "Describe and export models."),
    "report": ("koine.cli.report", "report", "Write one self-contained HTML file about a run."),
    "run": ("koine.cli.run", "run", "Run a plan: build what is missing, reuse what is there."),
    "tokenizer": ("koine.cli.tokenizer.commands", "tokenizer", "Train, extend and measure tokenizers."),
    "train": ("koine.cli.train", "train", "Pretrain or fine-tune a model."),
    "upcycle": ("koine.cli.upcycle", "upcycle", "Turn dense branches into a mixture of experts."),
}


# Commands that are looked for here and stand elsewhere: (words, one line for --help)
ELSEWHERE = (
    ("model export", "Export a model to GGUF (llama.cpp), or a training checkpoint to a model folder."),
    ("tokenizer extend", "Add tokens for more languages to a tokenizer; `koine extend` adds an expert."),
    ("run extend", "Extend a model's context, by a recipe; `koine run` lists all recipes."),
)

READER_GONE = 128 + signal.SIGPIPE
"""Exit status where the reader of our output has gone, as the shell reports it for other programs."""

MAX_PATH_CHARACTERS = 4096  # longer text is no name of a file


class ReaderGoneError(Exception):
    """The reader of our output (`| head`) has gone. Click would end with its own status on an `OSError`."""


@contextmanager
def broken_pipes() -> Iterator[None]:
    """Turn a `BrokenPipeError` into `ReaderGoneError`."""
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGoneError from error


class LazyGroup(HelpGroup):
    """A click group whose commands are imported on first use, so that `koine --help` stays instant."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with broken_pipes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with broken_pipes():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, attribute, _ = VERBS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, VERBS[verb][2]) for verb in sorted(VERBS)])
        with formatter.section("Inside a command"):
            formatter.write_dl(ELSEWHERE)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            from koine.errors import did_you_mean

            inside = [words for words, _ in ELSEWHERE if args[0] in words.split()]
            hint = f"it is `koine {inside[0]}`" if inside else did_you_mean(args[0], VERBS)
            raise UserError(f"unknown command '{args[0]}'", hint=hint)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="koine")
def cli() -> None:
    """Build multilingual language models by mixing, and measure what each mix did."""


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a `KoineWarning` as one line, without the place in our code; others as Python does.

    Under `--quiet`, print none.
    """
    if is_quiet():
        return
    if issubclass(category, KoineWarning):
        print(f"koine: note: {printable(' '.join(str(message).split()))}", file=sys.stderr)
    else:
        print(
            warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr
        )


def escape_undecodable_names() -> None:
    """Print file names that are not UTF-8 with escapes, so that printing never fails."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line; a `UserError` ends in one line on stderr and exit code 2."""
    warnings.showwarning = show_warning
    escape_undecodable_names()
    sys.argv[1:] = [expand_home(word) for word in sys.argv[1:]]
    # Importing torch makes some 170,000 permanent objects. By default the collector scans them repeatedly.
    gc.set_threshold(50_000, 20, 100)
    try:
        with broken_pipes():
            run_command()
            flush(sys.stderr)
    except ReaderGoneError:
        discard_output()
        sys.exit(READER_GONE)


def flush(stream: TextIO | None) -> None:
    """Write what a stream holds; Python has None for one that was closed at the start (`>&-`)."""
    if stream is not None:
        stream.flush()


def discard_output() -> None:
    """Write nothing more to standard output and standard error, not even at exit."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nothing, descriptor)


def run_command() -> None:
    """Run the command that `sys.argv` names; errors of the user and the system end in one line."""
    try:
        try:
            cli.main(prog_name="koine", standalone_mode=False)
        finally:
            # What fails at exit would be reported by Python, with another status.
            flush(sys.stdout)
    except UserError as error:
        print(f"koine: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        print("koine: interrupted", file=sys.stderr)
        sys.exit(130)
    except click.ClickException as error:
        print(f"koine: {printable(' '.join(error.format_message().split()))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("koine: interrupted", file=sys.stderr)
        sys.exit(130)
    except UnicodeEncodeError as error:
        name = str(error.object)
        if "\n" in name or len(name) > MAX_PATH_CHARACTERS:
            raise
        print(f"koine: {name}: not UTF-8, which a library needs here; rename it", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        from koine.files import explain

        # A disk, a file server, a permission: a traceback would not help the user.
        print(f"koine: {explain(error) or first_line(error)}", file=sys.stderr)
        if error.filename is None:
            # It may be standard output that is full.
            discard_output()
        sys.exit(2)
