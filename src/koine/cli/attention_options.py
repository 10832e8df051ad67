"""Command-line options for the attention of a preset or of a model."""

from __future__ import annotations

from collections.abc import Callable

import click

# A copy of `koine.model.layer_patterns.VARIANTS`, because `--help` must not import the model. A test compares
# the two.
NAMES = ("rope", "qk-norm", "nope", "rnope", "rnope-swa")


def attention_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--attention`, `--window`, `--full-every` and `--rope-theta`, each None by default."""
    options = (
        click.option(
            "--attention",
            type=click.Choice(NAMES),
            help="Attention variant of the layers.  [default: the model's own; of a preset rnope-swa]",
        ),
        click.option(
            "--window",
            type=int,
            help="Window of rnope-swa, in tokens.  [default: the model's or preset's own]",
        ),
        click.option(
            "--full-every", type=int, help="rnope-swa: every n-th layer has full attention without positions."
        ),
        click.option("--rope-theta", type=float, help="Base of the rotary embedding (RoPE)."),
    )
    for option in reversed(options):
        command = option(command)
    return command
