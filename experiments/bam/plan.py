"""BM1 to BM4 of arXiv 2408.08274.

koine run experiments/bam/plan.py:bam --set pack=DATA
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bam.judge import judge
from experiments.bam.matched import latency, train_matched
from experiments.common.domains import (
    GENERAL,
    MATHS,
    REVIEWS,
    Domains,
    DomainScale,
    PackFile,
    Trainer,
    evaluate_arms,
    pack_inputs,
    prepare_domains,
)
from experiments.common.plans import choose_scale, export_verdicts
from koine.plan import Artifact, Plan
from koine.steps.combination import combine_branches
from koine.steps.text_mixture import domain_sources

FILES: dict[str, PackFile | None] = {"general": GENERAL, "code": None, "reviews": REVIEWS, "maths": MATHS}
EXPERTS = ("code", "reviews", "maths")


@dataclass(frozen=True, kw_only=True)
class Scale(DomainScale):
    """Sizes of this experiment."""

    hidden: int = 96
    kv_heads: int = 2
    intermediate: int = 192
    mixture_steps: int = 250
    rounds: int = 9


SCALES = {
    "smoke": Scale(
        hidden=32,
        layers=2,
        heads=2,
        kv_heads=1,
        intermediate=32,
        vocabulary=512,
        sequence_length=32,
        batch_size=2,
        micro_batch_size=2,
        seed_steps=2,
        branch_steps=2,
        mixture_steps=2,
        max_bytes=40_000,
        heldout_bytes=2_000,
        documents=2,
        rounds=1,
        seeds=1,
    ),
    "laptop": Scale(),
    "gpu": Scale(
        hidden=512,
        layers=8,
        heads=8,
        kv_heads=8,
        intermediate=1024,
        vocabulary=16_384,
        sequence_length=1024,
        batch_size=64,
        micro_batch_size=32,
        seed_steps=4_000,
        branch_steps=1_500,
        mixture_steps=1_500,
        learning_rate=1e-3,
        max_bytes=20_000_000,
        threads=8,
        dtype="bfloat16",
    ),
    # The paper's small model; planned, not run.
    "cluster": Scale(
        hidden=1024,
        layers=6,
        heads=8,
        kv_heads=8,
        intermediate=2048,
        vocabulary=256_000,
        sequence_length=4096,
        batch_size=256,
        micro_batch_size=8,
        seed_steps=400_000,
        branch_steps=100_000,
        mixture_steps=100_000,
        learning_rate=1.2e-4,
        max_bytes=1_000_000_000_000,
        threads=8,
        dtype="bfloat16",
    ),
}

ARMS: dict[str, dict[str, Any]] = {
    "btx": {"method": "btx"},
    "bam": {"method": "bam"},
    "bam-shared": {"method": "bam-shared-kv"},
    "btx-6": {"method": "btx", "seed_copies": 2},
    "btx-6-top-3": {"method": "btx", "seed_copies": 2, "top_k": 3},
    "shared-top-1": {"method": "bam-shared-kv", "attention_top_k": 1},
    "shared-top-2": {"method": "bam-shared-kv", "attention_top_k": 2},
}
MATCHED = ("bam", "bam-shared")


def bam(plan: Plan, *, pack: Path = Path("../shared/data"), scale: str = "laptop") -> None:
    """Mixtures of three experts: attention averaged or mixed, at equal data and at equal compute."""
    size = choose_scale(scale, SCALES)
    domains = prepare_domains(plan, size, pack_inputs(plan, pack, FILES))
    evaluations: dict[str, Artifact] = {}
    latencies: list[Artifact] = []
    for seed in range(size.seeds):
        models = models_of_seed(plan, size, seed, domains)
        evaluations |= evaluate_arms(plan, size, seed, models, domains.corpora)
        latencies.append(
            plan.step(
                latency,
                name=f"latency/{seed}",
                models={arm: models[arm] for arm in ("btx", "bam-shared", "bam")},
                prompt=256,
                new=16,
                rounds=size.rounds,
                threads=size.threads,
            )
        )
    judged = plan.step(
        judge, name="verdicts", evaluations=evaluations, latencies=latencies, scale=scale, seeds=size.seeds
    )
    export_verdicts(plan, judged)


def models_of_seed(plan: Plan, size: Scale, seed: int, domains: Domains) -> dict[str, Artifact]:
    """All models of one random seed, by arm."""
    trainer = Trainer(plan, size, seed, domains)
    root = trainer.pretrain(
        "seed",
        {"general": 0.7, **dict.fromkeys(EXPERTS, 0.1)},
        hidden=size.hidden,
        kv_heads=size.kv_heads,
        intermediate=size.intermediate,
    )
    experts = {
        domain: trainer.train(
            f"expert/{domain}", root, {domain: 0.9, "general": 0.1}, steps=size.branch_steps, rate=0.5
        )
        for domain in EXPERTS
    }
    mixed = {
        arm: plan.step(
            combine_branches,
            name=f"mixed/{arm}/{seed}",
            seed_model=root,
            experts=experts,
            corpora={domain: domains.corpora[domain] for domain in experts},
            encoder="tfidf",
            domain_size=0,
            load_balancing=0.01,
            z_loss=0.001,
            seed=seed,
            **{"top_k": 1, "attention_top_k": 0, "seed_copies": 0, **options},
        )
        for arm, options in ARMS.items()
    }
    found = {"seed": root, **{f"expert-{domain}": expert for domain, expert in experts.items()}}
    # The paper trains mixtures as it pretrains: at the whole rate, on a cosine to a tenth.
    shares = dict.fromkeys(FILES, 0.25)
    for arm in ARMS:
        found[arm] = trainer.train(f"mixture/{arm}", mixed[arm], shares, steps=size.mixture_steps, rate=1.0)
    for arm in MATCHED:
        for match in ("flops", "seconds"):
            found[f"{arm}-{match}"] = plan.step(
                train_matched,
                name=f"mixture/{arm}-{match}/{seed}",
                model=mixed[arm],
                reference=mixed["btx"],
                tokens=domains.tokens,
                match=match,
                mixture=trainer.steps.mixture(domain_sources(shares), size.mixture_steps),
                settings=trainer.steps.settings(size.mixture_steps, size.learning_rate),
            )
    return found
