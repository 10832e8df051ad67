"""`koine tokenizer`: the group of its verbs, one file a verb."""

from __future__ import annotations

import click

from koine.cli.groups import HelpGroup
from koine.cli.tokenizer.adapt import adapt
from koine.cli.tokenizer.extend import extend
from koine.cli.tokenizer.measure import measure
from koine.cli.tokenizer.predict import predict
from koine.cli.tokenizer.train import train
from koine.cli.tokenizer.weights import weights


@click.group(cls=HelpGroup)
def tokenizer() -> None:
    """Train, extend and compare tokenizers; move models to another tokenizer."""


for _verb in (adapt, extend, measure, predict, train, weights):
    tokenizer.add_command(_verb)
