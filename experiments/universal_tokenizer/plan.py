"""UT1 to UT9 of arXiv 2506.10766 on real text.

koine run experiments/universal_tokenizer/plan.py:universal_tokenizer --set pack=DATA
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.common.plans import choose_scale, export_verdicts
from experiments.universal_tokenizer.corpus import experiment_corpus
from experiments.universal_tokenizer.judge import judge
from koine.model import preset
from koine.plan import Artifact, Plan
from koine.steps.text_mixture import adaptation_sources, pretraining_sources
from koine.steps.tokenizers import build_tokenizer, move_to_tokenizer, tokenize_part
from koine.steps.trainer import Trainer
from koine.steps.training import HeldOutProbe

PRIMARY = ("en", "de", "fr", "it", "es", "pl", "pt", "ru", "bg", "uk", "hu", "nl")
EXPANDED = ("zh", "ja", "th", "vi", "id", "mn", "ky", "ar", "fa", "hi", "tr", "ta", "pa", "ur")
UNSEEN = ("kk", "as", "cy", "rw", "sah")
UNSEEN_WITH_CHATS = ("ko", "bn", "ml", "ca", "ro", "cs")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the experiment, and its languages."""

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

    @property
    def chat_languages(self) -> tuple[str, ...]:
        """Expanded languages that the data pack has chats of."""
        return tuple(code for code in self.expanded if code in CHAT_LANGUAGES)


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


CHAT_LANGUAGES = ("ar", "hi", "id", "ja", "fa", "ta", "th", "tr", "zh")
TOKENIZERS = {
    "universal": ("universal", "bucketed", "uniform"),
    "cluster": ("cluster", "bucketed", "uniform"),
    "uniform": ("universal", "uniform", "uniform"),
    "data-mass": ("universal", "bucketed", "data"),
}
"""Scope, scheme and bucket mass of each kind of tokenizer."""
ARMS = {
    "universal": ("universal", 0.0),
    "universal-5": ("universal", 0.05),
    "cluster": ("cluster", 0.0),
    "uniform": ("uniform", 0.0),
    "data-mass": ("data-mass", 0.0),
}
"""Tokenizer of each arm, and the share of expanded languages in its pretraining."""
MAIN_ARMS = ("universal", "cluster")
METHODS = ("random", "mean", "subword-mean", "focus", "distill")
"""Ways to initialise the embeddings of a replaced vocabulary."""


def universal_tokenizer(plan: Plan, *, pack: Path = Path("../shared/data"), scale: str = "laptop") -> None:
    """Four tokenizers, two pretraining mixes, three adaptations, vocabulary replacement, vocabulary sizes."""
    size = choose_scale(scale, SCALES)
    arms = Arms(plan, size, corpus_step(plan, pack, size))
    results: dict[str, Artifact] = {}
    bases: dict[tuple[str, int], Artifact] = {}
    for seed in range(size.primary_seeds):
        for arm, (kind, share) in ARMS.items():
            if seed < size.seeds or arm in MAIN_ARMS:
                bases[arm, seed] = arms.pretrained(arm, kind, size.vocabulary, seed, share)
                results[f"pretrained/{arm}/{seed}"] = bases[arm, seed]
    for seed in range(size.seeds):
        own = {arm: bases[arm, seed] for arm in ARMS}
        results |= continued_models(arms, own, seed)
        results |= chat_and_unseen_models(arms, own, seed)
        results |= sweep_models(arms, own, seed)
    judged = plan.step(
        judge,
        name="verdicts",
        corpus=arms.corpus,
        runs=results,
        tokens={kind: arms.documents(kind, size.vocabulary) for kind in TOKENIZERS},
        tokenizers={kind: arms.tokenizer(kind, size.vocabulary) for kind in TOKENIZERS},
        scale=scale,
        primary=size.primary,
        expanded=size.expanded,
        unseen=size.unseen,
        unseen_with_chats=size.unseen_with_chats,
        chat_languages=size.chat_languages,
        sweep=size.sweep,
        seeds=size.seeds,
        primary_seeds=size.primary_seeds,
    )
    export_verdicts(plan, judged)


def corpus_step(plan: Plan, pack: Path, size: Scale) -> Artifact:
    """Add the step that takes the experiment's text from the data pack."""
    return plan.step(
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


class Arms:
    """Adds tokenizers and trainings to a plan; a tokenizer and its tokens are added once."""

    def __init__(self, plan: Plan, size: Scale, corpus: Artifact) -> None:
        self.plan, self.size, self.corpus = plan, size, corpus
        plan.threads = plan.threads or size.threads
        self._tokenizers: dict[tuple[str, int], Artifact] = {}
        self._documents: dict[tuple[str, int], Artifact] = {}
        self._chats: dict[str, Artifact] = {}

    def tokenizer(self, kind: str, vocabulary: int) -> Artifact:
        """A tokenizer of one of `TOKENIZERS`; its documents' tokens are added with it."""
        if (kind, vocabulary) not in self._tokenizers:
            scope, scheme, mass = TOKENIZERS[kind]
            built = self.plan.step(
                build_tokenizer,
                name=f"tokenizer/{kind}-{vocabulary}",
                corpus=self.corpus,
                scope=scope,
                vocabulary_size=vocabulary,
                scheme=scheme,
                bucket_mass=mass,
                english_share=0.3,
                sample_bytes=4_000_000,
                seed=0,
            )
            self._tokenizers[kind, vocabulary] = built
            self._documents[kind, vocabulary] = self.plan.step(
                tokenize_part,
                name=f"tokens/{kind}-{vocabulary}",
                corpus=self.corpus,
                tokenizer=built,
                part="documents",
                domain="documents",
            )
        return self._tokenizers[kind, vocabulary]

    def documents(self, kind: str, vocabulary: int) -> Artifact:
        """Tokens of the documents."""
        self.tokenizer(kind, vocabulary)
        return self._documents[kind, vocabulary]

    def chats(self, kind: str) -> Artifact:
        """Tokens of the chats, with the scale's vocabulary."""
        if kind not in self._chats:
            self._chats[kind] = self.plan.step(
                tokenize_part,
                name=f"chats/{kind}",
                corpus=self.corpus,
                tokenizer=self.tokenizer(kind, self.size.vocabulary),
                part="questions/train",
                domain="chats",
            )
        return self._chats[kind]

    def trainer(self, seed: int) -> Trainer:
        """What all trainings of one random seed share."""
        return Trainer(
            plan=self.plan,
            sequence_length=self.size.sequence_length,
            batch_size=self.size.batch_size,
            micro_batch_size=self.size.batch_size,
            dtype="float32",
            seed=seed,
        )

    def pretrained(self, name: str, kind: str, vocabulary: int, seed: int, expanded_share: float) -> Artifact:
        """Pretrain on the primary languages, with a share of the expanded ones."""
        return self.trainer(seed).train(
            f"pretrained/{name}/{seed}",
            None,
            self.documents(kind, vocabulary),
            pretraining_sources(english_share=0.3, expanded_share=expanded_share),
            steps=self.size.pretrain_steps,
            learning_rate=self.size.learning_rate,
            settings={"evaluate_every": self.size.pretrain_steps},
            tokenizer=self.tokenizer(kind, vocabulary),
            corpus=self.corpus,
            config=preset(self.size.preset, vocabulary),
            probe=HeldOutProbe(groups={"primary": ("primary",)}, max_bytes=3_000, track_languages=True),
        )

    def adapted(
        self,
        name: str,
        kind: str,
        model: Artifact,
        seed: int,
        *,
        languages: tuple[str, ...],
        steps: int,
        primary_share: float = 0.0,
        data: str = "text",
    ) -> Artifact:
        """Train a model further on some languages; data: `text` or `chats`."""
        vocabulary, chats = self.size.vocabulary, data == "chats"
        return self.trainer(seed).train(
            f"adapted/{name}/{seed}",
            model,
            self.chats(kind) if chats else self.documents(kind, vocabulary),
            adaptation_sources(languages, primary_share),
            steps=steps,
            learning_rate=self.size.learning_rate / 2,
            packing="no_split" if chats else "concat",
            settings={"schedule": "constant", "evaluate_every": max(1, steps // self.size.evaluations)},
            tokenizer=self.tokenizer(kind, vocabulary),
            corpus=self.corpus,
            objective="fine-tuning" if chats else "language-modelling",
            config=preset(self.size.preset, vocabulary),
            probe=HeldOutProbe(
                groups={"primary": ("primary",), "adapted": languages},
                documents=2,
                max_bytes=2_000,
                track_languages=True,
            ),
        )


def continued_models(arms: Arms, bases: Mapping[str, Artifact], seed: int) -> dict[str, Artifact]:
    """Continued pretraining on the expanded languages: every arm, and Cluster with a replaced vocabulary."""
    size = arms.size

    def continued(name: str, kind: str, model: Artifact) -> Artifact:
        return arms.adapted(
            name, kind, model, seed, languages=size.expanded, steps=size.adapt_steps, primary_share=0.2
        )

    found = {
        f"continued/{arm}/{seed}": continued(f"continued/{arm}", kind, bases[arm])
        for arm, (kind, _) in ARMS.items()
    }
    for method in METHODS:
        moved = arms.plan.step(
            move_to_tokenizer,
            name=f"moved/{method}/{seed}",
            model=bases["cluster"],
            tokenizer=arms.tokenizer("universal", size.vocabulary),
            corpus=arms.corpus,
            method=method,
            languages=size.primary + size.expanded,
            seed=seed,
        )
        name = f"continued/replaced-{method}"
        found[f"{name}/{seed}"] = continued(name, "universal", moved)
    return found


def chat_and_unseen_models(arms: Arms, bases: Mapping[str, Artifact], seed: int) -> dict[str, Artifact]:
    """Fine-tuning on chats of expanded languages, and on text and chats of each unseen one."""
    size = arms.size
    found = {}
    for arm in MAIN_ARMS:
        base = bases[arm]
        found[f"chats/{arm}/{seed}"] = arms.adapted(
            f"chats/{arm}",
            arm,
            base,
            seed,
            languages=size.chat_languages,
            steps=size.chat_steps,
            data="chats",
        )
        for run, data, codes in (
            ("unseen", "text", size.unseen),
            ("unseen-chats", "chats", size.unseen_with_chats),
        ):
            for code in codes:
                name = f"{run}-{code}/{arm}"
                found[f"{name}/{seed}"] = arms.adapted(
                    name, arm, base, seed, languages=(code,), steps=size.unseen_steps, data=data
                )
    return found


def sweep_models(arms: Arms, bases: Mapping[str, Artifact], seed: int) -> dict[str, Artifact]:
    """Pretraining of both main arms at every size of the vocabulary."""
    return {
        f"sweep-{vocabulary}/{arm}/{seed}": bases[arm]
        if vocabulary == arms.size.vocabulary
        else arms.pretrained(f"{arm}-{vocabulary}", arm, vocabulary, seed, 0.0)
        for vocabulary in arms.size.sweep
        for arm in MAIN_ARMS
    }
