"""Options and checks of all commands that write outputs; `-` is standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click

from koine.errors import UserError

OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
DASH = "-"


class OutputFile(click.Path):
    """A file to write; `-` is standard output, and `./-` a file of that name."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from koine.files import STANDARD_OUTPUT

        return STANDARD_OUTPUT if value == DASH else Path(value)


class OutputFolder(click.Path):
    """A folder to write, which standard output cannot take."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == DASH:
            check_folder(DASH, "" if param is None else param.opts[0])
        return Path(value)


class InputFile(click.Path):
    """A file to read once; `-` is standard input."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return Path("/dev/stdin") if value == DASH else Path(value)


def check_folder(out: Path | str, option: str = "--out") -> None:
    """Raise `UserError` where standard output is given for a folder."""
    from koine.files import STANDARD_OUTPUT

    if out in (DASH, STANDARD_OUTPUT):
        raise UserError(
            "standard output takes one file, and a folder is written",
            where=f"{option} -",
            hint="give the name of a new folder",
        )


def check_binary(out: Path) -> None:
    """Raise `UserError` where a binary file would be written to a terminal."""
    from koine.files import is_standard_output

    if is_standard_output(out) and os.isatty(1):
        raise UserError(
            "standard output is a terminal, and the file is binary",
            where="--out -",
            hint="redirect it (> FILE), or pipe it to a program",
        )


@contextmanager
def output_files(
    files: dict[str, Path | None], *, overwrite: bool, reads: Iterable[Path | str | None] = ()
) -> Iterator[dict[str, Path | None]]:
    """Claim the files that a command writes; yield, by option, where to write each.

    They are renamed to their places at the end; after an error, none is. Pipes, devices and standard output
    are written through. Where an output is standard output, the command prints to standard error.

    Args:
        files: The path of each option; None: not given.
        overwrite: Replace what stands there.
        reads: What the command reads, which no output may replace.

    Raises:
        UserError: As `koine.files.atomic_file`, and where an output is, or holds, what is read.
    """
    from koine.files import atomic_file, check_replacing, is_stream

    given = {option: path for option, path in files.items() if path is not None}
    if len({path.resolve() for path in given.values()}) < len(given):
        raise UserError(
            "is given for two outputs", where=next(iter(given.values())), hint="give each its own name"
        )
    print_to_standard_error(given.values())
    read = [Path(path) for path in reads if path is not None]
    with ExitStack() as claimed:
        targets: dict[str, Path | None] = dict.fromkeys(files)
        for option, path in given.items():
            if overwrite and not is_stream(path):
                check_replacing(path, read)
            targets[option] = claimed.enter_context(atomic_file(path, overwrite=overwrite, option=option))
        yield targets


def print_to_standard_error(outputs: Iterable[Path]) -> None:
    """Let the rest of the command print to standard error where one of its outputs is standard output."""
    from koine.files import is_standard_output

    if any(is_standard_output(path) for path in outputs):
        click.get_current_context().with_resource(redirect_stdout(sys.stderr))


def say_written(*outputs: Path | None) -> None:
    """Print where each output was written, but for standard output."""
    from koine.files import is_standard_output

    for path in outputs:
        if path is not None and not is_standard_output(path):
            click.echo(f"written to {path}")
