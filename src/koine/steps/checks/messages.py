"""Notes and hints of the checks, in the words of a plan's settings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from koine.errors import KoineWarning, UserError

if TYPE_CHECKING:
    pass


SETTINGS = {
    "--field text=COLUMN": "--set fields=text=COLUMN",
    "--max-bad": "--set max_bad_share=SHARE",
    "(--format)": "(--set format=NAME)",
    "--base MODEL": "--set base=MODEL",
    "leave --base out": "leave base out",
}
"""Options that hints of other rooms name, and the setting of a plan that does the same."""


def surprise(text: str) -> None:
    """Warn of something that works and may not be what the user wants."""
    warnings.warn(text, KoineWarning, stacklevel=3)


def with_settings(error: UserError, where: Path | None = None) -> UserError:
    """Return an error whose hint names settings of a plan in place of options of a command."""
    hint = error.hint
    for option, setting in SETTINGS.items():
        hint = None if hint is None else hint.replace(option, setting)
    return UserError(error.what, where=error.where or where, hint=hint)
