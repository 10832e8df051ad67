"""The steps that combine models: branches of one seed to one model, a merge, one more expert.

Heavy imports are inside the functions, so that a run in which everything is up to date never loads torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koine.errors import UserError, did_you_mean
from koine.plan import step
from koine.steps import checks, estimates
from koine.steps.domain_corpora import documents_of

METHODS = ("btx", "bam", "bam-shared-kv", "nexus", "nexus-linear", "average")
"""Ways to combine branches: `koine.combine.moe.upcycle`, Nexus with a linear router, one dense average."""
EMBEDDED_DOCUMENTS = 512
"""Documents of each domain from which its embedding is computed."""


@step(version="2", estimate=estimates.mixed, check=checks.combined, formerly=("koine.recipes.domains:mix",))
def combine_branches(
    seed_model: Path,
    experts: dict[str, Path],
    corpora: dict[str, Path],
    *,
    method: str,
    top_k: int | None,
    attention_top_k: int,
    encoder: str,
    domain_size: int,
    load_balancing: float | None,
    z_loss: float | None,
    seed: int,
    seed_copies: int = 0,
    out: Path,
) -> None:
    """Combine a seed model and its branches in one model.

    Args:
        seed_model: folder of the model that the branches were trained from.
        experts: folder of the branch of each domain.
        corpora: folder of the text of each domain, for the domain embeddings of Nexus.
        method: one of `METHODS`.
        top_k: experts of each token; None: see `koine.combine.moe.upcycle.default_top_k`.
        attention_top_k: attention experts of each token (`bam`); 0: soft routing over all.
        encoder: encoder of the domain embeddings (`koine.combine.moe.domain_embeddings`).
        domain_size: dimensions of a domain embedding.
        load_balancing: factor of the load-balancing loss; None: the method's own.
        z_loss: factor of the router's z-loss; None: the method's own.
        seed: random seed of the new router.
        seed_copies: experts that are copies of the seed model (`btx`).

    Raises:
        UserError: an unknown method, or models that do not fit together.
    """
    import torch

    from koine.combine import fit_encoder, upcycle_bam, upcycle_btx, upcycle_nexus
    from koine.combine.moe.domain_embeddings import domain_embedding
    from koine.combine.moe.upcycle import average
    from koine.model.formats.mixture_files import DOMAIN_ENCODER

    _remove_leftover(out)
    given = {"load_balancing": load_balancing, "z_loss": z_loss}
    losses: dict[str, Any] = {name: factor for name, factor in given.items() if factor is not None}
    if method == "btx":
        upcycle_btx(
            seed_model, experts, out, top_k=top_k, seed_copies=seed_copies, random_seed=seed, **losses
        )
    elif method in ("bam", "bam-shared-kv"):
        upcycle_bam(
            seed_model, experts, out, attention="kv-experts" if method == "bam" else "shared-kv",
            attention_top_k=attention_top_k or None, top_k=top_k, random_seed=seed, **losses,
        )  # fmt: skip
    elif method == "nexus-linear":
        upcycle_nexus(seed_model, experts, out, domains=None, top_k=top_k, random_seed=seed, **losses)
    elif method == "nexus":
        texts = {name: documents_of(corpora[name], "train", EMBEDDED_DOCUMENTS) for name in experts}
        fitted = fit_encoder(encoder, texts, seed_model=seed_model, width=domain_size, random_seed=seed)
        domains = torch.stack([domain_embedding(fitted, texts[name]) for name in experts])
        upcycle_nexus(seed_model, experts, out, domains=domains, top_k=top_k, random_seed=seed, **losses)
        (out / DOMAIN_ENCODER).mkdir(exist_ok=True)
        fitted.save(out / DOMAIN_ENCODER)
    elif method == "average":
        average(seed_model, experts, out)
    else:
        raise UserError(f"unknown method '{method}'", hint=did_you_mean(method, METHODS))


@step(
    version="2",
    estimate=estimates.mixing,
    check=checks.merged,
    formerly=("koine.recipes.domains:merge_models",),
)
def merge_models(
    models: list[Path],
    base: Path | None = None,
    *,
    method: str,
    weights: tuple[float, ...],
    seed: int,
    options: tuple[str, ...] = (),
    out: Path,
) -> None:
    """Merge models by a method of `koine.combine.merging.methods`.

    options: the method's own numbers, for example `density=0.5`.
    """
    from koine.combine.merging.config import MergeConfig
    from koine.combine.merging.methods import find_method
    from koine.combine.merging.runner import run_merge

    config = MergeConfig(
        method=method,
        models=tuple(models),
        base=base,
        weights=weights,
        options=find_method(method).parse_options(options),
        seed=seed,
    )
    merged = out / ".merged"
    run_merge(config, merged, threads=1)
    for path in merged.iterdir():
        path.replace(out / path.name)
    merged.rmdir()


@step(version="2", estimate=estimates.mixing, check=checks.grown, formerly=("koine.recipes.domains:grow",))
def add_domain_expert(
    model: Path, expert: Path, corpus: Path, *, domain: str, reset_router: bool, seed: int, out: Path
) -> None:
    """Add an expert to a mixture (`koine.combine.moe.add_expert`)."""
    from koine.combine import add_expert

    _remove_leftover(out)
    add_expert(
        model,
        expert,
        out,
        name=domain,
        texts=documents_of(corpus, "train", EMBEDDED_DOCUMENTS),
        reset_router=reset_router,
        random_seed=seed,
    )


def _remove_leftover(out: Path) -> None:
    """Remove the configuration that a killed attempt left in the step's folder."""
    (out / "config.json").unlink(missing_ok=True)
