"""The steps of branch-train-mix: a seed, a branch trained on a domain, a mixture of branches, and what each knows of every domain.

Heavy imports are inside the functions, so that a run in which everything is up to date never loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from koine.errors import UserError, did_you_mean
from koine.files import read_json, write_json
from koine.plan import step
from koine.steps import estimates
from koine.steps.corpus_files import write_step_report
from koine.steps.domain_corpora import documents_of
from koine.steps.training import phase_of, train_step, training_settings

METHODS = ("btx", "bam", "bam-shared-kv", "nexus", "nexus-linear", "average")
"""How branches become one model: see `koine.combine.moe.upcycle`; `nexus-linear` is Nexus with a linear router, `average` one dense model."""

ENCODED = 512
"""Documents of each domain from which its embedding is made."""


@step(version="1", estimate=estimates.branch)
def new_seed(
    tokenizer: Path,
    tokens: dict[str, Path],
    *,
    shares: tuple[float, ...],
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    steps: int,
    sequence_length: int,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: float,
    dtype: str,
    seed: int,
    threads: int,
    out: Path,
) -> None:
    """A seed of the given sizes (every layer full with RoPE, as in arXiv 2408.08274) from random weights, trained on domains in the given shares."""
    import torch

    from koine.data import Source
    from koine.model import Decoder, LayerSpec, ModelConfig
    from koine.tokenizer import load_tokenizer

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=load_tokenizer(tokenizer).vocab_size, hidden_size=hidden, intermediate_size=intermediate, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=hidden // heads, layers=(LayerSpec(),) * layers, logit_scale=1.0,
    )  # fmt: skip
    sources = [
        Source(name=name, path=path / "tokens", proportion=share, max_epochs=1_000.0)
        for (name, path), share in zip(tokens.items(), shares, strict=True)
        if share > 0.0
    ]
    train_step(
        Decoder(config),
        phase_of("pretrain", sources, steps, sequence_length, batch_size, seed, packing="concat"),
        training_settings(
            learning_rate=learning_rate, schedule="cosine", min_lr_ratio=0.1, steps=steps, micro_batch_size=micro_batch_size,
            dtype=dtype, evaluate_every=0, seed=seed, threads=threads,
        ),
        out=out,
        tokenizer=tokenizer,
        evaluate=None,
    )  # fmt: skip


@step(version="2", estimate=estimates.branch)
def train_on(
    model: Path,
    tokens: dict[str, Path],
    *,
    shares: tuple[float, ...],
    steps: int,
    sequence_length: int,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: float,
    min_rate_share: float,
    dtype: str,
    seed: int,
    threads: int,
    out: Path,
) -> None:
    """Train a model, dense or a mixture, on domains in the given shares; the learning rate falls on a cosine to `min_rate_share` of itself."""
    import torch

    from koine.data import Source
    from koine.model import load_model

    torch.set_num_threads(threads)
    if len(shares) != len(tokens):
        raise UserError(f"{len(shares)} shares for {len(tokens)} domains", hint="give one each")
    sources = [
        Source(name=name, path=path / "tokens", proportion=share, max_epochs=1_000.0)
        for (name, path), share in zip(tokens.items(), shares, strict=True)
        if share > 0.0
    ]
    train_step(
        load_model(model),
        phase_of("continue", sources, steps, sequence_length, batch_size, seed, packing="concat"),
        training_settings(
            learning_rate=learning_rate,
            schedule="cosine",
            min_lr_ratio=min_rate_share,
            steps=steps,
            micro_batch_size=micro_batch_size,
            dtype=dtype,
            evaluate_every=0,
            seed=seed,
            threads=threads,
        ),
        out=out,
        tokenizer=model,
        evaluate=None,
        init_from=model,
    )


@step(version="2", estimate=estimates.mixing)
def mix(
    seed_model: Path,
    experts: dict[str, Path],
    corpora: dict[str, Path],
    *,
    method: str,
    top_k: int,
    attention_top_k: int,
    encoder: str,
    domain_size: int,
    load_balancing: float | None,
    z_loss: float | None,
    seed: int,
    seed_copies: int = 0,
    out: Path,
) -> None:
    """Make one model of the seed and its branches, by one of `METHODS`; `attention_top_k` 0 is soft routing, `seed_copies` is of `btx`;
    a router loss of None has the method's own factor."""
    import torch

    from koine.combine import fit_encoder, upcycle_bam, upcycle_btx, upcycle_nexus
    from koine.combine.moe.domain_embeddings import domain_embedding
    from koine.combine.moe.upcycle import average
    from koine.model.formats.mixture_files import DOMAIN_ENCODER

    given = {"load_balancing": load_balancing, "z_loss": z_loss}
    losses = {name: factor for name, factor in given.items() if factor is not None}
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
        texts = {name: documents_of(corpora[name], "train", ENCODED) for name in experts}
        fitted = fit_encoder(encoder, texts, seed_model=seed_model, width=domain_size, random_seed=seed)
        domains = torch.stack([domain_embedding(fitted, texts[name]) for name in experts])
        upcycle_nexus(seed_model, experts, out, domains=domains, top_k=top_k, random_seed=seed, **losses)
        (out / DOMAIN_ENCODER).mkdir(exist_ok=True)
        fitted.save(out / DOMAIN_ENCODER)
    elif method == "average":
        average(seed_model, experts, out)
    else:
        raise UserError(f"unknown method '{method}'", hint=did_you_mean(method, METHODS))


@step(version="2", estimate=estimates.mixing)
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
    """A merge of models (`koine.combine.merging.methods`); `options` are the method's own numbers, as `density=0.5`."""
    from koine.combine.merging.config import Recipe
    from koine.combine.merging.runner import merge

    numbers = {name: float(value) for name, _, value in (one.partition("=") for one in options)}
    recipe = Recipe(
        method=method, models=tuple(models), base=base, weights=weights, options=numbers, seed=seed
    )
    merged = out / ".merged"
    merge(recipe, merged, threads=1)
    for path in merged.iterdir():
        path.replace(out / path.name)
    merged.rmdir()


@step(version="2", estimate=estimates.mixing)
def grow(
    model: Path, expert: Path, corpus: Path, *, domain: str, reset_router: bool, seed: int, out: Path
) -> None:
    """One more expert in a mixture (`koine.combine.moe.add_expert`)."""
    from koine.combine import add_expert

    add_expert(
        model,
        expert,
        out,
        name=domain,
        texts=documents_of(corpus, "train", ENCODED),
        reset_router=reset_router,
        random_seed=seed,
    )


@step(version="1", estimate=estimates.domains)
def evaluate_domains(
    model: Path, corpora: dict[str, Path], *, documents: int, characters: int, threads: int, out: Path
) -> None:
    """Bits per byte of a model on each domain's held-out documents, and where a mixture sends their tokens."""
    import torch

    from koine.evaluate import bits_per_byte
    from koine.evaluate.expert_routing import routing_blocks, routing_shares
    from koine.model import load_model
    from koine.tokenizer import load_tokenizer

    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(model)
    decoder = load_model(model, dtype=torch.float32)
    found: dict[str, Any] = {"bits_per_byte": {}, "routing": {}}
    shares = {}
    for name, corpus in corpora.items():
        records = [
            {"id": str(number), "text": text[:characters], "language": "und", "domain": name}
            for number, text in enumerate(documents_of(corpus, "heldout", documents))
        ]
        overall = bits_per_byte(decoder, tokenizer, records, batch_size=16)["overall"]
        found["bits_per_byte"][name] = overall["bits_per_byte"]
        if decoder.config.mixture is not None:
            shares[name] = routing_shares(decoder, tokenizer, [record["text"] for record in records])
            found["routing"][name] = shares[name].to_json()
    values = list(found["bits_per_byte"].values())
    found["mean"] = sum(values) / len(values)
    write_json(out / "evaluation.json", found)
    write_json(out / "metrics.json", {"bits_per_byte": found["mean"]})
    if shares:
        write_step_report(out, "Routing", routing_blocks(shares))


@step(version="2", estimate=estimates.comparison)
def compare_domains(evaluations: dict[str, Path], *, out: Path) -> None:
    """The models' bits per byte side by side, domain by domain."""
    read = {name: read_json(path / "evaluation.json") for name, path in evaluations.items()}
    domains = list(next(iter(read.values()))["bits_per_byte"])
    rows = [
        [name, *(round(one["bits_per_byte"][domain], 4) for domain in domains), round(one["mean"], 4)]
        for name, one in read.items()
    ]
    write_json(out / "results.json", read)
    best = min(read, key=lambda name: float(read[name]["mean"]))
    first = next(iter(read))
    write_step_report(
        out,
        "Bits per byte and routing",
        [
            {
                "kind": "verdict",
                "title": f"Best over all domains: {best}",
                "text": f"{read[best]['mean']:.4f} bits per byte in the mean over {len(domains)} domains; {first}: {read[first]['mean']:.4f}.",
            },
            {
                "kind": "table",
                "title": "Held-out text, domain by domain",
                "columns": ["model", *domains, "mean"],
                "rows": rows,
            },
            {
                "kind": "bars",
                "categories": domains,
                "series": [
                    {"name": name, "values": [one["bits_per_byte"][domain] for domain in domains]}
                    for name, one in read.items()
                ],
                "x_label": "domain",
                "y_label": "bits per byte",
            },
            *_last_routing(read),
        ],
    )


def _last_routing(read: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the last mixture sends the tokens of each domain; nothing where all models are dense."""
    mixtures = [(name, one["routing"]) for name, one in read.items() if one["routing"]]
    if not mixtures:
        return []
    name, routing = mixtures[-1]
    experts = list(next(iter(routing.values()))["chosen"])
    return [
        {
            "kind": "heatmap",
            "title": f"Tokens by domain and expert: {name}",
            "label": "share",
            "rows": list(routing),
            "columns": experts,
            "values": [[shares["chosen"][expert] for expert in experts] for shares in routing.values()],
        }
    ]


def equal_shares(count: int, general: float = 0.0) -> Sequence[float]:
    """Equal parts for `count` domains, and `general` for one that comes after them."""
    parts = [(1.0 - general) / count] * count
    return (*parts, general) if general else tuple(parts)
