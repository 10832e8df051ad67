"""Options and checks of all commands that write outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from koine.errors import UserError

OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an existing output.")


@contextmanager
def output_files(
    files: dict[str, Path | None], *, overwrite: bool, reads: Iterable[Path | str | None] = ()
) -> Iterator[dict[str, Path | None]]:
    """Claim the files that a command writes; yield, by option, where to write each.

    They are renamed to their places at the end; after an error, none is.

    Args:
        files: The path of each option; None: not given.
        overwrite: Replace what stands there.
        reads: What the command reads, which no output may replace.

    Raises:
        UserError: As `koine.files.atomic_file`, and where an output is, or holds, what is read.
    """
    from koine.files import atomic_file, check_replacing

    given = {option: path for option, path in files.items() if path is not None}
    if len({path.resolve() for path in given.values()}) < len(given):
        raise UserError(
            "is given for two outputs", where=next(iter(given.values())), hint="give each its own name"
        )
    read = [Path(path) for path in reads if path is not None]
    with ExitStack() as claimed:
        targets: dict[str, Path | None] = dict.fromkeys(files)
        for option, path in given.items():
            if overwrite:
                check_replacing(path, read)
            targets[option] = claimed.enter_context(atomic_file(path, overwrite=overwrite, option=option))
        yield targets
