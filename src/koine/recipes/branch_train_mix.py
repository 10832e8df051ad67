"""Branch, train, mix: experts of several domains from one seed, made one model; and one more domain later."""

from __future__ import annotations

from pathlib import Path

from koine.errors import UserError, did_you_mean
from koine.hardware import chosen_dtype
from koine.plan import Artifact, Plan
from koine.steps.domain_corpora import domain_text, tokenize_domain
from koine.steps.mixtures import (
    METHODS,
    compare_domains,
    equal_shares,
    evaluate_domains,
    grow,
    mix,
    train_on,
)


def branch_train_mix(
    plan: Plan,
    *,
    seed_model: Path,
    domains: tuple[str, ...],
    general: Path | None = None,
    new_domain: str = "",
    method: str = "nexus",
    fields: tuple[str, ...] = (),
    branch_steps: int = 400,
    mixture_steps: int = 400,
    extension_steps: int = 100,
    sequence_length: int = 256,
    batch_size: int = 16,
    micro_batch_size: int = 8,
    branch_learning_rate: float = 5e-4,
    mixture_learning_rate: float = 1e-3,
    general_share: float = 0.1,
    top_k: int = 1,
    attention_top_k: int = 0,
    encoder: str = "tfidf",
    domain_size: int = 32,
    load_balancing: float | None = None,
    z_loss: float | None = None,
    dtype: str = "auto",
    max_bytes: int = 20_000_000,
    heldout_bytes: int = 200_000,
    evaluation_documents: int = 40,
    max_bad_share: float = 0.01,
    threads: int = 1,
    seed: int = 0,
) -> None:
    """A directory of our model, and text of each domain as NAME=PATH: an expert a domain, side by side, mixed and trained on all of them.

    general: text like that of the seed's own training; `general_share` of each training is of it, and the mixture has it as one more domain.
    new_domain: NAME=PATH of one more, whose expert is added to the finished mixture and tuned in for `extension_steps` on equal parts of it and of the others.
    method: btx, bam, bam-shared-kv, nexus, nexus-linear (the paper's baseline), or average (one dense model). attention_top_k: 0 is soft routing.
    load_balancing, z_loss: factors of the router losses; none: the method's own (`koine upcycle METHOD --help`).
    """
    dtype = chosen_dtype(dtype)
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'", hint=did_you_mean(method, METHODS))
    if len(domains) < 2:
        raise UserError(
            f"{len(domains)} domains are given", hint="give at least two: --set domains=code=DATA,law=DATA"
        )
    if not 0.0 <= general_share < 1.0:
        raise UserError(f"general_share is {general_share}", hint="it must be at least 0 and below 1")
    named = dict(named_path(one) for one in domains)
    added = dict([named_path(new_domain)]) if new_domain else {}
    if len(named) < len(domains) or named.keys() & added.keys() or "general" in {*named, *added}:
        raise UserError("two domains have one name", hint="name each differently, and none 'general'")
    if added and method == "average":
        raise UserError("an average has no experts to add to", hint="choose another method, or merge instead")
    given = plan.input(seed_model, name="seed-given")
    corpora: dict[str, Artifact] = {}
    tokens: dict[str, Artifact] = {}
    paths = {**named, **added, **({} if general is None else {"general": general})}
    for name, path in paths.items():
        corpora[name] = plan.step(
            domain_text,
            name=f"text/{name}",
            data=plan.input(path, name=f"data/{name}"),
            fields=fields,
            max_bytes=max_bytes,
            heldout_bytes=heldout_bytes,
            max_bad_share=max_bad_share,
            domain=name,
            seed=seed,
        )
        tokens[name] = plan.step(
            tokenize_domain, name=f"tokens/{name}", corpus=corpora[name], tokenizer=given, domain=name
        )
    everyday = {} if general is None else {"general": tokens["general"]}
    share = 0.0 if general is None else general_share
    settings = {
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "dtype": dtype,
        "threads": threads,
        "seed": seed,
    }

    def branch(name: str) -> Artifact:
        return plan.step(
            train_on,
            name=f"expert/{name}",
            model=given,
            tokens={name: tokens[name], **everyday},
            shares=tuple(equal_shares(1, share)),
            steps=branch_steps,
            learning_rate=branch_learning_rate,
            min_rate_share=0.1,
            **settings,
        )

    experts = {name: branch(name) for name in named}
    mixed = plan.step(
        mix,
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
    model = plan.step(
        train_on,
        name="model",
        model=mixed,
        tokens={**{name: tokens[name] for name in named}, **everyday},
        shares=tuple(equal_shares(len(named) + len(everyday))),
        steps=mixture_steps,
        learning_rate=mixture_learning_rate,
        min_rate_share=0.1,
        **settings,
    )
    compared = {
        "seed": given,
        **{f"expert {name}": one for name, one in experts.items()},
        "mixed": mixed,
        "model": model,
    }
    for name in added:
        expert = branch(name)
        grown = plan.step(
            grow,
            name="grown",
            model=model,
            expert=expert,
            corpus=corpora[name],
            domain=name,
            reset_router=method != "nexus",
            seed=seed,
        )
        old = [*named, *everyday]
        extended = plan.step(
            train_on,
            name="extended",
            model=grown,
            tokens={name: tokens[name], **{one: tokens[one] for one in old}},
            shares=(0.5, *([0.5 / len(old)] * len(old))),
            steps=extension_steps,
            learning_rate=mixture_learning_rate * 0.1,
            min_rate_share=1.0,
            **settings,
        )
        compared |= {f"expert {name}": expert, "grown": grown, "extended": extended}
    evaluations = {
        name.replace(" ", "-"): plan.step(
            evaluate_domains,
            name=f"evaluation/{name.replace(' ', '-')}",
            model=one,
            corpora=corpora,
            documents=evaluation_documents,
            characters=4_000,
            threads=threads,
        )
        for name, one in compared.items()
    }
    comparison = plan.step(compare_domains, name="comparison", evaluations=evaluations)
    plan.export(comparison / "results.json", "results.json")
    final = "extended" if added else "model"
    plan.closing(
        f"Bits per byte and routing, domain by domain: {plan.folder / 'report.html'}. The model: {plan.folder / final}"
    )


def named_path(text: str) -> tuple[str, Path]:
    """`NAME=PATH` as a pair."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise UserError(
            f"'{text}' is not NAME=PATH", hint="for example --set domains=code=code.jsonl,law=law.jsonl"
        )
    return name, Path(path)
