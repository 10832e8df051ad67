"""`koine train`: pretraining and supervised fine-tuning on token shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koine.cli.arguments import MODEL, PRESET
from koine.cli.attention_options import attention_options
from koine.cli.groups import HelpGroup
from koine.cli.training_options import LORA_PREFIX, training_options
from koine.cli.training_run import open_model, run_training
from koine.errors import UserError

if TYPE_CHECKING:
    from koine.model.decoder import Decoder


@click.group(cls=HelpGroup)
def train() -> None:
    """Train a model on token shards.

    Run the same command again to resume. In several processes: `torchrun -m koine train COMMAND`.
    """


@train.command()
@click.option(
    "--preset",
    type=PRESET,
    help="Size of a new model (`koine model describe` lists the presets).  [required without --model]",
)
@click.option(
    "--model",
    type=MODEL,
    help="Model folder, or OWNER/NAME of the hub, to train further.  [required without --preset]",
)
@attention_options
@training_options(packing="concat")
def pretrain(
    preset: str | None,
    model: Path | None,
    attention: Any,
    window: int | None,
    full_every: int | None,
    rope_theta: float | None,
    **options: Any,
) -> None:
    """Train for next-token prediction on documents, from random weights or from a model."""
    from koine.train.objectives import LanguageModelling

    if (preset is None) == (model is None):
        raise UserError(
            "give either --preset or --model", hint="--preset starts a new model, --model goes on"
        )
    if model is not None:
        chosen = {
            "attention": attention, "window": window, "full_every": full_every, "rope_theta": rope_theta
        }  # fmt: skip
        if options[LORA_PREFIX + "rank"] and any(value is not None for value in chosen.values()):
            raise UserError(
                "--lora-rank with another attention: the base of the adapter would have its own",
                hint="train the model with the other attention first, then the adapter",
            )
        run_training(
            lambda vocab_size: open_model(model, **chosen), lambda order: LanguageModelling(), model, options
        )
        return

    def new_model(vocab_size: int) -> Decoder:
        import torch

        from koine.model.decoder import Decoder
        from koine.model.presets import preset as preset_config

        assert preset is not None
        config = preset_config(
            preset,
            vocab_size,
            attention=attention,
            window=window,
            full_every=full_every,
            rope_theta=rope_theta,
        )
        torch.manual_seed(options["seed"])
        return Decoder(config)

    run_training(new_model, lambda order: LanguageModelling(), None, options)


@train.command()
@click.option(
    "--model", type=MODEL, required=True, help="Model folder, or OWNER/NAME of the hub, to start from."
)
@training_options(packing="no_split")
def sft(model: Path, **options: Any) -> None:
    """Fine-tune on chats: supervised, with a loss on the completions only."""
    from koine.train.objectives import SupervisedFineTuning, check_chats

    run_training(
        lambda vocab_size: open_model(model),
        lambda order: SupervisedFineTuning(),
        model,
        options,
        check_sources=check_chats,
    )
