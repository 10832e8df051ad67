"""Options and arguments that several commands have, and what the shell completes them to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from koine import hub
from koine.data.formats import BY_NAME
from koine.errors import UserError
from koine.terminal import is_quiet, quiet_output


class Suggested(click.types.StringParamType):
    """Text that the shell completes to words that often stand here, or to file names.

    Args:
        words: Returns the words, each with a line about it or "".
        files: File names are completed too, where no word fits.
        separator: Separates words of a list; the last one is completed.
    """

    def __init__(
        self, words: Callable[[], Mapping[str, str]] = dict, *, files: bool = False, separator: str = ""
    ) -> None:
        super().__init__()
        self._words, self._files, self._separator = words, files, separator

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        before, found, last = (
            incomplete.rpartition(self._separator) if self._separator else ("", "", incomplete)
        )
        items = [
            CompletionItem(before + found + word, help=about or None)
            for word, about in self._words().items()
            if word.startswith(last)
        ]
        return items or ([CompletionItem(incomplete, type="file")] if self._files else [])


def _languages() -> dict[str, str]:
    from koine.languages import LANGUAGES

    return {code: one.name for code, one in LANGUAGES.items()}


def _recipes() -> dict[str, str]:
    from koine.recipes.table import RECIPES

    return {name: one.summary for name, one in RECIPES.items()}


def _presets() -> dict[str, str]:
    from koine.model.presets import PRESETS

    return dict.fromkeys(PRESETS, "")


def _merge_methods() -> dict[str, str]:
    from koine.combine.merging.methods import METHODS

    return dict.fromkeys(METHODS, "")


SOURCE = Suggested(files=True)
"""Records: a file, a folder, or a name on the hub; also `NAME=PATH` and `PATH:PROPORTION`."""
LANGUAGE = Suggested(_languages)
LANGUAGES = Suggested(_languages, separator=",")
RECIPE = Suggested(_recipes, files=True)
PRESET = Suggested(_presets)
PRESET_OR_MODEL = Suggested(_presets, files=True)
MERGE_METHOD = Suggested(_merge_methods)


class HubPath(click.Path):
    """A folder, a name on the hub, which is fetched, or `BASE+ADAPTER`; the shell completes file names.

    files: patterns of the files that the command needs, as in `koine.hub`.
    """

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__(path_type=Path)
        self.files = files

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the local folder."""
        path = super().convert(value, param, ctx)
        assert isinstance(path, Path)
        if ctx is None:
            return model_argument(path, self.files)
        if ctx.resilient_parsing:
            return path
        with quiet_output(is_quiet() or bool(ctx.params.get("quiet"))):
            return model_argument(path, self.files)


def model_argument(path: Path, files: Sequence[str] = hub.MODEL) -> Path:
    """Return a model's folder; of `BASE+ADAPTER` that of the two merged, for this process only.

    files: patterns of the files that the command needs; without weights nothing is merged.
    """
    if "+" not in str(path) or path.exists():
        return hub.model_folder(path, files)
    # Only here: it loads torch.
    from koine.combine.adapters import resolve_model

    return resolve_model(path, files)


MODEL, TOKENIZER = HubPath(hub.MODEL), HubPath(hub.TOKENIZER)
DEVICE = click.option(
    "--device",
    type=Suggested(lambda: dict.fromkeys(("auto", "cpu", "cuda", "mps"), "")),
    default="auto",
    show_default=True,
    help="Where to compute: cpu, cuda, cuda:1 or mps; auto: cuda where torch finds it, else cpu.",
)
FORMAT = click.option(
    "--format",
    "record_format",
    type=Suggested(lambda: dict.fromkeys(BY_NAME, "")),
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
