"""The steps of preference training."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from koine.allocator import keep_freed_memory
from koine.files import write_json
from koine.plan import step
from koine.steps import checks, estimates
from koine.steps.corpus_files import write_step_report
from koine.steps.text_mixture import TextMixture
from koine.train.settings import TrainSettings

if TYPE_CHECKING:
    from koine.align.monitor import Monitor
    from koine.align.overoptimisation import Verdict
    from koine.align.reference import ReferenceLogProbabilities
    from koine.data import PreferenceOrder
    from koine.model.language_model import LanguageModel
    from koine.train.loop import Evaluate
    from koine.train.stopping import StopRule

CACHE = "reference"
"""Folder of the log-probabilities in the output of `cache_reference`."""


@dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """What the monitor of `align_model` measures, besides the pairs and prompts; the defaults are the paper's.

    limit: pairs, and prompts, of each language at most; None: all.
    temperature, top_p, max_new_tokens, seed: of the answers.
    kl: whether the KL to the reference is measured, which is then in memory.
    """

    limit: int | None = 64
    temperature: float = 0.5
    top_p: float = 0.75
    max_new_tokens: int = 256
    seed: int = 0
    kl: bool = True


@step(version="1", estimate=estimates.group_tokens, check=checks.group_tokens)
def tokenize_groups(
    records: Path,
    tokenizer: Path,
    *,
    kind: Literal["preferences", "labelled", "scored"] = "preferences",
    revision: str | None = None,
    out: Path,
) -> None:
    """Tokenize records with completions of a prompt into groups, for preference training.

    Args:
        records: a file or folder of records.
        tokenizer: folder of a tokenizer or model.
        kind: what the records are (`koine.data.group_tokens`).
        revision: turn that asks to improve an answer, for SRPO; None: no revisions.
        out: folder to write to.
    """
    from koine.data import tokenize

    shutil.rmtree(out / "tokens", ignore_errors=True)
    tokenize(records, tokenizer, out=out / "tokens", workers=1, split="all", kind=kind, revision=revision)


@step(version="1", estimate=estimates.reference, check=checks.reference, threads=0)
def cache_reference(
    model: Path,
    tokens: dict[str, Path],
    *,
    mixture: TextMixture,
    dtype: str = "float32",
    out: Path,
) -> None:
    """Compute a reference's log-probabilities of all completions, for any number of trainings.

    Args:
        model: folder of the reference.
        tokens: groups of each source of the mixture, written by `tokenize_groups`.
        mixture: sources and length of a row of the trainings.
        dtype: of the computation, the trainings' own.
        out: folder to write to.
    """
    from koine.data import PreferenceOrder
    from koine.model import load_causal_lm

    keep_freed_memory()
    order = PreferenceOrder(mixture.build(token_folders(tokens), None))
    found = reference_of(load_causal_lm(model), order, out / CACHE, dtype)
    completions = sum(len(values) for values in found.sums.values())
    write_json(out / "metrics.json", {"completions": completions})


@step(version="1", estimate=estimates.alignment, check=checks.alignment, threads=0)
def align_model(
    model: Path,
    tokens: dict[str, Path],
    reference: Path | None = None,
    cache: Path | None = None,
    pairs: Path | None = None,
    prompts: Path | None = None,
    *,
    loss: str,
    mixture: TextMixture,
    settings: TrainSettings,
    monitor: MonitorSettings | None = None,
    stop_on: str = "",
    out: Path,
) -> None:
    """Train a model on preferences, and show what that does to it.

    Args:
        model: folder of the model to train.
        tokens: groups of each source of the mixture, written by `tokenize_groups`.
        reference: folder of the reference; None: the model as it is now.
        cache: output of `cache_reference` for the reference; None: the user's cache.
        pairs: held-out preference records that the monitor scores.
        prompts: records with prompts that the monitor answers; None: those of the pairs.
        loss: such as `dpo:beta=0.1+nll:weight=0.2` (`koine.align.loss_spec`).
        mixture: groups to train on, packed `no_split` or `one_per_row`.
        settings: how to train, and how often to measure (`evaluate_every`).
        monitor: how to measure; None: nothing is measured.
        stop_on: `overoptimisation`, `kl=0.5`, or a metric (`koine.align.stopping`); empty: all steps.
        out: folder to write to.
    """
    from koine.align.stopping import parse_stop_rule
    from koine.train.progress import final_metrics

    keep_freed_memory()
    measured = None
    if monitor is not None:
        measured = make_monitor(monitor, model, reference or model, pairs, prompts, settings, out)
    stop = None
    if stop_on and measured is not None:
        stop = parse_stop_rule(stop_on, measured.names)
    train_on_groups(
        model,
        token_folders(tokens),
        reference=reference or model,
        cache=None if cache is None else cache / CACHE,
        loss=loss,
        mixture=mixture,
        settings=settings,
        evaluate=measured,
        stop=stop,
        out=out,
    )
    write_json(out / "metrics.json", final_metrics(out / "metrics.jsonl"))
    if measured is not None and settings.evaluate_every:
        write_behaviour_report(out, measured.verdict)


def token_folders(tokens: dict[str, Path]) -> dict[str, Path]:
    """Return the token shards in the outputs of steps that tokenize."""
    return {name: path / "tokens" for name, path in tokens.items()}


def reference_of(
    model: LanguageModel, order: PreferenceOrder, cache: Path | None, dtype: str
) -> ReferenceLogProbabilities:
    """Return the reference's log-probabilities of the groups of an order; cache: None: the user's."""
    import torch

    from koine.align.reference import default_cache, reference_log_probabilities
    from koine.hardware import chosen_device, chosen_dtype

    return reference_log_probabilities(
        model,
        order,
        cache=cache or default_cache(),
        dtype=getattr(torch, chosen_dtype(dtype)),
        device=chosen_device("auto"),
    )


def train_on_groups(
    model: Path,
    tokens: dict[str, Path],
    *,
    reference: Path,
    cache: Path | None,
    loss: str,
    mixture: TextMixture,
    settings: TrainSettings,
    evaluate: Evaluate | None,
    stop: StopRule | None = None,
    out: Path,
) -> None:
    """Train on groups of completions; the arguments are those of `align_model`.

    evaluate, stop: as in `koine.train.train`. A loss that needs no reference has one for its figures.
    """
    import torch

    from koine.align import preference_objective
    from koine.data import PreferenceOrder
    from koine.model import load_causal_lm
    from koine.train import train
    from koine.train.tracking.run_logger import logger_from_environment

    order = PreferenceOrder(mixture.build(tokens, None))
    found = reference_of(load_causal_lm(reference), order, cache, settings.dtype)
    train(
        load_causal_lm(model).to(torch.float32),
        preference_objective(loss, found),
        order,
        settings,
        out=out,
        tokenizer=model,
        init_from=model,
        evaluate=evaluate,
        stop=stop,
        logger=logger_from_environment(),
    )


def make_monitor(
    monitor: MonitorSettings,
    model: Path,
    reference: Path,
    pairs: Path | None,
    prompts: Path | None,
    settings: TrainSettings,
    out: Path,
) -> Monitor:
    """Return the monitor of a training; it writes its files to `out`."""
    from koine.align.held_out import encode_pairs, encode_prompts, read_pairs, read_prompts
    from koine.align.monitor import Monitor, installed_identifier
    from koine.generate.sampling import Sampling
    from koine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    held_out = [] if pairs is None else read_pairs(pairs, limit=monitor.limit)
    asked = held_out if prompts is None else read_prompts(prompts, limit=monitor.limit)
    frozen = frozen_model(reference, settings.dtype)
    context = frozen.context_length
    return Monitor(
        tokenizer,
        pairs=encode_pairs(held_out, tokenizer, context=context) if held_out else (),
        prompts=encode_prompts(asked, tokenizer, context=context),
        sampling=Sampling(
            temperature=monitor.temperature,
            top_p=monitor.top_p,
            seed=monitor.seed,
            max_new_tokens=monitor.max_new_tokens,
        ),
        reference=frozen if monitor.kl else None,
        identify=installed_identifier(),
        folder=out,
    )


def frozen_model(path: Path, dtype: str) -> LanguageModel:
    """Return a model that is not trained, in the precision and on the device of the training."""
    import torch

    from koine.hardware import chosen_device, chosen_dtype
    from koine.model import load_causal_lm

    model = load_causal_lm(path).to(chosen_device("auto"), getattr(torch, chosen_dtype(dtype)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def write_behaviour_report(out: Path, judged: Verdict | None) -> None:
    """Write `verdict.json` and the report of what a monitor has written to a folder."""
    from koine.align.behaviour_report import behaviour_blocks
    from koine.align.behaviour_table import SAMPLES, TABLE, read_table

    table = read_table(out / TABLE)
    samples = read_table(out / SAMPLES) if (out / SAMPLES).exists() else []
    write_verdict(out, judged)
    write_step_report(out, "Behaviour during training", behaviour_blocks(table, judged, samples))


def write_verdict(out: Path, judged: Verdict | None) -> None:
    """Write `verdict.json`; null without a verdict."""
    names = ("state", "step", "keep", "languages", "text")
    write_json(
        out / "verdict.json", None if judged is None else {name: getattr(judged, name) for name in names}
    )


@step(version="1", check=checks.watched, threads=0)
def watch_models(
    models: dict[str, Path],
    pairs: Path | None = None,
    prompts: Path | None = None,
    reference: Path | None = None,
    *,
    limit: int | None = 64,
    language: str | None = None,
    temperature: float = 0.5,
    top_p: float = 0.75,
    max_new_tokens: int = 256,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    out: Path,
) -> None:
    """Measure a training's checkpoints: likelihoods, entropy, diversity, KL, by language, and judge them.

    Writes `metrics-behaviour.jsonl`, `metrics-samples.jsonl`, `verdict.json`, `metrics.json`, `report.json`.

    Args:
        models: folders by any name, in the order of the training (`koine.align.watch.steps_of`).
        pairs: held-out preference records; None: no likelihoods.
        prompts: records with prompts to answer; None: those of the pairs.
        reference: model for the KL; None: no KL.
        limit: pairs, and prompts, of each language at most; None: all.
        language: of records that name none.
        temperature, top_p, max_new_tokens, seed: of the answers; the defaults are the paper's.
        device, dtype: of the computation.
        out: folder to write to.
    """
    from koine.align.behaviour_table import TABLE, read_table
    from koine.align.held_out import read_pairs, read_prompts
    from koine.align.monitor import installed_identifier
    from koine.align.watch import watch_models as watch
    from koine.generate.sampling import Sampling
    from koine.hardware import chosen_device

    keep_freed_memory()
    held_out = [] if pairs is None else read_pairs(pairs, limit=limit, language=language)
    asked = held_out if prompts is None else read_prompts(prompts, limit=limit, language=language)
    found = watch(
        list(models.values()),
        pairs=held_out,
        prompts=asked,
        reference=reference,
        identify=installed_identifier(),
        sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens),
        device=chosen_device(device),
        dtype=dtype,
        out=out,
    )
    write_json(out / "metrics.json", read_table(out / TABLE)[-1]["overall"])
    write_behaviour_report(out, found.verdict)


@step(version="1", estimate=estimates.inspected_groups, check=checks.inspected_groups, threads=0)
def inspect_preferences(
    pairs: Path,
    model: Path,
    held_out: Path | None = None,
    *,
    sequence_length: int = 1024,
    limit: int | None = None,
    identify_languages: bool = True,
    out: Path,
) -> None:
    """Inspect groups before a model is trained on them; write `inspection.json` and a report.

    See `koine.align.inspect_pairs.inspect_groups`. The model reads in float32.

    pairs: token shards of groups. held_out: those of another split. limit: most pairs that the model reads.
    """
    import torch

    from koine.align.inspect_pairs import check_tokenizer, inspect_groups, opened_groups
    from koine.align.inspect_report import report_blocks
    from koine.model.causal_lm import load_as_stored
    from koine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    loaded: Any = load_as_stored(model)
    with ExitStack() as stack:
        source = stack.enter_context(opened_groups(pairs, model))
        other = None if held_out is None else stack.enter_context(opened_groups(held_out, model))
        for one in (source, other):
            if one is not None:
                check_tokenizer(one, tokenizer, model)
        inspection = inspect_groups(
            source,
            tokenizer,
            model=loaded.to(torch.float32).eval(),
            held_out=other,
            sequence_length=sequence_length,
            limit=limit,
            identify_languages=identify_languages,
        )
    write_json(out / "inspection.json", inspection.to_json())
    write_step_report(out, "Preference data before training", list(report_blocks(inspection)))


@step(version="1", check=checks.trained_online, threads=0)
def train_online_model(
    model: Path,
    prompts: Path,
    reference: Path | None = None,
    *,
    loss: str,
    reward: str,
    settings: TrainSettings,
    steps: int = 100,
    k: int = 4,
    prompts_per_step: int = 16,
    draw_every: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    out: Path,
) -> None:
    """Train a model on its own completions, which a reward scores; rounds are several such steps.

    Args:
        model: folder of the model.
        prompts: file of prompts, with what the reward reads.
        reference: model of the loss; None: the model itself, before this step.
        loss: of scored completions (`rloo`, `copg`), or of pairs of the best and the worst one (`dpo`, `nll`).
        reward: specification of `koine.align.rewards`, without a judge.
        settings: how to train; the seed is also that of the completions.
        steps: of the training.
        k: completions of each prompt.
        prompts_per_step: prompts of a step.
        draw_every: steps between two draws.
        temperature, max_new_tokens: of the completions.
        out: folder to write to.
    """
    from koine.align.loss_spec import LossSpec
    from koine.align.online import ROLLOUTS, OnlineSettings, summary_of, train_online
    from koine.align.prompts import read_prompts
    from koine.align.rewards import RewardSpec
    from koine.generate.sampling import Sampling
    from koine.tokenizer import load_tokenizer
    from koine.train.progress import final_metrics

    keep_freed_memory()
    spec, tokenizer = LossSpec.parse(loss), load_tokenizer(model)
    train_online(
        model,
        read_prompts(prompts, tokenizer),
        RewardSpec.parse(reward).build(),
        reward_name=reward,
        online=OnlineSettings(
            loss=spec,
            k=k,
            prompts=prompts_per_step,
            steps=steps,
            draw_every=draw_every,
            sampling=Sampling(temperature=temperature, max_new_tokens=max_new_tokens),
        ),
        settings=settings,
        tokenizer=tokenizer,
        out=out,
        reference=(reference or "start") if spec.needs_reference else "none",
    )
    write_json(out / "metrics.json", {**final_metrics(out / "metrics.jsonl"), **summary_of(out / ROLLOUTS)})
