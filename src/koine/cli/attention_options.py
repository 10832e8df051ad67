"""The options that choose a preset's attention."""

from __future__ import annotations

from collections.abc import Callable

import click

# `koine.model.layer_patterns.VARIANTS`, said again because `--help` must not wait for the model; a test
# compares the two.
NAMES = ("rope", "qk-norm", "nope", "rnope", "rnope-swa")


def attention_options(command: Callable[..., None]) -> Callable[..., None]:
    """`--attention`, `--window`, `--full-every` and `--rope-theta`, each `None` where it is not given."""
    options = (
        click.option(
            "--attention",
            type=click.Choice(NAMES),
            help="Attention of the layers, in place of the preset's rnope-swa.",
        ),
        click.option("--window", type=int, help="Tokens that a windowed layer of rnope-swa sees."),
        click.option(
            "--full-every", type=int, help="rnope-swa: every n-th layer is full, without positions."
        ),
        click.option("--rope-theta", type=float, help="Base of the rotary embedding."),
    )
    for option in reversed(options):
        command = option(command)
    return command
