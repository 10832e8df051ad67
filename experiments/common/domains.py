"""Shared by the experiments on domains (bam, nexus, merging): text, tokens, training and evaluation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.files import read_json
from koine.model import LayerSpec, ModelConfig
from koine.plan import Artifact, Plan
from koine.steps.domain_corpora import code_domain, domain_text, shared_tokenizer, tokenize_domain
from koine.steps.evaluation import evaluate_domains
from koine.steps.text_mixture import domain_sources
from koine.steps.trainer import Trainer as StepTrainer

MOST_CODE_BYTES = 3_000_000
"""The standard library has little more text than this."""
CHARACTERS = 2_000
"""Length to which a held-out document is cut."""


@dataclass(frozen=True, kw_only=True)
class DomainScale:
    """Sizes of an experiment on domains; each experiment adds its own."""

    layers: int = 4
    heads: int = 4
    vocabulary: int = 2048
    sequence_length: int = 256
    batch_size: int = 8
    micro_batch_size: int = 8
    seed_steps: int = 800
    branch_steps: int = 250
    learning_rate: float = 2e-3
    max_bytes: int = 3_000_000
    heldout_bytes: int = 60_000
    documents: int = 60
    seeds: int = 3
    threads: int = 1
    dtype: str = "float32"


@dataclass(frozen=True)
class PackFile:
    """A file of the data pack, and the languages taken from it (all, where none is named)."""

    path: str
    languages: tuple[str, ...] = ()


WIKI, SPOKEN = "text/wiki.train.jsonl.xz", "text/cv.train.jsonl.xz"
GENERAL = PackFile(WIKI, ("pt", "it", "pl", "tr"))
REVIEWS = PackFile("text/en_reviews.jsonl.xz")
SPEECHES = PackFile("text/en_speeches.jsonl.xz")
MATHS = PackFile("sft/gsm8k_train.jsonl.xz")


@dataclass(frozen=True)
class Domains:
    """Text and tokens of each domain, and the tokenizer of all."""

    corpora: dict[str, Artifact]
    tokenizer: Artifact
    tokens: dict[str, Artifact]


def prepare_domains(
    plan: Plan,
    size: DomainScale,
    texts: Mapping[str, tuple[Artifact, tuple[str, ...]] | None],
    *,
    sample_bytes: int = 2_000_000,
) -> Domains:
    """Add the steps that make the text, the tokenizer and the tokens of each domain.

    texts: data and languages of each domain; `None` for code, which is Python's standard library.
    """
    corpora = {}
    for domain, source in texts.items():
        if source is None:
            corpora[domain] = plan.step(
                code_domain,
                name=f"text/{domain}",
                max_bytes=min(size.max_bytes, MOST_CODE_BYTES),
                heldout_bytes=size.heldout_bytes,
            )
            continue
        data, languages = source
        corpora[domain] = plan.step(
            domain_text,
            name=f"text/{domain}",
            data=data,
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
        sample_bytes=sample_bytes,
        seed=0,
    )
    tokens = {
        domain: plan.step(
            tokenize_domain, name=f"tokens/{domain}", corpus=corpus, tokenizer=tokenizer, domain=domain
        )
        for domain, corpus in corpora.items()
    }
    return Domains(corpora, tokenizer, tokens)


def pack_inputs(
    plan: Plan, pack: Path, files: Mapping[str, PackFile | None]
) -> dict[str, tuple[Artifact, tuple[str, ...]] | None]:
    """Make each domain's file an input of the plan, as `prepare_domains` takes it."""
    return {
        domain: file
        if file is None
        else (plan.input(pack / file.path, name=f"data/{domain}"), file.languages)
        for domain, file in files.items()
    }


class Trainer:
    """Adds the training steps of one random seed to a plan."""

    def __init__(self, plan: Plan, size: DomainScale, seed: int, domains: Domains) -> None:
        self.plan, self.size, self.seed, self.domains = plan, size, seed, domains
        plan.threads = plan.threads or size.threads
        self.steps = StepTrainer(
            plan=plan,
            sequence_length=size.sequence_length,
            batch_size=size.batch_size,
            micro_batch_size=size.micro_batch_size,
            dtype=size.dtype,
            seed=seed,
        )

    def pretrain(
        self, name: str, shares: Mapping[str, float], *, hidden: int, kv_heads: int, intermediate: int
    ) -> Artifact:
        """Train a dense model from random weights on domains in the given shares.

        Every layer has full attention with RoPE, as in arXiv 2408.08274.
        """
        config = ModelConfig(
            vocab_size=self.size.vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_heads=self.size.heads,
            num_kv_heads=kv_heads,
            head_dim=hidden // self.size.heads,
            layers=(LayerSpec(),) * self.size.layers,
            logit_scale=1.0,
        )
        return self.steps.train(
            f"{name}/{self.seed}",
            None,
            self.domains.tokens,
            domain_sources(shares),
            steps=self.size.seed_steps,
            learning_rate=self.size.learning_rate,
            tokenizer=self.domains.tokenizer,
            config=config,
        )

    def train(
        self,
        name: str,
        model: Artifact,
        shares: Mapping[str, float],
        *,
        steps: int,
        rate: float,
        min_lr_ratio: float = 0.1,
    ) -> Artifact:
        """Train a model further; rate: of the scale's learning rate."""
        return self.steps.train(
            f"{name}/{self.seed}",
            model,
            self.domains.tokens,
            domain_sources(shares),
            steps=steps,
            learning_rate=self.size.learning_rate * rate,
            settings={"min_lr_ratio": min_lr_ratio},
        )


def evaluate_arms(
    plan: Plan,
    size: DomainScale,
    seed: int,
    models: Mapping[str, Artifact],
    corpora: Mapping[str, Artifact],
) -> dict[str, Artifact]:
    """Add an evaluation of each arm's model on the held-out text of each domain; named `ARM/SEED`."""
    return {
        f"{arm}/{seed}": plan.step(
            evaluate_domains,
            name=f"evaluation/{arm}/{seed}",
            model=model,
            corpora=dict(corpora),
            documents=size.documents,
            characters=CHARACTERS,
        )
        for arm, model in models.items()
    }


@dataclass(frozen=True)
class DomainRuns:
    """Evaluations by `ARM/SEED`; every measure is a list with one value a seed."""

    evaluations: Mapping[str, Any]
    seeds: Sequence[int]

    @classmethod
    def read(cls, folders: Mapping[str, Path], seeds: int) -> DomainRuns:
        """Read the outputs of `evaluate_arms`."""
        return cls(
            {name: read_json(path / "evaluation.json") for name, path in folders.items()}, range(seeds)
        )

    def mean(self, arm: str) -> list[float]:
        """Bits per byte, the mean over domains that the evaluation itself states."""
        return [self.evaluations[f"{arm}/{seed}"]["mean"] for seed in self.seeds]

    def bits(
        self, arm: str, texts: Sequence[str] | None = None, *, without: Sequence[str] = ()
    ) -> list[float]:
        """Bits per byte, the mean over `texts`; by default over all that are not in `without`."""
        found = []
        for seed in self.seeds:
            by_text = self.evaluations[f"{arm}/{seed}"]["bits_per_byte"]
            wanted = [name for name in by_text if name not in without] if texts is None else texts
            found.append(statistics.mean(by_text[name] for name in wanted))
        return found

    def share(self, arm: str, domain: str, expert: str) -> list[float]:
        """Share of a domain's tokens that go to an expert."""
        return [self.evaluations[f"{arm}/{seed}"]["routing"][domain]["chosen"][expert] for seed in self.seeds]
