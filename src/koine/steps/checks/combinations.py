"""Checks of the steps that make models from models: copies, merges, mixtures, added experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.errors import UserError, did_you_mean
from koine.model.config import MixtureConfig
from koine.plan import PlannedInput
from koine.steps.checks.messages import surprise, with_settings
from koine.steps.facts import (
    ModelFacts,
    dense_model,
    model_facts,
    own_model,
)

if TYPE_CHECKING:
    pass


def copied(model: PlannedInput, **_: Any) -> ModelFacts | None:
    """Hand on what is known of a model that is copied."""
    return model_facts(model)


def combined(
    seed_model: PlannedInput,
    experts: Mapping[str, PlannedInput],
    corpora: Mapping[str, PlannedInput],
    *,
    method: str,
    top_k: int | None,
    attention_top_k: int,
    encoder: str,
    domain_size: int,
    seed_copies: int = 0,
    **_: Any,
) -> ModelFacts | None:
    """Check that the branches are dense models of one shape, and that the mixture can be made of them."""
    from koine.combine.moe.branches import check_other_shapes
    from koine.combine.moe.upcycle import default_top_k
    from koine.model.formats.config_json import model_type
    from koine.steps.combination import METHODS

    if method not in METHODS:
        raise UserError(f"method is '{method}'", hint=did_you_mean(method, METHODS))
    if method == "nexus" and encoder not in ("tfidf", "svd", "hidden") and not Path(encoder).is_dir():
        raise UserError(
            f"encoder is '{encoder}'",
            hint="possible are: tfidf, svd, hidden, or the folder of a sentence model",
        )
    root = dense_model(seed_model)
    for planned in experts.values():
        branch = dense_model(planned)
        if root is not None and branch is not None:
            check_other_shapes(root, branch, planned.path, than=seed_model.path)
    mixture = combined_mixture(method, tuple(experts), top_k or 1, attention_top_k, domain_size, seed_copies)
    if root is not None and mixture is not None and top_k is None:
        mixture = replace(mixture, top_k=default_top_k(root, mixture))
    if attention_top_k and not method.startswith("bam"):
        surprise(
            f"attention_top_k is {attention_top_k}, and only bam has attention experts (method={method})"
        )
    if root is None:
        return None
    config = replace(root, mixture=mixture)
    return ModelFacts(model_type=model_type(config), config=config, vocab_size=known_size(seed_model))


def combined_mixture(
    method: str,
    names: tuple[str, ...],
    top_k: int,
    attention_top_k: int,
    domain_size: int,
    seed_copies: int,
) -> MixtureConfig | None:
    """Return the mixture that a method makes of branches; None for an average.

    Raises `UserError` where more experts are chosen than there are.
    """
    if method == "average":
        return None
    if method.startswith("nexus"):
        return MixtureConfig(
            experts=names,
            top_k=top_k,
            shared_expert=True,
            domain_size=domain_size if method == "nexus" else None,
        )
    if method.startswith("bam"):
        return MixtureConfig(
            experts=("seed", *names),
            top_k=top_k,
            attention="kv-experts" if method == "bam" else "shared-kv",
            attention_top_k=attention_top_k or None,
        )
    copies = tuple(f"seed-{number}" for number in range(2, seed_copies + 2))
    return MixtureConfig(experts=("seed", *names, *copies), top_k=top_k)


def known_size(planned: PlannedInput) -> int | None:
    """Return the number of ids of a model's tokenizer; None where unknown."""
    facts = model_facts(planned)
    return None if facts is None else facts.vocab_size


def merged(
    models: list[PlannedInput],
    base: PlannedInput | None = None,
    *,
    method: str,
    weights: tuple[float, ...],
    seed: int,
    options: tuple[str, ...] = (),
    **_: Any,
) -> ModelFacts | None:
    """Plan the merge where all models are there, which checks that they fit; else its configuration alone."""
    from koine.combine.merging.config import MergeConfig, check_config
    from koine.combine.merging.methods import find_method
    from koine.combine.merging.plan import plan_merge

    given = [*models, *([] if base is None else [base])]
    facts = [model_facts(one) for one in given]
    config = MergeConfig(
        method=method,
        models=tuple(one.path for one in models),
        base=None if base is None else base.path,
        weights=weights,
        options=find_method(method).parse_options(options),
        seed=seed,
    )
    try:
        if all(one.exists for one in given):
            plan_merge(config).close()
        else:
            check_config(config)
    except UserError as error:
        raise with_settings(error) from None
    return facts[0]


def grown(
    model: PlannedInput, expert: PlannedInput, corpus: PlannedInput, *, domain: str, **_: Any
) -> ModelFacts | None:
    """Check that a dense branch of the same shape can become one more expert of a mixture."""
    from koine.combine.moe.branches import check_other_shapes
    from koine.model.formats.config_json import model_type

    config, branch = own_model(model), dense_model(expert)
    if config is None:
        return None
    if config.mixture is None:
        raise UserError("is a dense model", where=model.path, hint="give a mixture of experts")
    if domain in config.mixture.experts:
        raise UserError(f"has an expert '{domain}' already", where=model.path, hint="choose another name")
    if branch is not None:
        check_other_shapes(config, branch, expert.path, than=model.path)
    larger = replace(config, mixture=replace(config.mixture, experts=(*config.mixture.experts, domain)))
    return ModelFacts(model_type=model_type(larger), config=larger, vocab_size=known_size(model))
