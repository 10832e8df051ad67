"""Give a model a longer context, as Command A's cooldown does: stages of growing length, long batches among short ones."""

from __future__ import annotations

from pathlib import Path

from koine.errors import UserError
from koine.hardware import chosen_dtype
from koine.plan import Artifact, Plan
from koine.steps.context_extension import compare_lengths, evaluate_lengths, extend_stage
from koine.steps.corpora import text_corpus
from koine.steps.tokenizers import tokenize_part


def extend(
    plan: Plan,
    *,
    model: Path,
    data: Path,
    long_data: Path | None = None,
    fields: tuple[str, ...] = (),
    languages: tuple[str, ...] = (),
    lengths: tuple[int, ...] = (512, 2048, 8192),
    steps: tuple[int, ...] = (300, 100, 50),
    thetas: tuple[float, ...] = (),
    long_every: int = 4,
    long_share_of_length: float = 0.5,
    batch_size: int = 8,
    micro_batch_size: int = 4,
    learning_rate: float = 5e-4,
    final_rate_share: float = 0.1,
    dtype: str = "auto",
    evaluation_documents: int = 8,
    max_bytes_per_language: int = 20_000_000,
    min_bytes_per_language: int = 20_000,
    max_bad_share: float = 0.01,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """A directory of our model, text with language codes, and the lengths to grow to; bits per byte at each length after each stage.

    The first stage has rows of the first length alone; in each later one every `long_every`-th step (1: all) is of rows of its length, of
    documents that fill at least `long_share_of_length` of one, and the others are of the first length. `long_data`: text for the long rows, where the
    rest has too few long documents. thetas: base of the rotary embedding in each stage (default: the model's own throughout). The
    learning rate falls on one line over all stages, to `final_rate_share` of itself. batch_size counts rows of the first length;
    a step of long rows has as many tokens, and micro batches likewise.
    """
    dtype = chosen_dtype(dtype)
    _check(lengths, steps, thetas, long_every=long_every, long_share=long_share_of_length)

    def corpus_of(path: Path, name: str) -> Artifact:
        return plan.step(
            text_corpus,
            name=name,
            data=plan.input(path, name=f"{name}-given"),
            fields=fields,
            languages=languages,
            max_bytes_per_language=max_bytes_per_language,
            min_bytes_per_language=min_bytes_per_language,
            max_bad_share=max_bad_share,
        )

    given = plan.input(model, name="model-given")

    def tokens_of(corpus: Artifact, name: str) -> Artifact:
        return plan.step(
            tokenize_part, name=name, corpus=corpus, tokenizer=given, part="documents", domain="documents"
        )

    corpus = corpus_of(data, "corpus")
    tokens = tokens_of(corpus, "tokens")
    long_corpus = corpus if long_data is None else corpus_of(long_data, "corpus-long")
    long_tokens = tokens if long_data is None else tokens_of(long_corpus, "tokens-long")
    stages: dict[str, Artifact] = {"given": given}
    total, done = sum(steps), 0
    for index, (length, count) in enumerate(zip(lengths, steps, strict=True)):
        last = index == len(lengths) - 1
        before = list(stages.values())[-1]
        stages[str(length)] = plan.step(
            extend_stage,
            name="model" if last else f"stage/{length}",
            model=before,
            tokenizer=given,
            tokens=tokens,
            long_tokens=long_tokens,
            base_length=lengths[0],
            length=length,
            long_every=long_every,
            long_min_tokens=max(1, int(length * long_share_of_length)) if index else 0,
            rope_theta=thetas[index] if thetas else 0.0,
            steps=count,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            learning_rate=learning_rate * _fall(done / total, final_rate_share),
            final_learning_rate=learning_rate * _fall((done + count) / total, final_rate_share),
            warmup_steps=0 if index else max(1, count // 20),
            dtype=dtype,
            # The documents come in another order in each stage.
            seed=seed + index,
            threads=threads,
        )
        done += count
    evaluations = {
        name: plan.step(
            evaluate_lengths,
            name=f"evaluation/{name}",
            corpus=long_corpus,
            model=stage,
            lengths=lengths,
            documents=evaluation_documents,
            threads=threads,
            seed=seed,
        )
        for name, stage in stages.items()
    }
    comparison = plan.step(compare_lengths, name="comparison", evaluations=evaluations, lengths=lengths)
    plan.export(comparison / "results.json", "results.json")
    plan.closing(
        f"Bits per byte at each length, stage by stage: {plan.folder / 'report.html'}. The model: {plan.folder / 'model'}"
    )


def _fall(progress: float, final_share: float) -> float:
    """The learning rate's factor on its way from 1 to `final_share`."""
    return 1.0 - (1.0 - final_share) * progress


def _check(
    lengths: tuple[int, ...],
    steps: tuple[int, ...],
    thetas: tuple[float, ...],
    *,
    long_every: int,
    long_share: float,
) -> None:
    if not lengths or any(b <= a for a, b in zip(lengths, lengths[1:], strict=False)) or lengths[0] < 2:
        raise UserError(f"the lengths are {lengths}", hint="each must be longer than the one before it")
    if len(steps) != len(lengths):
        raise UserError(
            f"{len(steps)} numbers of steps for {len(lengths)} lengths",
            hint="give one a length, for example --set steps=300,100,50",
        )
    if thetas and len(thetas) != len(lengths):
        raise UserError(f"{len(thetas)} thetas for {len(lengths)} lengths", hint="give one a length, or none")
    if long_every < 1:
        raise UserError(f"long_every is {long_every}", hint="it must be at least 1")
    if not 0.0 <= long_share <= 1.0:
        raise UserError(f"long_share_of_length is {long_share}", hint="it must be from 0 to 1")
