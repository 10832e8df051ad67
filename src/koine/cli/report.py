"""`koine report`: one HTML file about a run."""

from __future__ import annotations

from pathlib import Path

import click

from koine.cli.outputs import OVERWRITE, output_files


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File to write.  [default: RUN/report.html]")
@OVERWRITE
def report(run: Path, out: Path | None, overwrite: bool) -> None:
    """Write one self-contained HTML file about RUN, a folder such as runs/quickstart.

    The answer with its plots and tables, the curves of the trainings, the lineage, and for each artifact what went into it.
    """
    from koine.plan.report.page import write_report

    # The page in the run's folder is ours; what the user names may be theirs.
    own = out is None or out.resolve() == (run / "report.html").resolve()
    with output_files({"--out": None if own else out}, overwrite=overwrite) as targets:
        written = write_report(run, targets["--out"])
    click.echo(f"wrote {written if own else out}")
