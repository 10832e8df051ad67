"""`koine train`: pretraining and supervised fine-tuning on token shards."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import click

from koine.cli.answers import print_answer
from koine.cli.arguments import DEVICE, MODEL, PRESET, SOURCE, TOKENIZER
from koine.cli.attention_options import attention_options
from koine.cli.commands import SharedVariableOption
from koine.cli.groups import HelpGroup
from koine.cli.mixtures import DataOptions, build_mixture, data_options
from koine.cli.outputs import OutputFolder
from koine.cli.recording import recorded_output
from koine.errors import UserError
from koine.files.stand_ins import sources_of
from koine.model.lora.config import LoraConfig
from koine.terminal import note
from koine.train.settings import TrainSettings
from koine.train.tracking.run_logger import PROJECT, TRACK, TRACK_PROJECT, TRACKERS, open_run_logger

if TYPE_CHECKING:
    from koine.data.mixture import Mixture
    from koine.data.shards import TokenSource
    from koine.evaluate.training_probe import BitsPerByteProbe
    from koine.model.decoder import Decoder
    from koine.model.language_model import LanguageModel
    from koine.train.evaluation import NamedEvaluation
    from koine.train.objectives import Objective

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


def open_model(path: Path, **attention: Any) -> LanguageModel:
    """Return the model in a folder, with other attention where options of it are given (not None)."""
    from koine.model.attention_change import change_attention, describe_change
    from koine.model.causal_lm import load_as_stored
    from koine.model.decoder import Decoder
    from koine.model.layer_patterns import with_attention

    if not path.is_dir():
        raise UserError("no such model directory", where=path, hint="give a folder that holds config.json")
    model = load_as_stored(path)
    given = [name for name, value in attention.items() if value is not None]
    if not given:
        return model
    # Classes of transformers compute RoPE's frequencies once, when they are opened.
    if not isinstance(model, Decoder):
        raise UserError(
            f"--{given[0].replace('_', '-')} is for Koine's own decoder",
            where=path,
            hint=f"a {model.architecture} opens through transformers, with the attention of its config.json",
        )
    config = with_attention(model.config, **attention)
    said = describe_change(model.config, config)
    if said and os.environ.get("RANK", "0") == "0":
        note(said)
    return change_attention(model, config)


def take(cls: type[Any], options: dict[str, Any], prefix: str = "") -> Any:
    """Return a dataclass made of its fields in `options`, which are removed there."""
    names = [field.name for field in dataclasses.fields(cls) if prefix + field.name in options]
    return cls(**{name: options.pop(prefix + name) for name in names})


def run_training(
    make_model: Callable[[int], LanguageModel],
    make_objective: Callable[[Any], Objective],
    init_from: Path | None,
    options: dict[str, Any],
    *,
    check_sources: Callable[[Iterable[TokenSource]], None] | None = None,
    groups: bool = False,
    make_monitor: Callable[[LanguageModel], NamedEvaluation] | None = None,
    report: Callable[[], tuple[Mapping[str, Any], Callable[[], object]]] | None = None,
) -> None:
    """Check the options, then train, or print an estimate for `--dry-run`.

    Args:
        make_model: returns the model for data with this many ids.
        make_objective: returns what to minimise, for the data order; not called for a dry run.
        init_from: the folder that the model comes from.
        options: the other options of the command.
        check_sources: raises `UserError` for token shards that the objective cannot use.
        groups: whether the data are groups of completions (`koine.data.PreferenceOrder`).
        make_monitor: returns a further evaluation, which comes first, from the model before the training.
        report: called after the training; returns more of the answer, and what prints it as text.
    """
    data: DataOptions = take(DataOptions, options)
    evaluation: EvaluationOptions = take(EvaluationOptions, options)
    run: RunOptions = take(RunOptions, options)
    lora: LoraConfig = take(LoraConfig, options, LORA_PREFIX)
    settings = TrainSettings(**options)
    tokenizer = run.tokenizer or init_from
    _check_evaluation_options(settings, evaluation, monitored=make_monitor is not None)
    _check_lora(lora, init_from)
    if run.device != "auto":
        from koine.hardware import check_device

        check_device(run.device)
    logger = None if run.track is None else open_run_logger(run.track, run.track_project)
    mixture = build_mixture(data, settings.seed)
    if data.fresh_data:
        mixture = _after_documents_seen(mixture, init_from)
    vocab_size = _check_shards(mixture, check_sources, tokenizer)

    from koine.data import DataOrder, PreferenceOrder
    from koine.data.cut_text import check_chats_keep_completions
    from koine.train.model_adapters import check_data_fits_model, check_packed_documents

    model = make_model(vocab_size)
    if lora.rank:
        from koine.model.lora.adapter import add_lora
        from koine.model.reward_model import RewardModel

        if isinstance(model, RewardModel):
            model.add_lora(lora, base=init_from, seed=settings.seed)
        else:
            add_lora(model, lora, base=init_from, seed=settings.seed)
    check_data_fits_model(model, mixture, vocab_size)
    if not groups:
        check_packed_documents(model, mixture, run.out)
    # A dry run too reports all errors and warnings of the data.
    order = PreferenceOrder(mixture) if groups else DataOrder(mixture)
    check_chats_keep_completions(order.cut_text)
    evaluate = _make_evaluation(evaluation, tokenizer, None if make_monitor is None else make_monitor(model))
    stop = None
    if evaluate is not None:
        from koine.train.evaluation import check_metric

        check_metric(settings.best_metric, evaluate.names)
        if evaluation.stop_on is not None:
            from koine.align.stopping import parse_stop_rule

            stop = parse_stop_rule(evaluation.stop_on, evaluate.names)
    if run.dry_run:
        print_estimate(model, settings, mixture)
        return
    from koine.train.loop import train as train_model
    from koine.train.progress import final_metrics

    parents = {
        "model": init_from,
        "tokenizer": tokenizer,
        "data": [source.path for phase in mixture.phases for source in phase.all_sources],
        "evaluation": evaluation.evaluate_data,
    }
    with recorded_output(run.out, parents, metrics=lambda folder: final_metrics(folder / "metrics.jsonl")):
        train_model(
            model,
            make_objective(order),
            order,
            settings,
            out=run.out,
            tokenizer=tokenizer,
            evaluate=evaluate,
            stop=stop,
            init_from=init_from,
            device=run.device,
            logger=logger,
        )
    if os.environ.get("RANK", "0") == "0":
        from koine.files import read_json

        record = read_json(run.out / "training.json")
        answer = {"written": run.out, "steps": record["steps"], "best": record.get("best")}
        if "stopped" in record:
            answer["stopped"] = record["stopped"]
        more, show = ({}, lambda: None) if report is None else report()

        def say() -> None:
            show()
            _say_best(run.out, record)

        print_answer({**answer, **more}, say)


def _say_best(out: Path, record: dict[str, Any]) -> None:
    """Say how to get the best model where a stop rule ended the training after it."""
    stopped, best = record.get("stopped"), record.get("best")
    if stopped is not None and best is not None and best["step"] != stopped["step"]:
        checkpoint = out / "checkpoints" / f"step-{best['step']:06d}"
        note(f"the best model: koine model export {checkpoint} --format safetensors --out MODEL")


def _check_lora(lora: LoraConfig, base: Path | None) -> None:
    """Raise `UserError` for an adapter of a model that is in no folder of its own."""
    if not lora.rank:
        return
    if base is None:
        raise UserError("--lora-rank with --preset: an adapter needs a trained base", hint="give --model")
    sources = sources_of(base)
    if sources is not None:
        raise UserError(
            f"--lora-rank on {'+'.join(map(str, sources))}: the base of an adapter must be one folder",
            hint=f"merge them first: koine model merge-adapter {' '.join(map(str, sources))} --out MODEL",
        )


def _check_shards(
    mixture: Mixture, check: Callable[[Iterable[TokenSource]], None] | None, tokenizer: Path | None
) -> int:
    """Return the number of ids of the mixture's token shards.

    Raises `UserError` for shards that `check` refuses, and for shards made with another tokenizer.
    """
    from koine.data import TokenSource
    from koine.files import sha256_file

    paths = dict.fromkeys(Path(source.path) for phase in mixture.phases for source in phase.all_sources)
    shards = {path: TokenSource(path, verify=False) for path in paths}
    if check is not None:
        check(shards.values())
    if tokenizer is not None and not (tokenizer / "tokenizer.json").exists():
        raise UserError("no tokenizer here", where=tokenizer, hint="give a folder with tokenizer.json")
    if tokenizer is not None:
        fingerprint = sha256_file(tokenizer / "tokenizer.json")
        for path, source in shards.items():
            if source.tokenizer_fingerprint != fingerprint:
                raise UserError(
                    f"tokenized with another tokenizer than {tokenizer}",
                    where=path,
                    hint="run `koine data tokenize` again with this tokenizer, or give the one that was used",
                )
    return max(source.vocab_size for source in shards.values())


def _after_documents_seen(mixture: Mixture, model: Path | None) -> Mixture:
    """Return the mixture that starts after the documents that a model was trained on."""
    from koine.data.drawn import read_drawn

    drawn = () if model is None else read_drawn(model)
    if not drawn:
        raise UserError(
            "--fresh-data, and nothing says what was read before",
            where=model,
            hint="leave it out, or go on from a model that this version of Koine trained",
        )
    return dataclasses.replace(mixture, drawn=drawn)


def _check_evaluation_options(
    settings: TrainSettings, options: EvaluationOptions, *, monitored: bool
) -> None:
    """Raise `UserError` for evaluation data without an interval, and the other way round.

    monitored: whether there is another evaluation.
    """
    if options.evaluate_split and not options.evaluate_data:
        raise UserError("--evaluate-split without --evaluate-data", hint="give documents to evaluate on")
    if monitored and not settings.evaluate_every:
        raise UserError("a monitor without --evaluate-every", hint="say after how many steps to evaluate")
    if monitored:
        return
    if options.evaluate_data and not settings.evaluate_every:
        raise UserError(
            "--evaluate-data without --evaluate-every", hint="say after how many steps to evaluate"
        )
    for option, given in (
        ("--evaluate-every", settings.evaluate_every),
        ("--best-metric", settings.best_metric),
        ("--stop-on", options.stop_on),
    ):
        if given and not options.evaluate_data:
            raise UserError(f"{option} without --evaluate-data", hint="give documents to evaluate on")


def _make_evaluation(
    options: EvaluationOptions, tokenizer: Path | None, monitor: NamedEvaluation | None
) -> NamedEvaluation | None:
    """Return the evaluation during training: the monitor, bits per byte of documents, or both; None: neither."""
    from koine.train.evaluation import JoinedEvaluations

    probe = _make_probe(options, tokenizer) if options.evaluate_data else None
    found: list[NamedEvaluation] = [one for one in (monitor, probe) if one is not None]
    return JoinedEvaluations(found) if len(found) > 1 else found[0] if found else None


def _make_probe(options: EvaluationOptions, tokenizer: Path | None) -> BitsPerByteProbe:
    """Return the evaluation of bits per byte during training."""
    from koine.evaluate.records import RecordOptions, Records
    from koine.evaluate.training_probe import BitsPerByteProbe
    from koine.tokenizer import load_tokenizer

    if tokenizer is None:
        raise UserError("--evaluate-data without --tokenizer", hint="give the tokenizer of the token shards")
    records = Records(
        options.evaluate_data,
        RecordOptions(split=options.evaluate_split),
        limit=options.evaluate_limit,
        split_option="--evaluate-split",
    )
    probe = BitsPerByteProbe(load_tokenizer(tokenizer), records)
    records.warn_of_bad()
    return probe


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
