"""NX1 to NX4 of arXiv 2408.15901.

koine run experiments/nexus/plan.py:nexus --set pack=DATA
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.common.domains import (
    GENERAL,
    MATHS,
    REVIEWS,
    SPEECHES,
    SPOKEN,
    Domains,
    DomainScale,
    PackFile,
    Trainer,
    evaluate_arms,
    pack_inputs,
    prepare_domains,
)
from experiments.common.plans import choose_scale, export_verdicts
from experiments.nexus.judge import NEW, judge
from koine.plan import Artifact, Plan
from koine.steps.combination import add_domain_expert, combine_branches

EXPERTS = ("reviews", "speeches", "maths", "spoken")
KNOWN = ("general", *EXPERTS)
FILES: dict[str, PackFile | None] = {
    "general": GENERAL,
    "reviews": REVIEWS,
    "speeches": SPEECHES,
    "maths": MATHS,
    "spoken": PackFile(SPOKEN, ("de", "fr")),
    # The tokenizer knows the new domain; only the models do not.
    NEW: None,
}
ROUTERS = {
    "nexus": ("nexus", 0.05),
    "linear": ("nexus-linear", 0.05),
    "nexus-low": ("nexus", 0.0005),
    "linear-low": ("nexus-linear", 0.0005),
}


@dataclass(frozen=True, kw_only=True)
class Scale(DomainScale):
    """Sizes of this experiment. budgets: steps of training after an expert was added."""

    hidden: int = 96
    kv_heads: int = 2
    intermediate: int = 192
    domain_size: int = 32
    mixture_steps: int = 250
    budgets: tuple[int, ...] = (25, 60, 120)


SCALES = {
    "smoke": Scale(
        hidden=32,
        layers=2,
        heads=2,
        kv_heads=1,
        intermediate=32,
        vocabulary=512,
        domain_size=4,
        sequence_length=32,
        batch_size=2,
        micro_batch_size=2,
        seed_steps=2,
        branch_steps=2,
        mixture_steps=2,
        budgets=(1, 2),
        max_bytes=40_000,
        heldout_bytes=2_000,
        documents=2,
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
        domain_size=256,
        sequence_length=1024,
        batch_size=64,
        micro_batch_size=32,
        seed_steps=4_000,
        branch_steps=1_500,
        mixture_steps=1_500,
        budgets=(100, 250, 500),
        learning_rate=1e-3,
        max_bytes=20_000_000,
        threads=8,
        dtype="bfloat16",
    ),
    # The paper's small model, as far as its sizes are known; planned, not run.
    "cluster": Scale(
        hidden=1024,
        layers=12,
        heads=16,
        kv_heads=16,
        intermediate=4096,
        vocabulary=256_000,
        domain_size=1024,
        sequence_length=4096,
        batch_size=256,
        micro_batch_size=8,
        seed_steps=700_000,
        branch_steps=24_000,
        mixture_steps=24_000,
        budgets=(190, 480, 950),
        learning_rate=1e-3,
        max_bytes=1_000_000_000_000,
        threads=8,
        dtype="bfloat16",
    ),
}


def nexus(plan: Plan, *, pack: Path = Path("../shared/data"), scale: str = "laptop") -> None:
    """Mixtures with a Nexus and a linear router; an expert is added, with three budgets of training."""
    size = choose_scale(scale, SCALES)
    domains = prepare_domains(plan, size, pack_inputs(plan, pack, FILES))
    evaluations: dict[str, Artifact] = {}
    for seed in range(size.seeds):
        models = models_of_seed(plan, size, seed, domains)
        evaluations |= evaluate_arms(plan, size, seed, models, domains.corpora)
    judged = plan.step(
        judge, name="verdicts", evaluations=evaluations, scale=scale, seeds=size.seeds, budgets=size.budgets
    )
    export_verdicts(plan, judged)


def models_of_seed(plan: Plan, size: Scale, seed: int, domains: Domains) -> dict[str, Artifact]:
    """All models of one random seed, by arm."""
    trainer = Trainer(plan, size, seed, domains)
    root = trainer.pretrain(
        "seed",
        {"general": 0.6, **dict.fromkeys(EXPERTS, 0.1)},
        hidden=size.hidden,
        kv_heads=size.kv_heads,
        intermediate=size.intermediate,
    )
    experts = {
        domain: trainer.train(
            f"expert/{domain}", root, {domain: 0.9, "general": 0.1}, steps=size.branch_steps, rate=0.5
        )
        for domain in (*EXPERTS, NEW)
    }
    new = experts.pop(NEW)

    def mixed(arm: str, method: str, load_balancing: float) -> Artifact:
        return plan.step(
            combine_branches,
            name=f"mixed/{arm}/{seed}",
            seed_model=root,
            experts=experts,
            corpora={domain: domains.corpora[domain] for domain in EXPERTS},
            method=method,
            top_k=1,
            attention_top_k=0,
            encoder="tfidf",
            domain_size=size.domain_size,
            load_balancing=load_balancing,
            z_loss=0.0,
            seed=seed,
        )

    found = {"seed": root, "expert-new": new, "average": mixed("average", "average", 0.0)}
    for arm, (method, load_balancing) in ROUTERS.items():
        found[arm] = trainer.train(
            f"mixture/{arm}",
            mixed(arm, method, load_balancing),
            dict.fromkeys(KNOWN, 0.2),
            steps=size.mixture_steps,
            rate=1.0,
            min_lr_ratio=0.3,
        )
    for arm in ("nexus", "linear"):
        found |= extended(trainer, size, domains, arm, model=found[arm], expert=new)
    return found


def extended(
    trainer: Trainer, size: Scale, domains: Domains, arm: str, *, model: Artifact, expert: Artifact
) -> dict[str, Artifact]:
    """Add the new domain's expert to a mixture, then train it for each budget; arms `ARM-STEPS`."""
    grown = trainer.plan.step(
        add_domain_expert,
        name=f"grown/{arm}/{trainer.seed}",
        model=model,
        expert=expert,
        corpus=domains.corpora[NEW],
        domain=NEW,
        reset_router=arm == "linear",
        seed=trainer.seed,
    )
    return {f"{arm}-0": grown} | {
        f"{arm}-{steps}": trainer.train(
            f"extended/{arm}-{steps}",
            grown,
            {NEW: 0.5, **dict.fromkeys(KNOWN, 0.1)},
            steps=steps,
            rate=0.3,
            min_lr_ratio=1.0,
        )
        for steps in size.budgets
    }
