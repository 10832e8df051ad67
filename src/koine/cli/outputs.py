"""Options and checks that all commands with outputs share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from koine.errors import UserError

OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what is there already.")


@contextmanager
def output_files(
    files: dict[str, Path | None], *, overwrite: bool, reads: Iterable[Path | str | None] = ()
) -> Iterator[dict[str, Path | None]]:
    """Claim the files to write, by their options, while they are worked for; yields where to write each.

    They get their names at the end, all or none that this command can help. Raises `UserError` as
    `koine.files.atomic_file` does, and where one is, or holds, what is read (`reads`).
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
