"""Options that all trainings have in common, and the values that they are read into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from koine.cli.arguments import DEVICE, SOURCE, TOKENIZER
from koine.cli.commands import SharedVariableOption
from koine.cli.mixtures import data_options
from koine.cli.outputs import OutputFolder
from koine.model.lora.config import LoraConfig
from koine.train.settings import TrainSettings
from koine.train.tracking.run_logger import PROJECT, TRACK, TRACK_PROJECT, TRACKERS

LORA_PREFIX = "lora_"
"""Before the names of `LoraConfig`'s fields in options."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of `koine train` for evaluation during training."""

    evaluate_data: tuple[str, ...] = ()
    evaluate_split: str | None = None
    evaluate_limit: int = 16
    stop_on: str | None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of `koine train` for the device, the output and the dry run."""

    tokenizer: Path | None
    device: str
    out: Path
    dry_run: bool
    track: str | None
    track_project: str


EVALUATION_OPTIONS = (
    click.option(
        "--evaluate-data",
        type=SOURCE,
        multiple=True,
        metavar="SOURCE",
        help="Documents (as for `koine evaluate --data`) whose bits per byte are measured during training; "
        "repeatable.",
    ),
    click.option("--evaluate-split", help="Split of --evaluate-data.  [required where it has several]"),
    click.option(
        "--evaluate-limit",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Number of documents of each language of --evaluate-data at most.",
    ),
    click.option(
        "--stop-on",
        metavar="RULE",
        help="End the training early, with the best checkpoint kept: METRIC (no better value in two "
        "evaluations), METRIC=LIMIT (the metric reaches it), or overoptimisation (`koine align train`).",
    ),
)
RUN_OPTIONS = (
    click.option(
        "--tokenizer",
        type=TOKENIZER,
        help="Tokenizer folder, copied to the model.  [default: that of --model]",
    ),
    DEVICE,
    click.option("--out", type=OutputFolder(), required=True, help="Folder of the trained model."),
    click.option(
        "--dry-run", is_flag=True, help="Print parameters, tokens, peak memory and time; train nothing."
    ),
    click.option(
        "--track",
        cls=SharedVariableOption,
        type=click.Choice(TRACKERS),
        envvar=TRACK,
        show_envvar=True,
        help="Send the figures to an experiment tracker too (extra `track`).",
    ),
    click.option(
        "--track-project",
        cls=SharedVariableOption,
        default=PROJECT,
        envvar=TRACK_PROJECT,
        show_default=True,
        show_envvar=True,
        help="Project (for MLflow: experiment) of --track.",
    ),
)


def setting_options(
    cls: type[Any] = TrainSettings, prefix: str = "", leave_out: Collection[str] = ()
) -> list[Callable[..., Any]]:
    """Return one option for each field of a settings class, which declares its type, default and help.

    leave_out: fields without an option.
    """
    types = get_type_hints(cls)
    options = []
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
            continue
        field_type, choices = types[field.name], get_args(types[field.name])
        name = "--" + (prefix + field.name).replace("_", "-")
        if field_type is bool:
            name = f"{name}/--no-{name[2:]}"
        options.append(
            click.option(
                name,
                type=click.Choice(choices) if choices else field_type,
                default=field.default,
                show_default=field.default != "",
                help=field.metadata["help"],
            )
        )
    return options


def training_options(
    *, packing: str, documents: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options that all trainings have: data, evaluation, output and hyperparameters.

    documents: whether documents can be evaluated on; else the command has an evaluation of its own.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        settings = (*setting_options(), *setting_options(LoraConfig, LORA_PREFIX))
        evaluation = EVALUATION_OPTIONS if documents else EVALUATION_OPTIONS[-1:]
        for option in reversed((*evaluation, *RUN_OPTIONS, *settings)):
            command = option(command)
        return data_options(packing=packing, sequence_length=1024)(command)

    return decorate


def take(cls: type[Any], options: dict[str, Any], prefix: str = "") -> Any:
    """Return a dataclass made of its fields in `options`, which are removed there."""
    names = [field.name for field in dataclasses.fields(cls) if prefix + field.name in options]
    return cls(**{name: options.pop(prefix + name) for name in names})
