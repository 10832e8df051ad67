"""UT1 to UT9 of arXiv 2506.10766 on real text: `koine run experiments/universal_tokenizer/plan.py:universal_tokenizer --set pack=DATA`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from experiments.common.plans import choose_scale, export_verdicts
from experiments.universal_tokenizer.corpus import experiment_corpus
from experiments.universal_tokenizer.judge import judge
from koine.plan import Artifact, Plan
from koine.steps.adaptation import adapt_to, move_to_tokenizer
from koine.steps.tokenizers import build_tokenizer, tokenize_part
from koine.steps.training import pretrain

PRIMARY = ("en", "de", "fr", "it", "es", "pl", "pt", "ru", "bg", "uk", "hu", "nl")
EXPANDED = ("zh", "ja", "th", "vi", "id", "mn", "ky", "ar", "fa", "hi", "tr", "ta", "pa", "ur")
UNSEEN = ("kk", "as", "cy", "rw", "sah")
UNSEEN_WITH_CHATS = ("ko", "bn", "ml", "ca", "ro", "cs")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run."""

    preset: str
    vocabulary: int
    sweep: tuple[int, ...]
    seeds: int
    primary_seeds: int
    pretrain_steps: int
    adapt_steps: int
    chat_steps: int
    unseen_steps: int
    evaluations: int
    sequence_length: int
    batch_size: int
    learning_rate: float
    max_bytes: int
    threads: int
    primary: tuple[str, ...] = PRIMARY
    expanded: tuple[str, ...] = EXPANDED
    unseen: tuple[str, ...] = UNSEEN
    unseen_with_chats: tuple[str, ...] = UNSEEN_WITH_CHATS


LAPTOP = Scale(
    preset="koine-0.5m",
    vocabulary=4096,
    sweep=(1024, 4096, 16384),
    seeds=3,
    primary_seeds=5,
    pretrain_steps=800,
    adapt_steps=300,
    chat_steps=120,
    unseen_steps=100,
    evaluations=12,
    sequence_length=256,
    batch_size=4,
    learning_rate=6e-3,
    max_bytes=300_000,
    threads=1,
)
SCALES = {
    "smoke": replace(
        LAPTOP,
        vocabulary=700,
        sweep=(600, 700),
        seeds=1,
        primary_seeds=1,
        pretrain_steps=4,
        adapt_steps=4,
        chat_steps=3,
        unseen_steps=2,
        evaluations=2,
        sequence_length=64,
        max_bytes=40_000,
        primary=("en", "de"),
        expanded=("hi", "tr"),
        unseen=("kk",),
        unseen_with_chats=("ko",),
    ),
    "laptop": LAPTOP,
    "gpu": replace(
        LAPTOP,
        preset="koine-35m",
        vocabulary=32_768,
        sweep=(8_192, 16_384, 32_768, 65_536),
        pretrain_steps=3_000,
        adapt_steps=1_000,
        sequence_length=1_024,
        batch_size=32,
        learning_rate=2e-3,
        max_bytes=5_000_000,
        threads=4,
    ),
}


def universal_tokenizer(plan: Plan, *, pack: Path = Path("../shared/data"), scale: str = "laptop") -> None:
    """Universal, Cluster and Uniform tokenizers; 0 % and 5 % arms; three regimes; vocabulary replacement; a vocabulary sweep."""
    size = choose_scale(scale, SCALES)
    corpus = plan.step(
        experiment_corpus,
        name="corpus",
        texts=[
            plan.input(pack / "text" / f"{source}.{split}.jsonl.xz", name=f"data/{source}.{split}")
            for source in ("cv", "wiki")
            for split in ("train", "valid")
        ],
        chats=plan.input(pack / "sft" / "tldr_shell.jsonl.xz", name="data/tldr_shell"),
        primary=size.primary,
        expanded=size.expanded,
        unseen=size.unseen,
        unseen_with_chats=size.unseen_with_chats,
        max_bytes=size.max_bytes,
    )
    kinds = {
        "universal": ("universal", "bucketed", "uniform"),
        "cluster": ("cluster", "bucketed", "uniform"),
        "uniform": ("universal", "uniform", "uniform"),
        "data-mass": ("universal", "bucketed", "data"),
    }
    tokenizers: dict[tuple[str, int], Artifact] = {}
    documents: dict[tuple[str, int], Artifact] = {}
    chats: dict[str, Artifact] = {}

    def tokenizer(kind: str, vocabulary: int) -> Artifact:
        if (kind, vocabulary) not in tokenizers:
            scope, scheme, mass = kinds[kind]
            built = plan.step(
                build_tokenizer,
                name=f"tokenizer/{kind}-{vocabulary}",
                corpus=corpus,
                scope=scope,
                vocabulary_size=vocabulary,
                scheme=scheme,
                bucket_mass=mass,
                english_share=0.3,
                sample_bytes=4_000_000,
                seed=0,
            )
            tokenizers[kind, vocabulary] = built
            documents[kind, vocabulary] = plan.step(
                tokenize_part,
                name=f"tokens/{kind}-{vocabulary}",
                corpus=corpus,
                tokenizer=built,
                part="documents",
                domain="documents",
            )
        return tokenizers[kind, vocabulary]

    def common(seed: int, vocabulary: int) -> dict[str, object]:
        return {
            "preset": size.preset,
            "vocabulary_size": vocabulary,
            "sequence_length": size.sequence_length,
            "batch_size": size.batch_size,
            "micro_batch_size": size.batch_size,
            "dtype": "float32",
            "seed": seed,
            "threads": size.threads,
        }

    def pretrained(name: str, kind: str, vocabulary: int, seed: int, expanded_share: float) -> Artifact:
        found = tokenizer(kind, vocabulary)
        return plan.step(
            pretrain,
            name=f"pretrained/{name}/{seed}",
            corpus=corpus,
            tokenizer=found,
            documents=documents[kind, vocabulary],
            steps=size.pretrain_steps,
            learning_rate=size.learning_rate,
            code_share=0.0,
            english_share=0.3,
            expanded_share=expanded_share,
            evaluate_every=size.pretrain_steps,
            track_languages=True,
            **common(seed, vocabulary),
        )

    def adapted(
        name: str,
        kind: str,
        model: Artifact,
        seed: int,
        *,
        languages: tuple[str, ...],
        steps: int,
        primary_share: float,
        what: str = "text",
    ) -> Artifact:
        if what == "chats" and kind not in chats:
            chats[kind] = plan.step(
                tokenize_part,
                name=f"chats/{kind}",
                corpus=corpus,
                tokenizer=tokenizer(kind, size.vocabulary),
                part="questions/train",
                domain="chats",
            )
        return plan.step(
            adapt_to,
            name=f"adapted/{name}/{seed}",
            corpus=corpus,
            tokenizer=tokenizer(kind, size.vocabulary),
            model=model,
            tokens=chats[kind] if what == "chats" else documents[kind, size.vocabulary],
            kind=what,
            languages=languages,
            primary_share=primary_share,
            steps=steps,
            learning_rate=size.learning_rate / 2,
            evaluate_every=max(1, steps // size.evaluations),
            evaluation_documents=2,
            evaluation_bytes=2_000,
            **common(seed, size.vocabulary),
        )

    results: dict[str, Artifact] = {}
    bases: dict[tuple[str, int], Artifact] = {}
    arms = {
        "universal": ("universal", 0.0),
        "universal-5": ("universal", 0.05),
        "cluster": ("cluster", 0.0),
        "uniform": ("uniform", 0.0),
        "data-mass": ("data-mass", 0.0),
    }
    for seed in range(size.primary_seeds):
        for arm, (kind, share) in arms.items():
            if seed < size.seeds or arm in ("universal", "cluster"):
                bases[arm, seed] = pretrained(arm, kind, size.vocabulary, seed, share)
                results[f"pretrained/{arm}/{seed}"] = bases[arm, seed]
    with_chats = tuple(code for code in size.expanded if code in CHAT_LANGUAGES)
    for seed in range(size.seeds):
        for arm, (kind, _) in arms.items():
            results[f"continued/{arm}/{seed}"] = adapted(
                f"continued/{arm}",
                kind,
                bases[arm, seed],
                seed,
                languages=size.expanded,
                steps=size.adapt_steps,
                primary_share=0.2,
            )
        for method in ("random", "mean", "subword-mean", "focus", "distill"):
            moved = plan.step(
                move_to_tokenizer,
                name=f"moved/{method}/{seed}",
                model=bases["cluster", seed],
                tokenizer=tokenizer("universal", size.vocabulary),
                corpus=corpus,
                method=method,
                languages=size.primary + size.expanded,
                seed=seed,
            )
            results[f"continued/replaced-{method}/{seed}"] = adapted(
                f"continued/replaced-{method}",
                "universal",
                moved,
                seed,
                languages=size.expanded,
                steps=size.adapt_steps,
                primary_share=0.2,
            )
        for arm in ("universal", "cluster"):
            results[f"chats/{arm}/{seed}"] = adapted(
                f"chats/{arm}",
                arm,
                bases[arm, seed],
                seed,
                languages=with_chats,
                steps=size.chat_steps,
                primary_share=0.0,
                what="chats",
            )
            for run, what, codes in (
                ("unseen", "text", size.unseen),
                ("unseen-chats", "chats", size.unseen_with_chats),
            ):
                for code in codes:
                    results[f"{run}-{code}/{arm}/{seed}"] = adapted(
                        f"{run}-{code}/{arm}",
                        arm,
                        bases[arm, seed],
                        seed,
                        languages=(code,),
                        steps=size.unseen_steps,
                        primary_share=0.0,
                        what=what,
                    )
        for vocabulary in size.sweep:
            for arm in ("universal", "cluster"):
                results[f"sweep-{vocabulary}/{arm}/{seed}"] = (
                    bases[arm, seed]
                    if vocabulary == size.vocabulary
                    else pretrained(f"{arm}-{vocabulary}", arm, vocabulary, seed, 0.0)
                )
    judged = plan.step(
        judge,
        name="verdicts",
        corpus=corpus,
        runs=results,
        tokens={kind: documents[kind, size.vocabulary] for kind in kinds},
        tokenizers={kind: tokenizers[kind, size.vocabulary] for kind in kinds},
        scale=scale,
        primary=size.primary,
        expanded=size.expanded,
        unseen=size.unseen,
        unseen_with_chats=size.unseen_with_chats,
        chat_languages=with_chats,
        sweep=size.sweep,
        seeds=size.seeds,
        primary_seeds=size.primary_seeds,
    )
    export_verdicts(plan, judged)


CHAT_LANGUAGES = ("ar", "hi", "id", "ja", "fa", "ta", "th", "tr", "zh")
