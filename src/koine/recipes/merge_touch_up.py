"""Merge models, then train the merge a little at a low learning rate; measured before and after, beside the models (arXiv 2504.00698)."""

from __future__ import annotations

from pathlib import Path

from koine.errors import UserError
from koine.hardware import chosen_dtype
from koine.plan import Artifact, Plan
from koine.recipes.branch_train_mix import named_path
from koine.steps.domain_corpora import domain_text, tokenize_domain
from koine.steps.mixtures import (
    compare_domains,
    equal_shares,
    evaluate_domains,
    merge_models,
    train_on,
)


def merge_touch_up(
    plan: Plan,
    *,
    models: tuple[Path, ...],
    domains: tuple[str, ...],
    weights: tuple[float, ...] = (),
    method: str = "linear",
    base: Path | None = None,
    fields: tuple[str, ...] = (),
    steps: int = 100,
    learning_rate: float = 3e-5,
    sequence_length: int = 256,
    batch_size: int = 16,
    micro_batch_size: int = 8,
    dtype: str = "auto",
    max_bytes: int = 20_000_000,
    heldout_bytes: int = 200_000,
    evaluation_documents: int = 40,
    max_bad_share: float = 0.01,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Directories of our models, and text of each domain as NAME=PATH. `weights`: one a model (default: equal); `method`: one that takes weights; `base`: the
    common ancestor, where the method needs it. The learning rate should be ten to twenty times lower than the models' own."""
    dtype = chosen_dtype(dtype)
    if len(models) < 2:
        raise UserError(f"{len(models)} models are given", hint="give at least two: --set models=A,B")
    named = dict(named_path(one) for one in domains)
    if not named or len(named) < len(domains):
        raise UserError("the domains need different names", hint="for example --set domains=code=A,law=B")
    given = {f"given/{index}": plan.input(path, name=f"given/{index}") for index, path in enumerate(models)}
    first = given["given/0"]
    corpora: dict[str, Artifact] = {}
    tokens: dict[str, Artifact] = {}
    for name, path in named.items():
        corpora[name] = plan.step(
            domain_text,
            name=f"text/{name}",
            data=plan.input(path, name=f"data/{name}"),
            domain=name,
            fields=fields,
            max_bytes=max_bytes,
            heldout_bytes=heldout_bytes,
            max_bad_share=max_bad_share,
            seed=seed,
        )
        tokens[name] = plan.step(
            tokenize_domain, name=f"tokens/{name}", corpus=corpora[name], tokenizer=first, domain=name
        )
    merged = plan.step(
        merge_models,
        name="merged",
        models=list(given.values()),
        base=None if base is None else plan.input(base, name="base"),
        method=method,
        weights=weights or (1.0 / len(models),) * len(models),
        seed=seed,
    )
    model = plan.step(
        train_on,
        name="model",
        model=merged,
        tokens=tokens,
        shares=tuple(equal_shares(len(named))),
        steps=steps,
        sequence_length=sequence_length,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=learning_rate,
        min_rate_share=0.1,
        dtype=dtype,
        seed=seed,
        threads=threads,
    )
    evaluated = {
        **{f"model-{index}": one for index, one in enumerate(given.values())},
        "merged": merged,
        "touched-up": model,
    }
    evaluations = {
        name: plan.step(
            evaluate_domains,
            name=f"evaluation/{name}",
            model=one,
            corpora=corpora,
            documents=evaluation_documents,
            characters=4_000,
            threads=threads,
        )
        for name, one in evaluated.items()
    }
    comparison = plan.step(compare_domains, name="comparison", evaluations=evaluations)
    plan.export(comparison / "results.json", "results.json")
    plan.closing(
        f"Bits per byte before and after: {plan.folder / 'report.html'}. The model: {plan.folder / 'model'}"
    )
