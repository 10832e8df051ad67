"""Options of the monitor of `koine align train`, and the monitor that they ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koine.cli.arguments import SOURCE

if TYPE_CHECKING:
    from koine.align.monitor import Monitor
    from koine.model.language_model import LanguageModel

PREFIX = "monitor_"
"""Before the names of `MonitorOptions`' fields in options."""

_OPTIONS = (
    click.option(
        "--monitor-pairs",
        type=SOURCE,
        metavar="SOURCE",
        help="Held-out pairs (records with prompt, chosen and rejected), scored at every evaluation.",
    ),
    click.option(
        "--monitor-prompts",
        type=SOURCE,
        metavar="SOURCE",
        help="Records with prompts, answered at every evaluation.  [default: the prompts of --monitor-pairs]",
    ),
    click.option(
        "--monitor-limit",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        help="Number of pairs, and of prompts, of each language at most.",
    ),
    click.option(
        "--monitor-max-new-tokens",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="Most tokens of an answer.",
    ),
    click.option(
        "--monitor-temperature",
        type=float,
        default=0.5,
        show_default=True,
        help="Temperature of the answers.",
    ),
    click.option(
        "--monitor-top-p", type=float, default=0.75, show_default=True, help="Nucleus of the answers."
    ),
    click.option(
        "--monitor-kl/--no-monitor-kl",
        default=True,
        show_default=True,
        help="Measure the KL to --reference, whose weights are then in memory.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class MonitorOptions:
    """Options of the monitor."""

    pairs: str | None
    prompts: str | None
    limit: int
    max_new_tokens: int
    temperature: float
    top_p: float
    kl: bool

    @property
    def asked(self) -> bool:
        """Whether there is anything to monitor."""
        return self.pairs is not None or self.prompts is not None


def monitor_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the monitor to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_monitor_options(options: dict[str, Any]) -> MonitorOptions:
    """Return the monitor's options, which are removed from `options`."""
    fields = dataclasses.fields(MonitorOptions)
    return MonitorOptions(**{field.name: options.pop(PREFIX + field.name) for field in fields})


def make_monitor(
    options: MonitorOptions,
    model: LanguageModel,
    *,
    tokenizer: Path,
    out: Path,
    reference: Callable[[], LanguageModel] | None,
) -> Monitor:
    """Return the monitor of a training.

    Args:
        options: of the command.
        model: the policy, for the length of its context.
        tokenizer: folder of the tokenizer.
        out: folder of the training, which gets the monitor's files.
        reference: opens the reference on the policy's device; None: no KL.
    """
    from koine.align.held_out import encode_pairs, encode_prompts, read_pairs, read_prompts
    from koine.align.monitor import Monitor, installed_identifier
    from koine.generate.sampling import Sampling
    from koine.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    pairs = [] if options.pairs is None else read_pairs(options.pairs, limit=options.limit)
    prompts = pairs if options.prompts is None else read_prompts(options.prompts, limit=options.limit)
    context = model.context_length
    return Monitor(
        loaded,
        pairs=encode_pairs(pairs, loaded, context=context) if pairs else (),
        prompts=encode_prompts(prompts, loaded, context=context),
        sampling=Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            seed=0,
            max_new_tokens=options.max_new_tokens,
        ),
        reference=None if reference is None or not options.kl else reference(),
        identify=installed_identifier(),
        folder=out,
    )
