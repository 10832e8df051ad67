"""`koine model import`: make a model directory of a GGUF file, pickled weights, a hub id or a package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from koine.cli.answers import print_answer
from koine.cli.arguments import Suggested
from koine.cli.commands import Command
from koine.cli.outputs import OVERWRITE, OutputFolder
from koine.cli.recording import recorded_output
from koine.terminal import is_quiet, note, quiet_output

DTYPES = ("float32", "bfloat16", "float16")


@click.command("import", cls=Command)
@click.argument("source", type=Suggested(files=True))
@click.option("--out", type=OutputFolder(), required=True, help="Folder to write.")
@OVERWRITE
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Data type of the weights.  [default: float32 if they are quantised, else as stored]",
)
@click.option("--dry-run", is_flag=True, help="Print what would be written, and write nothing.")
def import_command(source: str, out: Path, overwrite: bool, dtype: str | None, dry_run: bool) -> None:
    """Make a model directory of SOURCE that Koine and `transformers` open.

    SOURCE is a GGUF file, a folder with pytorch_model.bin, OWNER/NAME[@REVISION] of the hub (with :FILE.gguf
    for one file of it), or package:NAME, an installed Python package that carries a GGUF file.
    """
    import torch

    from koine.files import atomic_directory
    from koine.model.formats.importing.runner import planned_import

    with (
        quiet_output(is_quiet()),
        planned_import(source, dtype=None if dtype is None else getattr(torch, dtype)) as plan,
    ):
        about = plan.describe()
        if not dry_run:
            with (
                recorded_output(out, {"source": list(plan.reads)}),
                atomic_directory(out, overwrite=overwrite, reads=plan.reads) as folder,
            ):
                plan.write(folder)
    if dry_run:
        print_answer(about, lambda: _show(about))
        return

    def show() -> None:
        _show(about)
        note(f"written to {out}")

    print_answer({**about, "written": out}, show)


def _show(about: dict[str, Any]) -> None:
    from rich.table import Table

    from koine.cli.tables import print_table

    vocabulary = about["vocabulary"]
    types = ", ".join(
        f"{kind}: {one['tensors']} ({one['bytes']:,} bytes)" for kind, one in about["quantisation"].items()
    )
    dtype = about["dtype"]
    lines = [
        ("architecture", f"{about['architecture']} ({about['class'] or 'no class named'})"),
        ("parameters", f"{about['parameters']:,} in {about['tensors']:,} tensors"),
        ("stored as", types),
        ("written as", f"{dtype if isinstance(dtype, str) else ', '.join(dtype)}, {about['bytes']:,} bytes"),
        ("vocabulary", _vocabulary(vocabulary)),
        ("chat template", "yes" if about["chat_template"] else "no"),
    ]
    table = Table(box=None, show_header=False, title=about["source"], title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for label, value in lines:
        table.add_row(label, value)
    print_table(table)


def _vocabulary(about: dict[str, Any]) -> str:
    rows = f"{about['rows']:,} rows" if isinstance(about["rows"], int) else "unknown"
    if about["tokens"] is None:
        return rows
    return f"{about['tokens']:,} tokens ({about['model']}), {rows}"
