"""A training from its options: checks, model, order, evaluation, and the answer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.cli.answers import print_answer
from koine.cli.mixtures import DataOptions, build_mixture
from koine.cli.recording import recorded_output
from koine.cli.training_estimate import print_estimate
from koine.cli.training_options import LORA_PREFIX, EvaluationOptions, RunOptions, take
from koine.errors import UserError
from koine.files.stand_ins import sources_of
from koine.model.lora.config import LoraConfig
from koine.terminal import note
from koine.train.settings import TrainSettings
from koine.train.tracking.run_logger import open_run_logger

if TYPE_CHECKING:
    from koine.data.mixture import Mixture
    from koine.data.shards import TokenSource
    from koine.evaluate.training_probe import BitsPerByteProbe
    from koine.model.language_model import LanguageModel
    from koine.train.evaluation import NamedEvaluation
    from koine.train.objectives import Objective


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
    """Return the monitor, the bits per byte of documents, or both joined; None where there is neither."""
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
