"""Options and arguments that several commands have: `--device`, and paths of the form `[NAME=]PATH`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from koine import hub
from koine.data.formats import BY_NAME
from koine.errors import UserError


class HubPath(click.Path):
    """A folder, or the name of a model on the hub, which is fetched.

    files: patterns of the files that the command needs, as in `koine.hub`.
    """

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__(path_type=Path)
        self.files = files

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the local folder."""
        path = super().convert(value, param, ctx)
        assert isinstance(path, Path)
        return path if ctx is not None and ctx.resilient_parsing else hub.model_folder(path, self.files)


MODEL, TOKENIZER = HubPath(hub.MODEL), HubPath(hub.TOKENIZER)

DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where to compute: cpu, cuda, cuda:1 or mps; auto: cuda where torch finds it, else cpu.",
)
FORMAT = click.option(
    "--format",
    "record_format",
    metavar="NAME",
    help=f"Format of the records: {', '.join(BY_NAME)}.  [default: recognised by their fields]",
)


def named_paths(
    given: Iterable[str], *, what: str, hint: str, name_of: Callable[[Path], str]
) -> dict[str, Path]:
    """Return paths by name.

    Args:
        given: Texts `NAME=PATH` or `PATH`.
        what: What they are, for messages ("scores").
        hint: How to fix two of one name.
        name_of: From a path without a name to its name.

    Raises:
        UserError: Two paths have one name.
    """
    named: dict[str, Path] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals:
            name, path = name_of(Path(one)), one
        if name in named:
            raise UserError(f"two {what} are named '{name}'", hint=hint)
        named[name] = Path(path)
    return named
