"""Adapt a model that you have to languages that it does not serve: with its tokenizer or another, in one of the study's regimes."""

from __future__ import annotations

from pathlib import Path

from koine.errors import UserError, did_you_mean
from koine.hardware import chosen_dtype
from koine.languages import language
from koine.plan import Plan
from koine.steps.adaptation import adapt_to, move_to_tokenizer
from koine.steps.corpora import own_corpus
from koine.steps.evaluation import evaluate_model
from koine.steps.tokenizers import tokenize_part

REGIMES = ("continued", "targeted")


def adaptation(
    plan: Plan,
    *,
    model: Path,
    data: Path,
    primary_languages: tuple[str, ...],
    languages: tuple[str, ...] = (),
    fields: tuple[str, ...] = (),
    regime: str = "continued",
    learn_from: str = "text",
    targets: tuple[str, ...] = (),
    primary_share: float = 0.2,
    tokenizer: Path | None = None,
    init: str = "subword-mean",
    steps: int = 500,
    sequence_length: int = 512,
    batch_size: int = 8,
    micro_batch_size: int = 4,
    learning_rate: float = 5e-4,
    dtype: str = "auto",
    evaluations: int = 10,
    evaluation_documents: int = 8,
    max_bytes_per_language: int = 2_000_000,
    min_bytes_per_language: int = 20_000,
    max_bad_share: float = 0.01,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """A directory of our model, text with language codes, and the languages that the model serves already (`primary_languages`).

    regime: `continued` learns the other languages with `primary_share` of the primary ones re-injected; `targeted` learns `targets`
    (one language, or several; default: all others) and nothing else. learn_from: `text`, or `chats` (records with messages).
    tokenizer: move the model to this one first, the new rows guessed by `init`. What every language gains and loses is measured
    `evaluations` times on the way, and before the first step.
    """
    dtype = chosen_dtype(dtype)
    if regime not in REGIMES:
        raise UserError(f"unknown regime '{regime}'", hint=did_you_mean(regime, REGIMES))
    if not primary_languages:
        raise UserError(
            "which languages does the model serve already?", hint="--set primary_languages=CODE,CODE"
        )
    corpus = plan.step(
        own_corpus,
        name="corpus",
        data=plan.input(data, name="data"),
        fields=fields,
        languages=languages,
        primary_cluster="none",
        primary_languages=primary_languages,
        max_bytes_per_language=max_bytes_per_language,
        heldout_bytes_per_language=max(10_000, max_bytes_per_language // 10),
        heldout_share=0.05,
        min_bytes_per_language=min_bytes_per_language,
        max_bad_share=max_bad_share,
        questions_per_language=100,
        seed=seed,
    )
    given = start = plan.input(model, name="model-given")
    if tokenizer is not None:
        start = plan.step(
            move_to_tokenizer,
            name="moved",
            model=given,
            tokenizer=plan.input(tokenizer, name="tokenizer-given"),
            corpus=corpus,
            method=init,
            # Empty: the text of all languages that the corpus has.
            languages=tuple(language(code).code for code in languages),
            seed=seed,
        )
    tokens = plan.step(
        tokenize_part,
        name="tokens",
        corpus=corpus,
        tokenizer=start,
        part="questions/train" if learn_from == "chats" else "documents",
        domain="chats" if learn_from == "chats" else "documents",
    )
    adapted = plan.step(
        adapt_to,
        name="model",
        corpus=corpus,
        tokenizer=start,
        model=start,
        tokens=tokens,
        kind=learn_from,
        languages=tuple(language(code).code for code in targets),
        primary_share=primary_share if regime == "continued" else 0.0,
        preset="",
        vocabulary_size=0,
        steps=steps,
        sequence_length=sequence_length,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=learning_rate,
        dtype=dtype,
        evaluate_every=max(1, steps // evaluations),
        evaluation_documents=evaluation_documents,
        evaluation_bytes=4_000,
        seed=seed,
        threads=threads,
    )
    for name, evaluated in (("given", given), ("adapted", adapted)):
        plan.step(
            evaluate_model,
            name=f"evaluation/{name}",
            corpus=corpus,
            model=evaluated,
            documents_per_language=evaluation_documents,
            questions_per_language=0,
            threads=threads,
            seed=seed,
        )
    plan.closing(
        f"What each language gained and lost is in {plan.folder / 'report.html'}. The model: {plan.folder / 'model'}"
    )
