"""Branch, train, mix: train one expert per domain from a seed model and combine them in one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from koine.errors import UserError
from koine.hardware import chosen_dtype
from koine.hub import model_folder
from koine.plan import Artifact, Parameter, Plan
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
    LearningRate,
    MaxBadShare,
    MaxBytes,
    MicroBatchSize,
    ModelFolder,
    Seed,
    SequenceLength,
)
from koine.steps.combination import METHODS, add_domain_expert, combine_branches
from koine.steps.text_mixture import domain_sources, equal_shares
from koine.steps.trainer import Trainer

GENERAL = "general"


def branch_train_mix(
    plan: Plan,
    *,
    seed_model: ModelFolder,
    domains: DomainPaths,
    general: Annotated[
        Path | None,
        Parameter("Text like that of the seed model's own training; one more domain of the mixture."),
    ] = None,
    new_domain: Annotated[
        str, Parameter("NAME=PATH of a domain whose expert is added to the finished mixture.")
    ] = "",
    method: Annotated[
        str, Parameter("How the experts are combined; average: one dense model.", choices=METHODS)
    ] = "nexus",
    fields: FieldNames = (),
    format: FormatName = "",
    branch_steps: Annotated[int, Parameter("Training steps of each expert.", unit="steps", low=1)] = 400,
    mixture_steps: Annotated[int, Parameter("Training steps of the mixture.", unit="steps", low=1)] = 400,
    extension_steps: Annotated[
        int, Parameter("Training steps after the new domain's expert was added.", unit="steps", low=1)
    ] = 100,
    sequence_length: SequenceLength = 256,
    batch_size: BatchSize = 16,
    micro_batch_size: MicroBatchSize = 8,
    branch_learning_rate: LearningRate = 5e-4,
    mixture_learning_rate: LearningRate = 1e-3,
    general_share: Annotated[
        float, Parameter("Share of the general text in the training of an expert.", low=0, below=1)
    ] = 0.1,
    top_k: Annotated[
        int | None,
        Parameter(
            "Experts of each token; none: 1, or 2 for Gemma and OLMo-2, whose norms cancel a single gate.",
            unit="experts",
            low=1,
        ),
    ] = None,
    attention_top_k: Annotated[
        int, Parameter("Attention experts of each token (bam); 0: soft routing.", unit="experts", low=0)
    ] = 0,
    encoder: Annotated[
        str,
        Parameter("Encoder of Nexus's domain embeddings: tfidf, svd, hidden, or a sentence model's folder."),
    ] = "tfidf",
    domain_size: Annotated[
        int, Parameter("Size of a domain embedding (tfidf, svd).", unit="dimensions", low=1)
    ] = 32,
    load_balancing: Annotated[
        float | None, Parameter("Factor of the load-balancing loss; none: the method's own.", low=0)
    ] = None,
    z_loss: Annotated[
        float | None, Parameter("Factor of the router's z-loss; none: the method's own.", low=0)
    ] = None,
    dtype: DType = "auto",
    max_bytes: MaxBytes = 20_000_000,
    heldout_bytes: HeldoutBytes = 200_000,
    evaluation_documents: EvaluationDocuments = 40,
    max_bad_share: MaxBadShare = 0.01,
    seed: Seed = 0,
) -> None:
    """Train an expert per domain from a seed model, combine them, and train the mixture on all domains.

    With `new_domain`, an expert of one more domain is then added to the mixture, without starting again.
    """
    named, added = _domains(domains, new_domain, method)
    given = plan.input(model_folder(seed_model), name="seed-given")
    paths = {**named, **added, **({} if general is None else {GENERAL: general})}
    corpora, tokens = add_domains(
        plan,
        paths,
        given,
        fields=fields,
        record_format=format,
        max_bytes=max_bytes,
        heldout_bytes=heldout_bytes,
        max_bad_share=max_bad_share,
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
    general_part = {} if general is None else {GENERAL: general_share}

    def branch(name: str) -> Artifact:
        return trainer.train(
            f"expert/{name}",
            given,
            tokens,
            domain_sources(equal_shares([name], general_part)),
            steps=branch_steps,
            learning_rate=branch_learning_rate,
        )

    experts = {name: branch(name) for name in named}
    mixed = plan.step(
        combine_branches,
        name="mixed",
        seed_model=given,
        experts=experts,
        corpora={name: corpora[name] for name in named},
        method=method,
        top_k=top_k,
        attention_top_k=attention_top_k,
        encoder=encoder,
        domain_size=domain_size,
        load_balancing=load_balancing,
        z_loss=z_loss,
        seed=seed,
    )
    # The mixture is trained on equal parts of every domain, the general one included.
    known = [*named, *general_part]
    model = trainer.train(
        "model",
        mixed,
        tokens,
        domain_sources(equal_shares(known)),
        steps=mixture_steps,
        learning_rate=mixture_learning_rate,
    )
    models = {"seed": given, **{f"expert-{name}": one for name, one in experts.items()}}
    models |= {"mixed": mixed, "model": model}
    for name in added:
        expert = branch(name)
        grown = plan.step(
            add_domain_expert,
            name="grown",
            model=model,
            expert=expert,
            corpus=corpora[name],
            domain=name,
            reset_router=method != "nexus",
            seed=seed,
        )
        # Half of the text is of the new domain.
        shares = {name: 0.5, **dict.fromkeys(known, 0.5 / len(known))}
        extended = trainer.train(
            "extended",
            grown,
            tokens,
            domain_sources(shares),
            steps=extension_steps,
            learning_rate=mixture_learning_rate * 0.1,
            settings={"min_lr_ratio": 1.0},
        )
        models |= {f"expert-{name}": expert, "grown": grown, "extended": extended}
    add_comparison(plan, models, corpora, evaluation_documents)
    final = "extended" if added else "model"
    plan.closing(lambda run: trained_model(run, "bits per byte and routing by domain", final))


def _domains(
    domains: tuple[str, ...], new_domain: str, method: str
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the paths of the domains and of the new one; raises `UserError` if they do not fit together."""
    named, added = named_paths(domains), named_paths([new_domain] if new_domain else [])
    if len(named) < 2:
        raise UserError(
            f"{len(named)} domains are given", hint="give at least two: --set domains=code=DATA,law=DATA"
        )
    if named.keys() & added.keys() or GENERAL in {*named, *added}:
        raise UserError("two domains have one name", hint="name each differently, and none 'general'")
    if added and method == "average":
        raise UserError("an average has no experts to add to", hint="choose another method, or merge instead")
    return named, added
