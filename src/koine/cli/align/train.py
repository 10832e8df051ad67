"""`koine align train`: offline preference training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koine.cli.align.monitoring import make_monitor, monitor_options, take_monitor_options
from koine.cli.arguments import MODEL
from koine.cli.commands import Command
from koine.cli.training_options import training_options
from koine.cli.training_run import open_model, run_training
from koine.errors import UserError
from koine.files import sha256_file

if TYPE_CHECKING:
    from koine.align.loss_spec import LossSpec
    from koine.align.monitor import Monitor
    from koine.align.objective import PreferenceObjective
    from koine.align.reference import ReferenceLogProbabilities
    from koine.data.preference_order import PreferenceOrder
    from koine.model.language_model import LanguageModel

START, NONE = "start", "none"


@click.command(cls=Command)
@click.option(
    "--model", type=MODEL, required=True, help="Model folder, or OWNER/NAME of the hub, to start from."
)
@click.option(
    "--loss",
    required=True,
    metavar="LOSS",
    help="Sum of losses, for example dpo:beta=0.1+nll:weight=0.2.",
)
@click.option(
    "--reference",
    default=START,
    show_default=True,
    metavar="start|MODEL|none",
    help="Reference of the loss: the model before this training, a model folder, or none.",
)
@click.option(
    "--reference-cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that keeps the reference's log-probabilities.  [default: ~/.cache/koine/reference]",
)
@monitor_options
@training_options(packing="no_split")
def train(model: Path, loss: str, reference: str, reference_cache: Path | None, **options: Any) -> None:
    """Train on groups of completions: preferences, labelled or scored ones.

    --data is written by `koine data tokenize --kind preferences`, `labelled` or `scored`. With --monitor-pairs
    or --monitor-prompts, each evaluation shows what the training does to likelihood, entropy and diversity, by
    language; --stop-on overoptimisation ends it before the model gets worse.
    """
    from koine.align.loss_spec import LossSpec

    monitoring = take_monitor_options(options)
    spec = LossSpec.parse(loss)
    place = model if reference == START else None if reference == NONE else Path(reference)
    if place is None and spec.needs_reference:
        raise UserError(
            f"the loss {spec} needs a reference", hint="give --reference start or --reference MODEL"
        )
    if place is not None and not place.is_dir():
        raise UserError("no such model directory", where=place, hint="give start, none or a model folder")

    def objective(order: PreferenceOrder) -> PreferenceObjective:
        from koine.align.objective import PreferenceObjective

        found = None if place is None else _reference(place, order, reference_cache, spec, options)
        return PreferenceObjective(spec, found)

    def monitor(policy: LanguageModel) -> Monitor:
        return make_monitor(
            monitoring,
            policy,
            tokenizer=options["tokenizer"] or model,
            out=options["out"],
            reference=None if place is None else lambda: _open_reference(place, options),
        )

    run_training(
        lambda vocab_size: open_model(model),
        objective,
        model,
        dict(options),
        check_sources=lambda sources: _check_groups(spec, sources, place),
        groups=True,
        make_monitor=monitor if monitoring.asked else None,
    )


def _check_groups(spec: LossSpec, sources: Any, reference: Path | None) -> None:
    """Raise `UserError` for groups that the loss cannot take, and for a reference of another tokenizer."""
    tokenizer = None if reference is None else reference / "tokenizer.json"
    fingerprint = sha256_file(tokenizer) if tokenizer is not None and tokenizer.is_file() else None
    for source in sources:
        if fingerprint not in (None, source.tokenizer_fingerprint):
            raise UserError(
                "has another tokenizer than the pairs",
                where=reference,
                hint="give a reference with the tokenizer of the model",
            )
        if source.kind == "documents":
            raise UserError(
                "holds documents, not groups of completions",
                where=source.path,
                hint=f"tokenize with --kind {spec.groups}",
            )
        counts = {sum(one.completion for one in source.segments(number)) for number in range(len(source))}
        spec.check_groups(source.kind, sorted(counts), source.path)


def _open_reference(place: Path, options: dict[str, Any]) -> LanguageModel:
    """Return the reference in the training's precision and on its device, for the monitor's KL."""
    import torch

    from koine.hardware import chosen_device, chosen_dtype

    model = open_model(place).to(
        chosen_device(options["device"]), getattr(torch, chosen_dtype(options["dtype"]))
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def _reference(
    place: Path, order: PreferenceOrder, cache: Path | None, spec: LossSpec, options: dict[str, Any]
) -> ReferenceLogProbabilities:
    import torch

    from koine.align.reference import default_cache, reference_log_probabilities
    from koine.hardware import chosen_device, chosen_dtype

    return reference_log_probabilities(
        open_model(place),
        order,
        cache=cache or default_cache(),
        dtype=getattr(torch, chosen_dtype(options["dtype"])),
        device=chosen_device(options["device"]),
        mismatched=spec.needs_reference_point,
    )
