"""CA2 to CA4 of arXiv 2504.00698 and AE3 of arXiv 2412.04261: `koine run experiments/merging/plan.py:merging --set pack=DATA`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.merging.judge import judge
from koine.errors import UserError, did_you_mean
from koine.plan import Artifact, Plan
from koine.steps.domain_corpora import code_domain, domain_text, shared_tokenizer, tokenize_domain
from koine.steps.mixtures import equal_shares, evaluate_domains, merge_models, new_seed, train_on

DOMAINS = ("code", "reviews", "maths")
WIKI, SPOKEN = "text/wiki.train.jsonl.xz", "text/cv.train.jsonl.xz"
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "general": (WIKI, ("pt", "it", "pl", "tr")),
    "reviews": ("text/en_reviews.jsonl.xz", ()),
    "maths": ("sft/gsm8k_train.jsonl.xz", ()),
    "en": ("text/en_speeches.jsonl.xz", ()),
    "es": (SPOKEN, ("es",)),
    "fr": (SPOKEN, ("fr",)),
    **{code: (WIKI, (code,)) for code in ("pt", "it", "pl", "hr", "bg", "tr", "hu", "vi")},
}
SHARED = ("en", "es", "fr")
CLUSTERS = {"romance": ("pt", "it"), "slavic": ("pl", "hr", "bg"), "others": ("tr", "hu", "vi")}
UNWEIGHTED = ("slerp", "model-stock")
LANGUAGES = (*SHARED, *(code for members in CLUSTERS.values() for code in members))


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run. hidden: of the domains' models, and of the small and the large of the languages'."""

    hidden: tuple[int, int, int] = (96, 64, 128)
    layers: int = 4
    heads: int = 4
    vocabulary: int = 2048
    sequence_length: int = 256
    batch_size: int = 8
    micro_batch_size: int = 8
    seed_steps: int = 300
    branch_steps: int = 80
    touch_up_steps: int = 40
    learning_rate: float = 2e-3
    max_bytes: int = 1_500_000
    heldout_bytes: int = 40_000
    documents: int = 30
    seeds: int = 3
    threads: int = 1
    dtype: str = "float32"


SCALES = {
    "smoke": Scale(
        hidden=(32, 16, 32), layers=2, heads=2, vocabulary=768, sequence_length=32, batch_size=2, micro_batch_size=2, seed_steps=2,
        branch_steps=1, touch_up_steps=1, max_bytes=25_000, heldout_bytes=1_500, documents=1, seeds=1,
    ),
    "laptop": Scale(),
    "gpu": Scale(
        hidden=(512, 256, 768), layers=8, heads=8, vocabulary=16_384, sequence_length=1024, batch_size=64, micro_batch_size=32,
        seed_steps=4_000, branch_steps=1_500, touch_up_steps=200, learning_rate=1e-3, max_bytes=20_000_000, threads=8, dtype="bfloat16",
    ),
    # Aya Expanse's two sizes have hidden 4,096 and 8,192; planned, not run.
    "cluster": Scale(
        hidden=(8192, 4096, 8192), layers=32, heads=32, vocabulary=256_000, sequence_length=8192, batch_size=512, micro_batch_size=4,
        seed_steps=500_000, branch_steps=10_000, touch_up_steps=500, learning_rate=2.5e-4, max_bytes=1_000_000_000_000, threads=8, dtype="bfloat16",
    ),
}  # fmt: skip


def merging(plan: Plan, *, pack: Path = Path("../shared/data"), scale: str = "laptop") -> None:
    """Experts of domains merged by every method, then touched up; clusters of languages merged, at two sizes."""
    if scale not in SCALES:
        raise UserError(f"unknown scale '{scale}'", hint=did_you_mean(scale, SCALES))
    size = SCALES[scale]
    given = {
        path: plan.input(pack / path, name=f"data/{Path(path).name.split('.')[0]}")
        for path, _ in FILES.values()
    }
    corpora = {
        name: plan.step(
            domain_text,
            name=f"text/{name}",
            data=given[path],
            domain=name,
            fields=(),
            max_bytes=size.max_bytes,
            heldout_bytes=size.heldout_bytes,
            max_bad_share=0.01,
            seed=0,
            languages=languages,
        )
        for name, (path, languages) in FILES.items()
    }
    corpora["code"] = plan.step(
        code_domain,
        name="text/code",
        max_bytes=min(size.max_bytes, 3_000_000),
        heldout_bytes=size.heldout_bytes,
    )
    tokenizer = plan.step(
        shared_tokenizer,
        name="tokenizer",
        corpora=corpora,
        vocabulary_size=size.vocabulary,
        sample_bytes=3_000_000,
        seed=0,
    )
    tokens = {
        name: plan.step(
            tokenize_domain, name=f"tokens/{name}", corpus=corpus, tokenizer=tokenizer, domain=name
        )
        for name, corpus in corpora.items()
    }
    evaluations: dict[str, Artifact] = {}
    for seed in range(size.seeds):
        groups: list[tuple[dict[str, Artifact], tuple[str, ...]]] = [
            (domains_of_one_seed(plan, size, seed, tokenizer, tokens), DOMAINS)
        ]
        groups += [
            (languages_of_one_seed(plan, size, seed, name, hidden, tokenizer, tokens), LANGUAGES)
            for name, hidden in zip(("small", "large"), size.hidden[1:], strict=True)
        ]
        for models, texts in groups:
            for arm, model in models.items():
                evaluations[f"{arm}/{seed}"] = plan.step(
                    evaluate_domains,
                    name=f"evaluation/{arm}/{seed}",
                    model=model,
                    corpora={name: corpora[name] for name in texts},
                    documents=size.documents,
                    characters=2_000,
                    threads=size.threads,
                )
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
    plan.export(judged / "results.json", "results.json")
    plan.closing(f"The verdicts are in {plan.folder / 'results.json'} and {plan.folder / 'report.html'}.")


class Trainer:
    """Adds the steps of one seed that train."""

    def __init__(self, plan: Plan, size: Scale, seed: int, tokens: dict[str, Artifact]) -> None:
        self.plan, self.size, self.seed, self.tokens = plan, size, seed, tokens
        self.settings: dict[str, Any] = {
            "sequence_length": size.sequence_length,
            "batch_size": size.batch_size,
            "micro_batch_size": size.micro_batch_size,
            "dtype": size.dtype,
            "seed": seed,
            "threads": size.threads,
        }

    def base(self, name: str, hidden: int, tokenizer: Artifact, shares: dict[str, float]) -> Artifact:
        """From random weights."""
        return self.plan.step(
            new_seed,
            name=f"{name}/{self.seed}",
            tokenizer=tokenizer,
            tokens={text: self.tokens[text] for text in shares},
            shares=tuple(shares.values()),
            hidden=hidden,
            layers=self.size.layers,
            heads=self.size.heads,
            kv_heads=self.size.heads // 2,
            intermediate=2 * hidden,
            steps=self.size.seed_steps,
            learning_rate=self.size.learning_rate,
            **self.settings,
        )

    def branch(
        self, name: str, model: Artifact, shares: dict[str, float], *, steps: int, factor: float
    ) -> Artifact:
        """On from a model, at a part of the base's learning rate."""
        return self.plan.step(
            train_on,
            name=f"{name}/{self.seed}",
            model=model,
            tokens={text: self.tokens[text] for text in shares},
            shares=tuple(shares.values()),
            steps=steps,
            learning_rate=self.size.learning_rate * factor,
            min_rate_share=0.1,
            **self.settings,
        )


def domains_of_one_seed(
    plan: Plan, size: Scale, seed: int, tokenizer: Artifact, tokens: dict[str, Artifact]
) -> dict[str, Artifact]:
    """Experts of domains, their merges, and the touch-up."""
    trainer = Trainer(plan, size, seed, tokens)
    root = trainer.base("seed", size.hidden[0], tokenizer, {"general": 0.7, **dict.fromkeys(DOMAINS, 0.1)})
    experts = {
        domain: trainer.branch(
            f"expert/{domain}", root, {domain: 0.9, "general": 0.1}, steps=size.branch_steps, factor=0.5
        )
        for domain in DOMAINS
    }

    def merged(
        arm: str, method: str, names: tuple[str, ...] = DOMAINS, base: bool = True, **more: Any
    ) -> Artifact:
        return plan.step(
            merge_models,
            name=f"merge/{arm}/{seed}",
            models=[experts[name] for name in names],
            base=root if base else None,
            method=method,
            weights=() if method in UNWEIGHTED else (1.0 / len(names),) * len(names),
            seed=seed,
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
    found["touched-up"] = trainer.branch(
        "touched-up",
        found["linear"],
        dict(zip(DOMAINS, equal_shares(len(DOMAINS)), strict=True)),
        steps=size.touch_up_steps,
        factor=0.5 / 15,
    )
    return found


def languages_of_one_seed(
    plan: Plan,
    size: Scale,
    seed: int,
    name: str,
    hidden: int,
    tokenizer: Artifact,
    tokens: dict[str, Artifact],
) -> dict[str, Artifact]:
    """Models of clusters and of single languages, and their merges, at one size."""
    trainer = Trainer(plan, size, seed, tokens)

    def equal(codes: tuple[str, ...]) -> dict[str, float]:
        return dict(zip(codes, equal_shares(len(codes)), strict=True))

    root = trainer.base(f"{name}/base", hidden, tokenizer, equal(LANGUAGES))
    clusters = {
        cluster: trainer.branch(
            f"{name}/{cluster}", root, equal((*SHARED, *members)), steps=size.branch_steps, factor=0.5
        )
        for cluster, members in CLUSTERS.items()
    }
    alone = [
        trainer.branch(f"{name}/{code}", root, {code: 1.0}, steps=size.branch_steps, factor=0.5)
        for code in LANGUAGES
    ]

    joint = trainer.branch(
        f"{name}/joint", root, equal(LANGUAGES), steps=len(CLUSTERS) * size.branch_steps, factor=0.5
    )

    def merged(arm: str, models: list[Artifact]) -> Artifact:
        return plan.step(
            merge_models,
            name=f"{name}/{arm}/{seed}",
            models=models,
            method="linear",
            weights=(1.0 / len(models),) * len(models),
            seed=seed,
        )

    return {
        **{f"{name}-{cluster}": model for cluster, model in clusters.items()},
        f"{name}-base": root,
        f"{name}-joint": joint,
        f"{name}-clusters": merged("merged-clusters", list(clusters.values())),
        f"{name}-languages": merged("merged-languages", alone),
    }
