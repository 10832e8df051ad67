"""`koine merge cross-modal`."""

from __future__ import annotations

from pathlib import Path

import click

from koine.cli.arguments import MODEL
from koine.cli.outputs import OVERWRITE, OutputFolder
from koine.cli.recording import recorded_output


@click.command("cross-modal", short_help="Merge a multimodal model with its text model (Aya Vision).")
@click.argument("multimodal", type=MODEL)
@click.argument("text", type=MODEL)
@click.option("--alpha", type=float, default=0.4, show_default=True, help="Weight of the MULTIMODAL model.")
@click.option("--out", type=OutputFolder(), required=True, help="Folder to write to.")
@OVERWRITE
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest file of weights.")
@click.option(
    "--dry-run", is_flag=True, help="Print what would be merged, peak memory and size; write nothing."
)
def command(
    multimodal: Path, text: Path, alpha: float, out: Path, overwrite: bool, max_shard_size: str, dry_run: bool
) -> None:
    """Merge the language model inside MULTIMODAL with TEXT, the model that it was initialised from.

    Vision encoder and connector stay those of MULTIMODAL (Aya Vision).
    """
    from koine.cli.merge.options import parse_shard_size
    from koine.combine.merging.cross_modal import estimate_cross_modal, merge_cross_modal
    from koine.plan.formatting import size

    largest = parse_shard_size(max_shard_size)
    if dry_run:
        found = estimate_cross_modal(multimodal, text, out, alpha=alpha)
        click.echo(
            f"{found.merged:,} tensors to merge, {found.copied:,} to copy, "
            f"{size(found.output_bytes)} to write; about {size(found.peak_memory_bytes)} of memory"
        )
        return
    with recorded_output(out, {"multimodal": multimodal, "text": text}):
        done = merge_cross_modal(
            multimodal, text, out, alpha=alpha, max_shard_bytes=largest, overwrite=overwrite
        )
    click.echo(f"{done['merged']} tensors merged, {done['copied']} copied; written to {out}")
