"""Adapt your model to languages that it does not know yet, with its own tokenizer or another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from koine.data.hub_data import dataset_folder
from koine.errors import UserError
from koine.hardware import chosen_dtype
from koine.hub import TOKENIZER, model_folder
from koine.languages import language
from koine.plan import Artifact, Parameter, Plan
from koine.recipes.closings import trained_model
from koine.recipes.parameters import (
    BatchSize,
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
    SequenceLength,
)
from koine.steps.corpora import own_corpus
from koine.steps.evaluation import evaluate_model
from koine.steps.text_mixture import adaptation_sources
from koine.steps.tokenizers import move_to_tokenizer, tokenize_part
from koine.steps.trainer import Trainer
from koine.steps.training import HeldOutProbe
from koine.tokenizer.embedding_init import METHODS

REGIMES = ("continued", "targeted")
EVALUATION_BYTES = 4_000
"""Length to which a held-out document is cut, in the training's evaluations and in those after it."""


def adaptation(
    plan: Plan,
    *,
    model: ModelFolder,
    data: DataPath,
    primary_languages: Annotated[tuple[str, ...], Parameter("Languages that the model knows already.")],
    languages: Languages = (),
    fields: FieldNames = (),
    format: FormatName = "",
    regime: Annotated[
        str,
        Parameter(
            "continued: the other languages with a share of the primary ones; targeted: `targets` alone.",
            choices=REGIMES,
        ),
    ] = "continued",
    learn_from: Annotated[
        str, Parameter("Documents, or chats (records with messages).", choices=("text", "chats"))
    ] = "text",
    targets: Annotated[
        tuple[str, ...], Parameter("Languages to adapt to; empty: all that are not primary.")
    ] = (),
    primary_share: Annotated[
        float, Parameter("Share of the primary languages in `continued`.", low=0, below=1)
    ] = 0.2,
    tokenizer: Annotated[
        Path | None, Parameter("Folder of a tokenizer to move the model to first; none: keep its own.")
    ] = None,
    init: Annotated[
        str, Parameter("Initialisation of the new tokenizer's embeddings.", choices=METHODS)
    ] = "subword-mean",
    steps: Annotated[int, Parameter("Training steps.", unit="steps", low=1)] = 500,
    sequence_length: SequenceLength = 512,
    batch_size: BatchSize = 8,
    micro_batch_size: MicroBatchSize = 4,
    learning_rate: LearningRate = 5e-4,
    dtype: DType = "auto",
    evaluations: Annotated[int, Parameter("Evaluations during the training.", low=1)] = 10,
    evaluation_documents: EvaluationDocuments = 8,
    max_bytes_per_language: MaxBytesPerLanguage = 2_000_000,
    min_bytes_per_language: MinBytesPerLanguage = 20_000,
    max_bad_share: MaxBadShare = 0.01,
    seed: Seed = 0,
) -> None:
    """Adapt a model to new languages, and measure what each language gains and loses on the way."""
    # One step follows another, so that each may use more cores.
    plan.threads = plan.threads or 2
    if not primary_languages:
        raise UserError(
            "which languages does the model serve already?", hint="--set primary_languages=CODE,CODE"
        )
    corpus = plan.step(
        own_corpus,
        name="corpus",
        data=plan.input(dataset_folder(data), name="data"),
        fields=fields,
        record_format=format,
        languages=languages,
        primary_cluster="none",
        primary_languages=primary_languages,
        max_bytes_per_language=max_bytes_per_language,
        heldout_bytes_per_language=max(10_000, max_bytes_per_language // 10),
        heldout_share=0.05,
        min_bytes_per_language=min_bytes_per_language,
        max_bad_share=max_bad_share,
        questions_per_language=100,
        seed=seed,
    )
    given = start = plan.input(model_folder(model), name="model-given")
    if tokenizer is not None:
        start = plan.step(
            move_to_tokenizer,
            name="moved",
            model=given,
            tokenizer=plan.input(model_folder(tokenizer, TOKENIZER), name="tokenizer-given"),
            corpus=corpus,
            method=init,
            languages=tuple(language(code).code for code in languages),
            seed=seed,
        )
    chats = learn_from == "chats"
    tokens = plan.step(
        tokenize_part,
        name="tokens",
        corpus=corpus,
        tokenizer=start,
        part="questions/train" if chats else "documents",
        domain="chats" if chats else "documents",
    )
    adapted_languages = tuple(language(code).code for code in targets)
    trainer = Trainer(
        plan=plan,
        sequence_length=sequence_length,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        dtype=chosen_dtype(dtype),
        seed=seed,
    )
    adapted = trainer.train(
        "model",
        start,
        tokens,
        adaptation_sources(adapted_languages, primary_share if regime == "continued" else 0.0),
        steps=steps,
        learning_rate=learning_rate,
        settings={"schedule": "constant", "evaluate_every": max(1, steps // evaluations)},
        packing="no_split" if chats else "concat",
        objective="fine-tuning" if chats else "language-modelling",
        corpus=corpus,
        probe=HeldOutProbe(
            groups={"primary": ("primary",), "adapted": adapted_languages or ("expanded",)},
            documents=evaluation_documents,
            max_bytes=EVALUATION_BYTES,
            track_languages=True,
        ),
    )
    _evaluate(plan, corpus, {"given": given, "adapted": adapted}, evaluation_documents, seed)
    plan.closing(lambda run: trained_model(run, "what each language gained and lost", "model"))


def _evaluate(plan: Plan, corpus: Artifact, models: dict[str, Artifact], documents: int, seed: int) -> None:
    """Add the evaluation of each model."""
    for name, model in models.items():
        plan.step(
            evaluate_model,
            name=f"evaluation/{name}",
            corpus=corpus,
            model=model,
            documents_per_language=documents,
            questions_per_language=0,
            max_document_bytes=EVALUATION_BYTES,
            seed=seed,
        )
