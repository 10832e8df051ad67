"""RN1 to RN9 of arXiv 2501.18795 and CA1 of arXiv 2504.00698.

koine run experiments/rope_to_nope/plan.py:rope_to_nope --set pack=DATA
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.common.plans import choose_scale, export_verdicts
from experiments.rope_to_nope.judge import judge
from experiments.rope_to_nope.needles import needle_corpus
from experiments.rope_to_nope.stages import extend, pretrain_short
from koine.plan import Artifact, Plan

BASE_THETA = 10_000.0
ARMS: dict[str, tuple[str, float]] = {
    "rope": ("rope", 2_000_000.0),
    "qk-norm": ("qk-norm", 2_000_000.0),
    "nope": ("nope", BASE_THETA),
    "rnope-10k": ("rnope", 10_000.0),
    "rnope-100k": ("rnope", 100_000.0),
    "rnope-2m": ("rnope", 2_000_000.0),
    "rnope-4m": ("rnope", 4_000_000.0),
    "swa-1": ("swa-1", BASE_THETA),
    "swa-3": ("swa-3", BASE_THETA),
    "swa-7": ("swa-7", BASE_THETA),
}
"""Layers of each arm (`stages.layers_of`) and RoPE's theta in the second stage; it is 10,000 in the first."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the experiment; lengths in tokens.

    The window is half the short length and a sixteenth of the long one.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    short: int
    long: int
    documents: int
    long_documents: int
    seeds: int
    pretrain_steps: int
    extend_steps: int
    tokens_per_step: int
    learning_rate: float
    prompts: int
    attention_prompts: int
    threads: int
    dtype: str = "bfloat16"
    arms: tuple[str, ...] = tuple(ARMS)

    @property
    def window(self) -> int:
        return self.short // 2


LAPTOP = Scale(
    layers=8,
    hidden=64,
    intermediate=128,
    heads=2,
    kv_heads=2,
    vocabulary=1024,
    short=128,
    long=1024,
    documents=12_000,
    long_documents=1_500,
    seeds=3,
    pretrain_steps=5_000,
    extend_steps=400,
    tokens_per_step=2048,
    learning_rate=2e-3,
    prompts=24,
    attention_prompts=12,
    threads=1,
)
SCALES = {
    "smoke": replace(
        LAPTOP,
        hidden=32,
        intermediate=32,
        heads=1,
        kv_heads=1,
        short=64,
        long=256,
        documents=60,
        long_documents=20,
        seeds=1,
        pretrain_steps=3,
        extend_steps=2,
        tokens_per_step=512,
        prompts=2,
        attention_prompts=2,
    ),
    "laptop": LAPTOP,
    # Twice the layers, so that 3:1 has as many full layers as 1:1 has in eight. Only RoPE stands beside it.
    "laptop-deep": replace(LAPTOP, layers=16, dtype="float32", arms=("rope", "swa-3")),
    "gpu": replace(
        LAPTOP,
        layers=16,
        hidden=512,
        intermediate=1536,
        heads=8,
        kv_heads=2,
        vocabulary=4096,
        short=1024,
        long=8192,
        documents=60_000,
        long_documents=8_000,
        pretrain_steps=4_000,
        extend_steps=800,
        tokens_per_step=65_536,
        learning_rate=1e-3,
        prompts=64,
        attention_prompts=32,
        threads=4,
    ),
    # The paper's own sizes, where they are known; planned, not run.
    "cluster": replace(
        LAPTOP,
        layers=32,
        hidden=4096,
        intermediate=14_336,
        heads=32,
        kv_heads=8,
        vocabulary=256_000,
        short=8192,
        long=65_536,
        documents=1_000_000,
        long_documents=100_000,
        pretrain_steps=179_000,
        extend_steps=2_000,
        tokens_per_step=4_194_304,
        learning_rate=7e-3,
        prompts=200,
        attention_prompts=100,
        threads=8,
    ),
}


def rope_to_nope(plan: Plan, *, pack: Path = Path("../shared/data"), scale: str = "laptop") -> None:
    """Ten position encodings, trained short, extended, and tested on books up to four times as long."""
    size = choose_scale(scale, SCALES)
    texts = plan.input(pack / "text" / "en_books.jsonl.xz", name="data/en_books")
    corpus = plan.step(
        needle_corpus,
        name="corpus",
        texts=texts,
        vocabulary=size.vocabulary,
        short=size.short,
        long=size.long,
        documents=size.documents,
        long_documents=size.long_documents,
        seed=0,
    )
    results: dict[str, Artifact] = {}
    for seed in range(size.seeds):
        results |= trained_arms(plan, size, seed, corpus=corpus, texts=texts)
    judged = plan.step(
        judge,
        name="verdicts",
        runs=results,
        scale=scale,
        arms=size.arms,
        seeds=size.seeds,
        short=size.short,
        long=size.long,
        layers=size.layers,
        hidden=size.hidden,
        heads=size.heads,
        kv_heads=size.kv_heads,
        threads=size.threads,
    )
    export_verdicts(plan, judged)


def trained_arms(
    plan: Plan, size: Scale, seed: int, *, corpus: Artifact, texts: Artifact
) -> dict[str, Artifact]:
    """Train every arm of one random seed in two stages; arms with the same layers share the first."""
    common: dict[str, Any] = {
        "num_layers": size.layers,
        "hidden": size.hidden,
        "intermediate": size.intermediate,
        "heads": size.heads,
        "kv_heads": size.kv_heads,
        "window": size.window,
        "tokens_per_step": size.tokens_per_step,
        "threads": size.threads,
        "dtype": size.dtype,
    }
    results: dict[str, Artifact] = {}
    short: dict[str, Artifact] = {}
    for arm in size.arms:
        variant, theta = ARMS[arm]
        if variant not in short:
            short[variant] = plan.step(
                pretrain_short,
                name=f"short/{variant}/{seed}",
                corpus=corpus,
                texts=texts,
                variant=variant,
                theta=BASE_THETA,
                length=size.short,
                longest=4 * size.long,
                steps=size.pretrain_steps,
                learning_rate=size.learning_rate,
                prompts=size.prompts,
                seed=seed,
                **common,
            )
        results[f"{arm}/{seed}"] = plan.step(
            extend,
            name=f"long/{arm}/{seed}",
            corpus=corpus,
            texts=texts,
            model=short[variant],
            theta=theta,
            short=size.short,
            long=size.long,
            steps=size.extend_steps,
            learning_rate=size.learning_rate / 2,
            prompts=size.prompts,
            attention_prompts=size.attention_prompts,
            seed=seed,
            **common,
        )
    return results
