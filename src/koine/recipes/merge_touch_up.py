"""Merge models, then train the merged model a little at a low learning rate (arXiv 2504.00698)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from koine.errors import UserError
from koine.hardware import chosen_dtype
from koine.hub import model_folder
from koine.plan import Parameter, Plan
from koine.recipes.closings import trained_model
from koine.recipes.domains import add_comparison, add_domains, named_paths
from koine.recipes.parameters import (
    BatchSize,
    DomainPaths,
    DType,
    EvaluationDocuments,
    FieldNames,
    FormatName,
    HeldoutBytes,
    MaxBadShare,
    MaxBytes,
    MicroBatchSize,
    Seed,
    SequenceLength,
)
from koine.steps.combination import merge_models
from koine.steps.text_mixture import domain_sources, equal_shares
from koine.steps.trainer import Trainer

METHODS = ("linear", "task-arithmetic", "ties", "dare-linear", "dare-ties")
"""The merge methods that take one weight per model."""


def merge_touch_up(
    plan: Plan,
    *,
    models: Annotated[tuple[Path, ...], Parameter("Folders of the models to merge.")],
    domains: DomainPaths,
    weights: Annotated[
        tuple[float, ...], Parameter("Weight of each model; empty: equal weights.", unit="one per model")
    ] = (),
    method: Annotated[str, Parameter("Merge method.", choices=METHODS)] = "linear",
    base: Annotated[
        Path | None, Parameter("Folder of the models' common ancestor, where the method needs it.")
    ] = None,
    fields: FieldNames = (),
    format: FormatName = "",
    steps: Annotated[int, Parameter("Training steps after the merge.", unit="steps", low=1)] = 100,
    learning_rate: Annotated[
        float,
        Parameter(
            "Peak learning rate, ten to twenty times lower than in the models' own training.",
            above=0,
            high=1e3,
        ),
    ] = 3e-5,
    sequence_length: SequenceLength = 256,
    batch_size: BatchSize = 16,
    micro_batch_size: MicroBatchSize = 8,
    dtype: DType = "auto",
    max_bytes: MaxBytes = 20_000_000,
    heldout_bytes: HeldoutBytes = 200_000,
    evaluation_documents: EvaluationDocuments = 40,
    max_bad_share: MaxBadShare = 0.01,
    seed: Seed = 0,
) -> None:
    """Merge models, then train the result a little on text of each domain; evaluate it before and after."""
    # One step follows another, so that each may use more cores.
    plan.threads = plan.threads or 2
    if len(models) < 2:
        raise UserError(f"{len(models)} models are given", hint="give at least two: --set models=A,B")
    named = named_paths(domains)
    if not named:
        raise UserError("no domain is given", hint="for example --set domains=code=A,law=B")
    given = [plan.input(model_folder(path), name=f"given/{index}") for index, path in enumerate(models)]
    corpora, tokens = add_domains(
        plan,
        named,
        given[0],
        fields=fields,
        record_format=format,
        max_bytes=max_bytes,
        heldout_bytes=heldout_bytes,
        max_bad_share=max_bad_share,
        seed=seed,
    )
    merged = plan.step(
        merge_models,
        name="merged",
        models=given,
        base=None if base is None else plan.input(model_folder(base), name="base"),
        method=method,
        weights=weights or (1.0 / len(models),) * len(models),
        seed=seed,
    )
    trainer = Trainer(
        plan=plan,
        sequence_length=sequence_length,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        dtype=chosen_dtype(dtype),
        seed=seed,
    )
    model = trainer.train(
        "model",
        merged,
        tokens,
        domain_sources(equal_shares(list(named))),
        steps=steps,
        learning_rate=learning_rate,
    )
    compared = {
        **{f"model-{index}": one for index, one in enumerate(given)},
        "merged": merged,
        "touched-up": model,
    }
    add_comparison(plan, compared, corpora, evaluation_documents)
    plan.closing(lambda run: trained_model(run, "bits per byte before and after", "model"))
