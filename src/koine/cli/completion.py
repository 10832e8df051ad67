"""`koine completion`: print the script by which a shell completes commands, options and values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from koine.cli.commands import Command

VARIABLE = "_KOINE_COMPLETE"
"""The variable by which the script asks `koine` for completions; click's own name for it."""


@click.command(cls=Command, answers=False)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    For this shell: eval "$(koine completion bash)". For every new one, add that line to ~/.bashrc, the same
    with zsh to ~/.zshrc, or write the output for fish to ~/.config/fish/completions/koine.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(click.get_current_context().find_root().command, {}, "koine", VARIABLE).source()
    # For fish, click splits at every comma, also at those of a list of languages and of a description.
    click.echo(script.replace('string split "," ', 'string split --max 1 "," '))
