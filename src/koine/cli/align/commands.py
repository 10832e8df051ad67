"""`koine align`: preference training, and what belongs to it."""

from __future__ import annotations

import click

from koine.cli.align.inspect import inspect
from koine.cli.align.online import online
from koine.cli.align.revise import revise
from koine.cli.align.reward import reward
from koine.cli.align.score import score
from koine.cli.align.train import train
from koine.cli.align.watch import watch
from koine.cli.groups import HelpGroup


@click.group(cls=HelpGroup)
def align() -> None:
    """Train a model on preferences, and show what that does to it."""


align.add_command(reward)
align.add_command(online)
align.add_command(revise)
align.add_command(score)
align.add_command(inspect)
align.add_command(train)
align.add_command(watch)
