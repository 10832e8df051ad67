"""`koine report`: write one HTML file about a run."""

from __future__ import annotations

from pathlib import Path

import click

from koine.cli.outputs import OVERWRITE, OutputFile, output_files, say_written


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=OutputFile(), help="File to write.  [default: RUN/report.html]")
@OVERWRITE
def report(run: Path, out: Path | None, overwrite: bool) -> None:
    """Write one self-contained HTML file about RUN, a folder such as runs/quickstart.

    It holds the results with plots and tables, training curves, lineage, and the inputs of each artifact.
    """
    from koine.plan.report.page import write_report

    # The page in the run's folder is ours and may be replaced; a file that the user names may not.
    own = out is None or out.resolve() == (run / "report.html").resolve()
    with output_files({"--out": None if own else out}, overwrite=overwrite) as targets:
        written = write_report(run, targets["--out"])
    say_written(written if own else out)
