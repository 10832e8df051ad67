"""`koine align`: preference training, and what belongs to it."""

from __future__ import annotations

import click

from koine.cli.align.reward import reward
from koine.cli.align.score import score
from koine.cli.align.train import train
from koine.cli.groups import HelpGroup


@click.group(cls=HelpGroup)
def align() -> None:
    """Train a model on preferences, and show what that does to it."""


align.add_command(reward)
align.add_command(score)
align.add_command(train)
