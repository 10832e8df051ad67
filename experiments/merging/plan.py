"""CA2 to CA4 of arXiv 2504.00698 and AE3 of arXiv 2412.04261.

koine run experiments/merging/plan.py:merging --set pack=DATA
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.domains import (
    GENERAL,
    MATHS,
    REVIEWS,
    SPEECHES,
    SPOKEN,
    WIKI,
    DomainScale,
    PackFile,
    Trainer,
    evaluate_arms,
    prepare_domains,
)
from experiments.common.plans import choose_scale, export_verdicts
from experiments.merging.judge import judge
from koine.plan import Artifact, Plan
from koine.steps.combination import merge_models
from koine.steps.text_mixture import equal_shares

DOMAINS = ("code", "reviews", "maths")
FILES: dict[str, PackFile] = {
    "general": GENERAL,
    "reviews": REVIEWS,
    "maths": MATHS,
    "en": SPEECHES,
    "es": PackFile(SPOKEN, ("es",)),
    "fr": PackFile(SPOKEN, ("fr",)),
    **{code: PackFile(WIKI, (code,)) for code in ("pt", "it", "pl", "hr", "bg", "tr", "hu", "vi")},
}
SHARED = ("en", "es", "fr")
CLUSTERS = {"romance": ("pt", "it"), "slavic": ("pl", "hr", "bg"), "others": ("tr", "hu", "vi")}
UNWEIGHTED = ("slerp", "model-stock")
LANGUAGES = (*SHARED, *(code for members in CLUSTERS.values() for code in members))


@dataclass(frozen=True, kw_only=True)
class Scale(DomainScale):
    """Sizes of this experiment. hidden: of the domain models, then of the small and large language models."""

    hidden: tuple[int, int, int] = (96, 64, 128)
    seed_steps: int = 300
    branch_steps: int = 80
    touch_up_steps: int = 40
    max_bytes: int = 1_500_000
    heldout_bytes: int = 40_000
    documents: int = 30


SCALES = {
    "smoke": Scale(
        hidden=(32, 16, 32),
        layers=2,
        heads=2,
        vocabulary=768,
        sequence_length=32,
        batch_size=2,
        micro_batch_size=2,
        seed_steps=2,
        branch_steps=1,
        touch_up_steps=1,
        max_bytes=25_000,
        heldout_bytes=1_500,
        documents=1,
        seeds=1,
    ),
    "laptop": Scale(),
    "gpu": Scale(
        hidden=(512, 256, 768),
        layers=8,
        heads=8,
        vocabulary=16_384,
        sequence_length=1024,
        batch_size=64,
        micro_batch_size=32,
        seed_steps=4_000,
        branch_steps=1_500,
        touch_up_steps=200,
        learning_rate=1e-3,
        max_bytes=20_000_000,
        threads=8,
        dtype="bfloat16",
    ),
    # Aya Expanse's two sizes have hidden 4,096 and 8,192; planned, not run.
    "cluster": Scale(
        hidden=(8192, 4096, 8192),
        layers=32,
        heads=32,
        vocabulary=256_000,
        sequence_length=8192,
        batch_size=512,
        micro_batch_size=4,
        seed_steps=500_000,
        branch_steps=10_000,
        touch_up_steps=500,
        learning_rate=2.5e-4,
        max_bytes=1_000_000_000_000,
        threads=8,
        dtype="bfloat16",
    ),
}


def merging(plan: Plan, *, pack: Path = Path("../shared/data"), scale: str = "laptop") -> None:
    """Domain experts merged by every method and trained on; clusters of languages merged, at two sizes."""
    size = choose_scale(scale, SCALES)
    # Several domains are parts of one file, which is one input.
    given = {
        file.path: plan.input(pack / file.path, name=f"data/{Path(file.path).name.split('.')[0]}")
        for file in FILES.values()
    }
    texts = {name: (given[file.path], file.languages) for name, file in FILES.items()}
    domains = prepare_domains(plan, size, {**texts, "code": None}, sample_bytes=3_000_000)
    evaluations: dict[str, Artifact] = {}
    for seed in range(size.seeds):
        trainer = Trainer(plan, size, seed, domains)
        groups: list[tuple[dict[str, Artifact], Sequence[str]]] = [(domain_models(trainer, size), DOMAINS)]
        groups += [
            (language_models(trainer, size, name, hidden), LANGUAGES)
            for name, hidden in zip(("small", "large"), size.hidden[1:], strict=True)
        ]
        for models, names in groups:
            corpora = {name: domains.corpora[name] for name in names}
            evaluations |= evaluate_arms(plan, size, seed, models, corpora)
    judged = plan.step(
        judge,
        name="verdicts",
        evaluations=evaluations,
        scale=scale,
        seeds=size.seeds,
        domains=DOMAINS,
        clusters=tuple((name, *members) for name, members in CLUSTERS.items()),
        shared=SHARED,
        sizes=("small", "large"),
    )
    export_verdicts(plan, judged)


def pretrain(trainer: Trainer, size: Scale, name: str, shares: dict[str, float], *, hidden: int) -> Artifact:
    """Train the model from which all others of one size come."""
    return trainer.pretrain(name, shares, hidden=hidden, kv_heads=size.heads // 2, intermediate=2 * hidden)


def domain_models(trainer: Trainer, size: Scale) -> dict[str, Artifact]:
    """Experts of domains, their merges, and the touched-up merge, by arm."""
    shares = {"general": 0.7, **dict.fromkeys(DOMAINS, 0.1)}
    root = pretrain(trainer, size, "seed", shares, hidden=size.hidden[0])
    experts = {
        domain: trainer.train(
            f"expert/{domain}", root, {domain: 0.9, "general": 0.1}, steps=size.branch_steps, rate=0.5
        )
        for domain in DOMAINS
    }

    def merged(
        arm: str, method: str, names: tuple[str, ...] = DOMAINS, base: bool = True, **more: Any
    ) -> Artifact:
        return trainer.plan.step(
            merge_models,
            name=f"merge/{arm}/{trainer.seed}",
            models=[experts[name] for name in names],
            base=root if base else None,
            method=method,
            weights=() if method in UNWEIGHTED else (1.0 / len(names),) * len(names),
            seed=trainer.seed,
            **more,
        )

    found = {f"expert-{domain}": expert for domain, expert in experts.items()}
    found |= {
        "linear": merged("linear", "linear", base=False),
        # Equal weights that sum to 1 would be the linear merge again.
        "task-arithmetic": merged("task-arithmetic", "task-arithmetic", options=("scale=1.5",)),
        "ties": merged("ties", "ties", options=("density=0.5",)),
        "dare-ties": merged("dare-ties", "dare-ties", options=("density=0.5",)),
        "model-stock": merged("model-stock", "model-stock"),
        "linear-pair": merged("linear-pair", "linear", ("code", "maths"), base=False),
        "slerp-pair": merged("slerp-pair", "slerp", ("code", "maths"), base=False, options=("t=0.5",)),
    }
    found["touched-up"] = trainer.train(
        "touched-up", found["linear"], equal_shares(DOMAINS), steps=size.touch_up_steps, rate=0.5 / 15
    )
    return found


def language_models(trainer: Trainer, size: Scale, name: str, hidden: int) -> dict[str, Artifact]:
    """Models of clusters and of single languages, and their merges, at one size; arms `NAME-...`."""
    root = pretrain(trainer, size, f"{name}/base", equal_shares(LANGUAGES), hidden=hidden)

    def branch(label: str, codes: Sequence[str], steps: int = size.branch_steps) -> Artifact:
        return trainer.train(f"{name}/{label}", root, equal_shares(codes), steps=steps, rate=0.5)

    def merged(label: str, models: list[Artifact]) -> Artifact:
        return trainer.plan.step(
            merge_models,
            name=f"{name}/{label}/{trainer.seed}",
            models=models,
            method="linear",
            weights=(1.0 / len(models),) * len(models),
            seed=trainer.seed,
        )

    clusters = {cluster: branch(cluster, (*SHARED, *members)) for cluster, members in CLUSTERS.items()}
    single = [branch(code, (code,)) for code in LANGUAGES]
    joint = branch("joint", LANGUAGES, steps=len(CLUSTERS) * size.branch_steps)
    return {
        **{f"{name}-{cluster}": model for cluster, model in clusters.items()},
        f"{name}-base": root,
        f"{name}-joint": joint,
        f"{name}-clusters": merged("merged-clusters", list(clusters.values())),
        f"{name}-languages": merged("merged-languages", single),
    }
