"""`koine report`: one HTML file about a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File to write.  [default: RUN/report.html]")
def report(run: Path, out: Path | None) -> None:
    """Write one self-contained HTML file about RUN, a folder such as runs/quickstart.

    The answer with its plots and tables, the curves of the trainings, the lineage, and for each artifact what went into it.
    """
    from koine.plan.report import write_report

    click.echo(f"wrote {write_report(run, out)}")
