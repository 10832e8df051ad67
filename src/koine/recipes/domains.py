"""Parts that the recipes on domains share: text and tokens of each domain, and the comparison of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from koine.data.hub_data import dataset_folder
from koine.errors import UserError
from koine.plan import Artifact, Plan
from koine.steps.comparison import compare_domains
from koine.steps.domain_corpora import domain_text, tokenize_domain
from koine.steps.evaluation import evaluate_domains

EXAMPLE = "for example --set domains=code=code.jsonl,law=law.jsonl"


def named_paths(texts: Sequence[str]) -> dict[str, Path]:
    """Return `NAME=PATH` entries as a dict; raises `UserError` for another form or a repeated name."""
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise UserError(f"'{text}' is not NAME=PATH", hint=EXAMPLE)
        if name in found:
            raise UserError(f"two domains have the name '{name}'", hint="name each differently")
        found[name] = Path(path)
    return found


def add_domains(
    plan: Plan, paths: Mapping[str, Path], tokenizer: Artifact, **options: Any
) -> tuple[dict[str, Artifact], dict[str, Artifact]]:
    """Add the text and the tokens of each domain to a plan; return both by domain.

    options: parameters of `koine.steps.domain_corpora.domain_text`.
    """
    corpora = {
        name: plan.step(
            domain_text,
            name=f"text/{name}",
            data=plan.input(dataset_folder(path), name=f"data/{name}"),
            domain=name,
            **options,
        )
        for name, path in paths.items()
    }
    tokens = {
        name: plan.step(
            tokenize_domain, name=f"tokens/{name}", corpus=corpus, tokenizer=tokenizer, domain=name
        )
        for name, corpus in corpora.items()
    }
    return corpora, tokens


def add_comparison(
    plan: Plan, models: Mapping[str, Artifact], corpora: Mapping[str, Artifact], documents: int
) -> None:
    """Add the evaluation of each model on all domains, and the comparison; export `results.json`."""
    evaluations = {
        name: plan.step(
            evaluate_domains,
            name=f"evaluation/{name}",
            model=model,
            corpora=dict(corpora),
            documents=documents,
            characters=4_000,
        )
        for name, model in models.items()
    }
    comparison = plan.step(compare_domains, name="comparison", evaluations=evaluations)
    plan.export(comparison / "results.json", "results.json")
