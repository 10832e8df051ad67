"""`koine train`: pretraining and supervised fine-tuning on token shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import click

from koine.cli.attention_options import attention_options
from koine.cli.mixtures import read_long_rows, read_mixture
from koine.errors import UserError
from koine.train.settings import TrainSettings

if TYPE_CHECKING:
    from koine.data.mixture import Mixture
    from koine.evaluate.training_probe import BitsPerByteProbe
    from koine.model.decoder import Decoder
    from koine.model.language_model import LanguageModel


def setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """One option for each field of `TrainSettings`: its name, type, default and help are declared there."""
    types = get_type_hints(TrainSettings)
    for field in reversed(dataclasses.fields(TrainSettings)):
        kind, choices = types[field.name], get_args(types[field.name])
        name = "--" + field.name.replace("_", "-")
        if kind is bool:
            name = f"{name}/--no-{name[2:]}"
        command = click.option(
            name,
            type=click.Choice(choices) if choices else kind,
            default=field.default,
            show_default=field.default != "",
            help=field.metadata["help"],
        )(command)
    return command


class _PackingChoice(click.Choice[str]):
    """The packings of `Mixture`, by their names of today or before version 0.1.0."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from koine.data.mixture import current_packing

        return super().convert(current_packing(value), param, ctx)


def data_options(packing: str, sequence_length: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that say what on to train, for how long, and where to."""
    options = (
        click.option(
            "--data",
            multiple=True,
            metavar="TOKENS[:PROPORTION]",
            help="A folder written by `koine data tokenize`, with its share of the batches; repeat for a mixture.",
        ),
        click.option(
            "--mixture",
            type=click.Path(path_type=Path),
            help="A JSON file with a whole mixture (phases, languages), in place of --data, --steps, --batch-size, ...",
        ),
        click.option(
            "--tokenizer", type=click.Path(path_type=Path), help="Tokenizer folder kept with the model."
        ),
        click.option("--steps", type=int, help="Optimiser steps."),
        click.option(
            "--sequence-length",
            type=int,
            default=sequence_length,
            show_default=True,
            help="Tokens a sequence.",
        ),
        click.option(
            "--batch-size", type=int, default=8, show_default=True, help="Sequences a step, over all ranks."
        ),
        click.option(
            "--packing",
            type=_PackingChoice(["concat", "no_split", "one_per_row"]),
            default=packing,
            show_default=True,
            help="concat: documents are joined and cut at a row's end; no_split: they are not cut; "
            "one_per_row: one document a row, padded.",
        ),
        click.option(
            "--cross-document-attention",
            is_flag=True,
            help="Let attention and targets run on from one document of a sequence to the next.",
        ),
        click.option(
            "--fresh-data",
            is_flag=True,
            help="Begin each source after the documents that --model has been trained on (same --seed).",
        ),
        click.option("--long-every", type=int, help="Every n-th step is a batch of long sequences."),
        click.option("--long-sequence-length", type=int, help="Tokens of a long sequence."),
        click.option("--long-batch-size", type=int, help="Long sequences a step, over all ranks."),
        click.option(
            "--long-data",
            multiple=True,
            metavar="TOKENS[:PROPORTION]",
            help="What long sequences are drawn from; repeatable.  [default: the same as the others]",
        ),
        click.option(
            "--long-min-tokens", type=int, help="Long sequences are of documents of at least as many tokens."
        ),
        click.option(
            "--evaluate-data",
            multiple=True,
            metavar="SOURCE",
            help="Documents (as for `koine evaluate --data`) whose bits per byte are measured on the way; may be repeated.",
        ),
        click.option(
            "--evaluate-split", help="Split of --evaluate-data.  [default: all; several splits are refused]"
        ),
        click.option(
            "--evaluate-limit",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            help="At most this many documents of each language of --evaluate-data.",
        ),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto."),
        click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the model."),
        click.option("--dry-run", is_flag=True, help="Print what the training would need, and stop."),
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        command = setting_options(command)
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group()
def train() -> None:
    """Train a model on token shards (run the same command again to resume; `torchrun -m koine train ...` for several processes)."""


@train.command()
@click.option("--preset", help="Size of a new model (`koine model describe` lists them).")
@click.option(
    "--model", type=click.Path(path_type=Path), help="Model folder to go on from, in place of --preset."
)
@attention_options
@data_options(packing="concat", sequence_length=1024)
def pretrain(
    preset: str | None,
    model: Path | None,
    seed: int,
    tokenizer: Path | None,
    attention: Any,
    window: int | None,
    full_every: int | None,
    rope_theta: float | None,
    **options: Any,
) -> None:
    """Next-token prediction on documents, from random weights or from a model."""
    from koine.train.objectives import language_modelling

    if (preset is None) == (model is None):
        raise UserError(
            "give either --preset or --model", hint="--preset starts a new model, --model goes on"
        )
    if model is not None:
        for name, value in (
            ("--attention", attention),
            ("--window", window),
            ("--full-every", full_every),
        ):
            if value is not None:
                raise UserError(
                    f"{name} with --model: the layers of a model do not change",
                    hint="leave it out, or start a new one with --preset; --rope-theta may change",
                )
        _run(
            lambda vocabulary: _opened(model, rope_theta),
            language_modelling,
            seed=seed,
            tokenizer=tokenizer or model,
            init_from=model,
            **options,
        )
        return

    def fresh(vocab_size: int) -> Decoder:
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
        torch.manual_seed(seed)
        return Decoder(config)

    _run(fresh, language_modelling, seed=seed, tokenizer=tokenizer, **options)


def _opened(path: Path, rope_theta: float | None = None) -> LanguageModel:
    """A model to go on from, turning by `rope_theta` where it is given."""
    from koine.model.causal_lm import load_as_stored
    from koine.model.decoder import Decoder
    from koine.model.layer_patterns import set_rope_theta

    if not path.is_dir():
        raise UserError("no such model directory", where=path, hint="give a folder that holds config.json")
    model = load_as_stored(path)
    if rope_theta is not None:
        # Classes of transformers compute RoPE's frequencies once, when they are opened.
        if not isinstance(model, Decoder):
            raise UserError(
                "--rope-theta is for Koine's own decoder",
                where=path,
                hint="set it in the model's config.json",
            )
        set_rope_theta(model, rope_theta)
    return model


@train.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Model folder to start from.")
@data_options(packing="no_split", sequence_length=1024)
def sft(model: Path, tokenizer: Path | None, **options: Any) -> None:
    """Supervised fine-tuning on chats: the loss is on the completions only."""
    from koine.train.objectives import supervised_fine_tuning

    _run(
        lambda vocabulary: _opened(model),
        supervised_fine_tuning,
        tokenizer=tokenizer or model,
        init_from=model,
        **options,
    )


def _run(
    make_model: Callable[[int], LanguageModel],
    objective: Any,
    *,
    data: tuple[str, ...],
    mixture: Path | None,
    tokenizer: Path | None,
    steps: int | None,
    sequence_length: int,
    batch_size: int,
    packing: str,
    cross_document_attention: bool,
    fresh_data: bool,
    long_every: int | None,
    long_sequence_length: int | None,
    long_batch_size: int | None,
    long_data: tuple[str, ...],
    long_min_tokens: int | None,
    evaluate_data: tuple[str, ...],
    evaluate_split: str | None,
    evaluate_limit: int,
    seed: int,
    device: str,
    out: Path,
    dry_run: bool,
    init_from: Path | None = None,
    **settings: Any,
) -> None:
    chosen = TrainSettings(seed=seed, **settings)
    _refuse_half_an_evaluation(chosen, evaluate_data, evaluate_split)
    if device != "auto":
        from koine.hardware import check_device

        check_device(device)
    long = read_long_rows(
        long_every, long_sequence_length, long_batch_size, long_data, long_min_tokens, others=data
    )
    mix = read_mixture(
        data,
        mixture,
        steps,
        sequence_length,
        batch_size,
        long,
        packing=packing,
        cross_document_attention=cross_document_attention,
        seed=seed,
    )
    if fresh_data:
        mix = _after(mix, init_from)
    from koine.data import DataOrder, TokenSource
    from koine.train.model_adapters import check_data_beyond_the_model, check_packed_documents
    from koine.train.objectives import check_plain_documents, supervised_fine_tuning

    paths = dict.fromkeys(Path(source.path) for phase in mix.phases for source in phase.all_sources)
    manifests = {path: TokenSource(path, verify=False) for path in paths}
    if objective is supervised_fine_tuning:
        check_plain_documents(manifests.values())
    vocab_size = max(source.vocab_size for source in manifests.values())
    if tokenizer is not None and (tokenizer / "tokenizer.json").exists():
        from koine.files import sha256_file

        fingerprint = sha256_file(tokenizer / "tokenizer.json")
        for path, source in manifests.items():
            if source.tokenizer_fingerprint != fingerprint:
                raise UserError(
                    f"tokenized with another tokenizer than {tokenizer}",
                    where=path,
                    hint="run `koine data tokenize` again with this tokenizer, or give the one that was used",
                )
    elif tokenizer is not None:
        raise UserError("no tokenizer here", where=tokenizer, hint="give a folder with tokenizer.json")
    model = make_model(vocab_size)
    check_data_beyond_the_model(model, mix, vocab_size)
    check_packed_documents(model, mix, out)
    # Before a dry run too, which must refuse and note what the run would.
    order = DataOrder(mix)
    evaluate = (
        _probe(evaluate_data, evaluate_split, evaluate_limit, tokenizer, chosen.best_metric)
        if evaluate_data
        else None
    )
    if dry_run:
        print_estimate(model, chosen, mix)
        return
    from koine.train.loop import train as run

    run(
        model,
        objective,
        order,
        chosen,
        out=out,
        tokenizer=tokenizer,
        evaluate=evaluate,
        init_from=init_from,
        device=device,
    )


def _after(mixture: Mixture, model: Path | None) -> Mixture:
    """The mixture that goes on after what a model has been trained on."""
    from dataclasses import replace

    from koine.data.drawn import read_drawn

    drawn = () if model is None else read_drawn(model)
    if not drawn:
        raise UserError(
            "--fresh-data, and nothing says what was read before",
            where=model,
            hint="leave it out, or go on from a model that this version of Koine trained",
        )
    return replace(mixture, drawn=drawn)


def _refuse_half_an_evaluation(settings: TrainSettings, data: tuple[str, ...], split: str | None) -> None:
    """Data, and how often: one without the other would measure nothing."""
    if data and not settings.evaluate_every:
        raise UserError(
            "--evaluate-data without --evaluate-every", hint="say after how many steps to evaluate"
        )
    for option, given in (
        ("--evaluate-every", settings.evaluate_every),
        ("--best-metric", settings.best_metric),
        ("--evaluate-split", split),
    ):
        if given and not data:
            raise UserError(f"{option} without --evaluate-data", hint="give documents to evaluate on")


def _probe(
    data: tuple[str, ...],
    split: str | None,
    limit: int,
    tokenizer: Path | None,
    metric: str,
) -> BitsPerByteProbe:
    """What measures `data` on the way; raises `UserError` for a metric that it does not have."""
    from koine.evaluate.records import RecordOptions, Records
    from koine.evaluate.training_probe import BitsPerByteProbe
    from koine.tokenizer import load_tokenizer

    if tokenizer is None:
        raise UserError("--evaluate-data without --tokenizer", hint="give the tokenizer of the token shards")
    records = Records(data, RecordOptions(split=split), limit=limit, split_option="--evaluate-split")
    probe = BitsPerByteProbe(load_tokenizer(tokenizer), records)
    records.warn_of_bad()
    probe.check_metric(metric)
    return probe


def print_estimate(model: LanguageModel, settings: TrainSettings, mixture: Mixture) -> None:
    """What `--dry-run` prints; of another architecture than ours, memory and time are not known before."""
    from koine.model.counting import training_flops_per_token
    from koine.model.decoder import Decoder
    from koine.train.estimate import estimate_training

    parameters = sum(parameter.numel() for parameter in model.parameters())
    shapes = mixture.shapes()
    tokens = sum(shape.tokens * steps for shape, steps in shapes.items())
    lengths = ", ".join(
        f"{steps:,} of {shape.batch_size:,} x {shape.sequence_length:,}" for shape, steps in shapes.items()
    )
    click.echo(f"parameters   {parameters:,}")
    click.echo(f"tokens       {tokens:,} in {mixture.steps:,} steps ({lengths})")
    # Memory and time are estimated from the fields of our own configuration.
    if not isinstance(model, Decoder):
        click.echo(f"operations   about {6.0 * parameters * tokens:.3g} (attention not counted)")
        return
    flops = sum(
        steps * shape.tokens * training_flops_per_token(model.config, shape.sequence_length)
        for shape, steps in shapes.items()
    )
    estimate = estimate_training(model.config, settings, mixture)
    click.echo(f"operations   {flops:.3g}")
    click.echo(f"peak memory  about {estimate.peak_bytes / 2**30:.2f} GiB in one process")
    click.echo(f"time         about {estimate.seconds:,.0f} s on this machine's CPU")
