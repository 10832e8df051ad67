"""NX1 to NX4 of arXiv 2408.15901: `koine run experiments/nexus/plan.py:nexus --set pack=DATA`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.nexus.judge import NEW, judge
from koine.errors import UserError, did_you_mean
from koine.plan import Artifact, Plan
from koine.steps.domain_corpora import code_domain, domain_text, shared_tokenizer, tokenize_domain
from koine.steps.mixtures import evaluate_domains, grow, mix, new_seed, train_on

EXPERTS = ("reviews", "speeches", "maths", "spoken")
KNOWN = ("general", *EXPERTS)
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "general": ("text/wiki.train.jsonl.xz", ("pt", "it", "pl", "tr")),
    "reviews": ("text/en_reviews.jsonl.xz", ()),
    "speeches": ("text/en_speeches.jsonl.xz", ()),
    "maths": ("sft/gsm8k_train.jsonl.xz", ()),
    "spoken": ("text/cv.train.jsonl.xz", ("de", "fr")),
}
ROUTERS = {
    "nexus": ("nexus", 0.05),
    "linear": ("nexus-linear", 0.05),
    "nexus-low": ("nexus", 0.0005),
    "linear-low": ("nexus-linear", 0.0005),
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run."""

    hidden: int = 96
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 192
    vocabulary: int = 2048
    domain_size: int = 32
    sequence_length: int = 256
    batch_size: int = 8
    micro_batch_size: int = 8
    seed_steps: int = 800
    branch_steps: int = 250
    mixture_steps: int = 250
    budgets: tuple[int, ...] = (25, 60, 120)
    learning_rate: float = 2e-3
    max_bytes: int = 3_000_000
    heldout_bytes: int = 60_000
    documents: int = 60
    seeds: int = 3
    threads: int = 1
    dtype: str = "float32"


SCALES = {
    "smoke": Scale(
        hidden=32, layers=2, heads=2, kv_heads=1, intermediate=32, vocabulary=512, domain_size=4, sequence_length=32, batch_size=2,
        micro_batch_size=2, seed_steps=2, branch_steps=2, mixture_steps=2, budgets=(1, 2), max_bytes=40_000, heldout_bytes=2_000,
        documents=2, seeds=1,
    ),
    "laptop": Scale(),
    "gpu": Scale(
        hidden=512, layers=8, heads=8, kv_heads=8, intermediate=1024, vocabulary=16_384, domain_size=256, sequence_length=1024,
        batch_size=64, micro_batch_size=32, seed_steps=4_000, branch_steps=1_500, mixture_steps=1_500, budgets=(100, 250, 500),
        learning_rate=1e-3, max_bytes=20_000_000, threads=8, dtype="bfloat16",
    ),
    # The paper's small model, as far as its sizes are known; planned, not run.
    "cluster": Scale(
        hidden=1024, layers=12, heads=16, kv_heads=16, intermediate=4096, vocabulary=256_000, domain_size=1024, sequence_length=4096,
        batch_size=256, micro_batch_size=8, seed_steps=700_000, branch_steps=24_000, mixture_steps=24_000, budgets=(190, 480, 950),
        learning_rate=1e-3, max_bytes=1_000_000_000_000, threads=8, dtype="bfloat16",
    ),
}  # fmt: skip


def nexus(plan: Plan, *, pack: Path = Path("../shared/data"), scale: str = "laptop") -> None:
    """Mixtures of four experts with a projecting and with a linear router; a fifth expert added, for three budgets of tuning."""
    if scale not in SCALES:
        raise UserError(f"unknown scale '{scale}'", hint=did_you_mean(scale, SCALES))
    size = SCALES[scale]
    corpora = {
        domain: plan.step(
            domain_text,
            name=f"text/{domain}",
            data=plan.input(pack / path, name=f"data/{domain}"),
            domain=domain,
            fields=(),
            max_bytes=size.max_bytes,
            heldout_bytes=size.heldout_bytes,
            max_bad_share=0.01,
            seed=0,
            languages=languages,
        )
        for domain, (path, languages) in FILES.items()
    }
    # The tokenizer knows the new domain: only the models do not.
    corpora[NEW] = plan.step(
        code_domain,
        name=f"text/{NEW}",
        max_bytes=min(size.max_bytes, 3_000_000),
        heldout_bytes=size.heldout_bytes,
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
    evaluations = {
        f"{arm}/{seed}": plan.step(
            evaluate_domains,
            name=f"evaluation/{arm}/{seed}",
            model=model,
            corpora=corpora,
            documents=size.documents,
            characters=2_000,
            threads=size.threads,
        )
        for seed in range(size.seeds)
        for arm, model in one_seed(plan, size, seed, corpora, tokenizer, tokens).items()
    }
    judged = plan.step(
        judge, name="verdicts", evaluations=evaluations, scale=scale, seeds=size.seeds, budgets=size.budgets
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
    known = {domain: tokens[domain] for domain in KNOWN}
    root = plan.step(
        new_seed,
        name=f"seed/{seed}",
        tokenizer=tokenizer,
        tokens=known,
        shares=(0.6, 0.1, 0.1, 0.1, 0.1),
        hidden=size.hidden,
        layers=size.layers,
        heads=size.heads,
        kv_heads=size.kv_heads,
        intermediate=size.intermediate,
        steps=size.seed_steps,
        learning_rate=size.learning_rate,
        **training,
    )

    def branch(domain: str) -> Artifact:
        return plan.step(
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

    experts = {domain: branch(domain) for domain in EXPERTS}
    new = branch(NEW)
    found = {"seed": root, "expert-new": new}

    def mixed(arm: str, method: str, load_balancing: float) -> Artifact:
        return plan.step(
            mix,
            name=f"mixed/{arm}/{seed}",
            seed_model=root,
            experts=experts,
            corpora={domain: corpora[domain] for domain in EXPERTS},
            method=method,
            top_k=1,
            attention_top_k=0,
            encoder="tfidf",
            domain_size=size.domain_size,
            load_balancing=load_balancing,
            z_loss=0.0,
            seed=seed,
        )

    found["average"] = mixed("average", "average", 0.0)
    for arm, (method, load_balancing) in ROUTERS.items():
        found[arm] = plan.step(
            train_on,
            name=f"mixture/{arm}/{seed}",
            model=mixed(arm, method, load_balancing),
            tokens=known,
            shares=(0.2,) * 5,
            steps=size.mixture_steps,
            learning_rate=size.learning_rate,
            min_rate_share=0.3,
            **training,
        )
    for arm in ("nexus", "linear"):
        grown = plan.step(
            grow,
            name=f"grown/{arm}/{seed}",
            model=found[arm],
            expert=new,
            corpus=corpora[NEW],
            domain=NEW,
            reset_router=arm == "linear",
            seed=seed,
        )
        found[f"{arm}-0"] = grown
        for steps in size.budgets:
            found[f"{arm}-{steps}"] = plan.step(
                train_on,
                name=f"extended/{arm}-{steps}/{seed}",
                model=grown,
                tokens={NEW: tokens[NEW], **known},
                shares=(0.5, *(0.1,) * 5),
                steps=steps,
                learning_rate=size.learning_rate * 0.3,
                min_rate_share=1.0,
                **training,
            )
    return found
