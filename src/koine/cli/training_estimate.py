"""The answer of `--dry-run`: parameters, tokens, memory, time and disk of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from koine.cli.answers import print_answer

if TYPE_CHECKING:
    from koine.data.mixture import Mixture
    from koine.model.language_model import LanguageModel
    from koine.train.settings import TrainSettings


def print_estimate(model: LanguageModel, settings: TrainSettings, mixture: Mixture) -> None:
    """Print the estimate of `--dry-run`; memory and time only for our own decoder."""
    from koine.model.counting import training_flops_per_token
    from koine.model.decoder import Decoder
    from koine.train.estimate import estimate_training

    parameters = sum(parameter.numel() for parameter in model.parameters())
    adapter = getattr(model, "adapter", None)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    shapes = mixture.shapes()
    tokens = sum(shape.tokens * steps for shape, steps in shapes.items())
    lengths = ", ".join(
        f"{steps:,} of {shape.batch_size:,} x {shape.sequence_length:,}" for shape, steps in shapes.items()
    )
    lines = [
        f"parameters   {parameters:,}" + ("" if adapter is None else f", of which {trained:,} are trained"),
        f"tokens       {tokens:,} in {mixture.steps:,} steps ({lengths})",
    ]
    answer: dict[str, Any] = {"parameters": parameters, "tokens": tokens, "steps": mixture.steps}
    if adapter is not None:
        answer["trained_parameters"] = trained
    # Memory and time are estimated from the fields of our own configuration.
    if isinstance(model, Decoder):
        adapted = 0 if adapter is None else trained
        flops = sum(
            steps
            * shape.tokens
            * training_flops_per_token(model.config, shape.sequence_length, adapter=adapted)
            for shape, steps in shapes.items()
        )
        estimate = estimate_training(model.config, settings, mixture, adapter=adapted)
        disk = estimate.kept_bytes + estimate.temporary_bytes
        answer |= {
            "flops": flops,
            "peak_memory_bytes": estimate.peak_bytes,
            "seconds": estimate.seconds,
            "disk_bytes": disk,
            "basis": estimate.basis,
        }
        lines += [
            f"operations   {flops:.3g}",
            f"peak memory  about {estimate.peak_bytes / 2**30:.2f} GiB in one process",
            f"time         about {estimate.seconds:,.0f} s on this machine's CPU",
            f"disk         about {disk / 2**20:,.0f} MiB",
            estimate.basis,
        ]
    else:
        answer |= {"flops": 6.0 * parameters * tokens, "peak_memory_bytes": None, "seconds": None}
        answer |= {"disk_bytes": None, "basis": None}
        lines.append(f"operations   about {answer['flops']:.3g} (attention not counted)")
    print_answer(answer, lambda: click.echo("\n".join(lines)))
