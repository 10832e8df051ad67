"""BM1 to BM4 of arXiv 2408.08274: `koine run experiments/bam/plan.py:bam --set pack=DATA`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bam.judge import judge
from experiments.bam.matched import latency, train_matched
from koine.errors import UserError, did_you_mean
from koine.plan import Artifact, Plan
from koine.steps.domain_corpora import code_domain, domain_text, shared_tokenizer, tokenize_domain
from koine.steps.mixtures import evaluate_domains, mix, new_seed, train_on

DOMAINS = ("general", "code", "reviews", "maths")
GENERAL_LANGUAGES = ("pt", "it", "pl", "tr")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run."""

    hidden: int = 96
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 192
    vocabulary: int = 2048
    sequence_length: int = 256
    batch_size: int = 8
    micro_batch_size: int = 8
    seed_steps: int = 800
    branch_steps: int = 250
    mixture_steps: int = 250
    learning_rate: float = 2e-3
    max_bytes: int = 3_000_000
    heldout_bytes: int = 60_000
    documents: int = 60
    rounds: int = 9
    seeds: int = 3
    threads: int = 1
    dtype: str = "float32"


SCALES = {
    "smoke": Scale(
        hidden=32, layers=2, heads=2, kv_heads=1, intermediate=32, vocabulary=512, sequence_length=32, batch_size=2,
        micro_batch_size=2, seed_steps=2, branch_steps=2, mixture_steps=2, max_bytes=40_000, heldout_bytes=2_000, documents=2,
        rounds=1, seeds=1,
    ),
    "laptop": Scale(),
    "gpu": Scale(
        hidden=512, layers=8, heads=8, kv_heads=8, intermediate=1024, vocabulary=16_384, sequence_length=1024, batch_size=64,
        micro_batch_size=32, seed_steps=4_000, branch_steps=1_500, mixture_steps=1_500, learning_rate=1e-3, max_bytes=20_000_000,
        threads=8, dtype="bfloat16",
    ),
    # The paper's small model; planned, not run.
    "cluster": Scale(
        hidden=1024, layers=6, heads=8, kv_heads=8, intermediate=2048, vocabulary=256_000, sequence_length=4096, batch_size=256,
        micro_batch_size=8, seed_steps=400_000, branch_steps=100_000, mixture_steps=100_000, learning_rate=1.2e-4,
        max_bytes=1_000_000_000_000, threads=8, dtype="bfloat16",
    ),
}  # fmt: skip

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
    """Mixtures of one seed and three experts: attention averaged or mixed, with equal data and with equal compute."""
    if scale not in SCALES:
        raise UserError(f"unknown scale '{scale}'", hint=did_you_mean(scale, SCALES))
    size = SCALES[scale]
    files = {
        "general": (pack / "text" / "wiki.train.jsonl.xz", GENERAL_LANGUAGES),
        "reviews": (pack / "text" / "en_reviews.jsonl.xz", ()),
        "maths": (pack / "sft" / "gsm8k_train.jsonl.xz", ()),
    }
    corpora: dict[str, Artifact] = {}
    for domain in DOMAINS:
        if domain == "code":
            corpora[domain] = plan.step(
                code_domain,
                name="text/code",
                max_bytes=min(size.max_bytes, 3_000_000),
                heldout_bytes=size.heldout_bytes,
            )
            continue
        path, languages = files[domain]
        corpora[domain] = plan.step(
            domain_text,
            name=f"text/{domain}",
            data=plan.input(path, name=f"data/{domain}"),
            domain=domain,
            fields=(),
            max_bytes=size.max_bytes,
            heldout_bytes=size.heldout_bytes,
            max_bad_share=0.01,
            seed=0,
            languages=languages,
        )
    tokenizer = plan.step(
        shared_tokenizer,
        name="tokenizer",
        corpora=corpora,
        vocabulary_size=size.vocabulary,
        sample_bytes=2_000_000,
        seed=0,
    )
    tokens = {
        domain: plan.step(
            tokenize_domain, name=f"tokens/{domain}", corpus=corpus, tokenizer=tokenizer, domain=domain
        )
        for domain, corpus in corpora.items()
    }
    evaluations: dict[str, Artifact] = {}
    latencies: list[Artifact] = []
    for seed in range(size.seeds):
        found = one_seed(plan, size, seed, corpora, tokenizer, tokens)
        for arm, model in found.items():
            evaluations[f"{arm}/{seed}"] = plan.step(
                evaluate_domains,
                name=f"evaluation/{arm}/{seed}",
                model=model,
                corpora=corpora,
                documents=size.documents,
                characters=2_000,
                threads=size.threads,
            )
        latencies.append(
            plan.step(
                latency,
                name=f"latency/{seed}",
                models={arm: found[arm] for arm in ("btx", "bam-shared", "bam")},
                prompt=256,
                new=16,
                rounds=size.rounds,
                threads=size.threads,
            )
        )
    judged = plan.step(
        judge, name="verdicts", evaluations=evaluations, latencies=latencies, scale=scale, seeds=size.seeds
    )
    plan.export(judged / "results.json", "results.json")
    plan.closing(f"The verdicts are in {plan.folder / 'results.json'} and {plan.folder / 'report.html'}.")


def one_seed(
    plan: Plan,
    size: Scale,
    seed: int,
    corpora: dict[str, Artifact],
    tokenizer: Artifact,
    tokens: dict[str, Artifact],
) -> dict[str, Artifact]:
    """All models of one random seed, by arm."""
    training = {
        "sequence_length": size.sequence_length,
        "batch_size": size.batch_size,
        "micro_batch_size": size.micro_batch_size,
        "dtype": size.dtype,
        "seed": seed,
        "threads": size.threads,
    }
    root = plan.step(
        new_seed,
        name=f"seed/{seed}",
        tokenizer=tokenizer,
        tokens=tokens,
        shares=(0.7, 0.1, 0.1, 0.1),
        hidden=size.hidden,
        layers=size.layers,
        heads=size.heads,
        kv_heads=size.kv_heads,
        intermediate=size.intermediate,
        steps=size.seed_steps,
        learning_rate=size.learning_rate,
        **training,
    )
    experts = {
        domain: plan.step(
            train_on,
            name=f"expert/{domain}/{seed}",
            model=root,
            tokens={domain: tokens[domain], "general": tokens["general"]},
            shares=(0.9, 0.1),
            steps=size.branch_steps,
            learning_rate=size.learning_rate / 2,
            min_rate_share=0.1,
            **training,
        )
        for domain in DOMAINS[1:]
    }
    # The paper trains mixtures as it pretrains.
    mixing = {
        "shares": (0.25,) * 4,
        "steps": size.mixture_steps,
        "learning_rate": size.learning_rate,
        "min_rate_share": 0.1,
    }
    found = {"seed": root, **{f"expert-{domain}": expert for domain, expert in experts.items()}}
    mixed = {
        arm: plan.step(
            mix,
            name=f"mixed/{arm}/{seed}",
            seed_model=root,
            experts=experts,
            corpora={domain: corpora[domain] for domain in experts},
            encoder="tfidf",
            domain_size=0,
            load_balancing=0.01,
            z_loss=0.001,
            seed=seed,
            **{"top_k": 1, "attention_top_k": 0, "seed_copies": 0, **about},
        )
        for arm, about in ARMS.items()
    }
    for arm in ARMS:
        found[arm] = plan.step(
            train_on, name=f"mixture/{arm}/{seed}", model=mixed[arm], tokens=tokens, **mixing, **training
        )
    for arm in MATCHED:
        for match in ("flops", "seconds"):
            found[f"{arm}-{match}"] = plan.step(
                train_matched,
                name=f"mixture/{arm}-{match}/{seed}",
                model=mixed[arm],
                reference=mixed["btx"],
                tokens=tokens,
                match=match,
                **mixing,
                **training,
            )
    return found
