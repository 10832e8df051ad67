"""Give a model a longer context in stages, as in Command A's cooldown: long batches among short ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from koine.data.hub_data import dataset_folder
from koine.errors import UserError
from koine.hardware import chosen_dtype
from koine.hub import model_folder
from koine.model.layer_patterns import VARIANTS
from koine.plan import Artifact, Parameter, Plan
from koine.recipes.closings import trained_model
from koine.recipes.parameters import (
    DataPath,
    DType,
    EvaluationDocuments,
    FieldNames,
    FormatName,
    Languages,
    LearningRate,
    MaxBadShare,
    MaxBytesPerLanguage,
    MicroBatchSize,
    MinBytesPerLanguage,
    ModelFolder,
    Seed,
)
from koine.steps.attention import put_attention
from koine.steps.comparison import compare_lengths
from koine.steps.corpora import text_corpus
from koine.steps.evaluation import evaluate_lengths
from koine.steps.text_mixture import LongText, TextSource
from koine.steps.tokenizers import tokenize_part
from koine.steps.trainer import Trainer


def extend(
    plan: Plan,
    *,
    model: ModelFolder,
    data: DataPath,
    long_data: Annotated[
        Path | None, Parameter("Text for the long rows, where `data` has too few long documents.")
    ] = None,
    fields: FieldNames = (),
    format: FormatName = "",
    languages: Languages = (),
    lengths: Annotated[
        tuple[int, ...], Parameter("Row length of each stage, growing.", unit="tokens", low=2)
    ] = (512, 2048, 8192),
    steps: Annotated[
        tuple[int, ...],
        Parameter("Training steps of each stage, one number per length.", unit="steps", low=1),
    ] = (300, 100, 50),
    thetas: Annotated[
        tuple[float, ...],
        Parameter("Base of the rotary embedding in each stage; empty: the model's own.", above=0),
    ] = (),
    attention: Annotated[
        str,
        Parameter("Attention variant to put on the model first; empty: its own.", choices=("", *VARIANTS)),
    ] = "",
    window: Annotated[int, Parameter("Window of rnope-swa; 0: the model's own.", unit="tokens", low=0)] = 0,
    full_every: Annotated[
        int,
        Parameter("Of rnope-swa: every how many layers one is full; 0: 4.", unit="layers", low=0),
    ] = 0,
    long_every: Annotated[
        int,
        Parameter("Every how many steps one has rows of the stage's length; 1: all.", unit="steps", low=1),
    ] = 4,
    long_share_of_length: Annotated[
        float,
        Parameter("A long row's documents fill at least this share of the stage's length.", low=0, high=1),
    ] = 0.5,
    batch_size: Annotated[
        int,
        Parameter(
            "Rows of the first length in a step; a step of long rows has as many tokens.", unit="rows", low=1
        ),
    ] = 8,
    micro_batch_size: MicroBatchSize = 4,
    learning_rate: LearningRate = 5e-4,
    final_rate_share: Annotated[
        float,
        Parameter("Learning rate at the end, as a share of the peak; linear over all stages.", low=0, high=1),
    ] = 0.1,
    dtype: DType = "auto",
    evaluation_documents: EvaluationDocuments = 8,
    max_bytes_per_language: MaxBytesPerLanguage = 20_000_000,
    min_bytes_per_language: MinBytesPerLanguage = 20_000,
    max_bad_share: MaxBadShare = 0.01,
    seed: Seed = 0,
) -> None:
    """Train a model further in stages of growing length; bits per byte at each length after each stage.

    The first stage has rows of the first length alone. In each later one every `long_every`-th step has
    rows of the stage's length, and the others of the first length. With `attention`, the model has that
    variant from the beginning: the stages heal it.
    """
    # One step follows another, so that each may use more cores.
    plan.threads = plan.threads or 2
    _check_stages(lengths, steps, thetas)
    given = plan.input(model_folder(model), name="model-given")
    if not attention and (window or full_every):
        raise UserError(
            "a window or a ratio of full layers without attention", hint="set attention=rnope-swa"
        )

    def corpus_of(path: Path, suffix: str) -> tuple[Artifact, Artifact]:
        corpus = plan.step(
            text_corpus,
            name=f"corpus{suffix}",
            data=plan.input(dataset_folder(path), name=f"corpus{suffix}-given"),
            fields=fields,
            record_format=format,
            languages=languages,
            max_bytes_per_language=max_bytes_per_language,
            min_bytes_per_language=min_bytes_per_language,
            max_bad_share=max_bad_share,
        )
        tokens = plan.step(
            tokenize_part,
            name=f"tokens{suffix}",
            corpus=corpus,
            tokenizer=given,
            part="documents",
            domain="documents",
        )
        return corpus, tokens

    corpus, tokens = corpus_of(data, "")
    long_corpus, long_tokens = (corpus, tokens) if long_data is None else corpus_of(long_data, "-long")
    trainer = Trainer(
        plan=plan,
        sequence_length=lengths[0],
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        dtype=chosen_dtype(dtype),
        seed=seed,
    )
    stages: dict[str, Artifact] = {"given": given}
    if attention:
        stages["changed"] = plan.step(
            put_attention,
            name="stage/changed",
            model=given,
            attention=attention,
            window=window,
            full_every=full_every,
        )
    total, done = sum(steps), 0
    for index, (length, count) in enumerate(zip(lengths, steps, strict=True)):
        rates = [learning_rate * _rate_factor(at / total, final_rate_share) for at in (done, done + count)]
        shortest = max(1, int(length * long_share_of_length))
        stages[str(length)] = trainer.train(
            "model" if index == len(lengths) - 1 else f"stage/{length}",
            list(stages.values())[-1],
            {"text": tokens, "long": long_tokens},
            (TextSource(name="text"),),
            long=LongText(
                every=long_every, sequence_length=length, source=TextSource(name="long", min_tokens=shortest)
            )
            if index
            else None,
            tokenizer=given,
            steps=count,
            learning_rate=rates[0],
            settings={
                "schedule": "linear",
                "min_lr_ratio": rates[1] / rates[0],
                "warmup_steps": 0 if index else max(1, count // 20),
                "gradient_checkpointing": index > 0,
                # The documents come in another order in each stage.
                "seed": seed + index,
            },
            context_length=length,
            rope_theta=thetas[index] if thetas else 0.0,
        )
        done += count
    evaluations = {
        name: plan.step(
            evaluate_lengths,
            name=f"evaluation/{name}",
            corpus=long_corpus,
            model=stage,
            lengths=lengths,
            documents=evaluation_documents,
            seed=seed,
        )
        for name, stage in stages.items()
    }
    comparison = plan.step(compare_lengths, name="comparison", evaluations=evaluations, lengths=lengths)
    plan.export(comparison / "results.json", "results.json")
    plan.closing(lambda run: trained_model(run, "bits per byte at each length and stage", "model"))


def _rate_factor(progress: float, final_share: float) -> float:
    """Return the learning rate's factor, linear from 1 to `final_share`."""
    return 1.0 - (1.0 - final_share) * progress


def _check_stages(lengths: tuple[int, ...], steps: tuple[int, ...], thetas: tuple[float, ...]) -> None:
    """Raise `UserError` unless the lengths grow, and each has its number of steps (and its theta)."""
    if not lengths or any(b <= a for a, b in zip(lengths, lengths[1:], strict=False)):
        raise UserError(f"the lengths are {lengths}", hint="each must be longer than the one before it")
    if len(steps) != len(lengths):
        raise UserError(
            f"{len(steps)} numbers of steps for {len(lengths)} lengths",
            hint="give one a length, for example --set steps=300,100,50",
        )
    if thetas and len(thetas) != len(lengths):
        raise UserError(f"{len(thetas)} thetas for {len(lengths)} lengths", hint="give one a length, or none")
