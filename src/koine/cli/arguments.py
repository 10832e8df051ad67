"""Options and arguments that several commands have: `--device`, and paths of the form `[NAME=]PATH`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import click

from koine.errors import UserError

DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where to compute: cpu, cuda, cuda:1 or mps; auto: cuda where torch finds it, else cpu.",
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
