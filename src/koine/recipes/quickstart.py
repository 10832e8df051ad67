"""From raw text in many languages to a model that you can talk to, and what the tokenizer had to do with it."""

from __future__ import annotations

from pathlib import Path

from koine.hardware import chosen_dtype
from koine.languages import check_cluster
from koine.plan import Artifact, Plan
from koine.steps.adaptation import adapt_to
from koine.steps.comparison import ARMS, compare_arms
from koine.steps.corpora import own_corpus, sample_corpus
from koine.steps.evaluation import evaluate_model
from koine.steps.tokenizers import build_tokenizer, tokenize_part
from koine.steps.training import pretrain, teach_chat

LANGUAGES = (
    *("en", "de", "fr", "es", "pl", "ru", "el", "fi"),
    *("zh", "ja", "ko", "vi", "th", "id", "fil", "my"),
    *("ar", "fa", "tr", "he", "hi", "bn", "ta", "ur"),
)


def quickstart(
    plan: Plan,
    *,
    data: Path | None = None,
    fields: tuple[str, ...] = (),
    languages: tuple[str, ...] = (),
    primary_cluster: str = "european",
    primary_languages: tuple[str, ...] = (),
    preset: str = "koine-2m",
    attention: str = "",
    window: int = 0,
    full_every: int = 0,
    rope_theta: float = 0.0,
    vocabulary_size: int = 8192,
    pretrain_steps: int = 650,
    adapt_steps: int = 350,
    chat_steps: int = 850,
    sequence_length: int = 256,
    batch_size: int = 4,
    micro_batch_size: int = 4,
    learning_rate: float = 4e-3,
    code_share: float = 0.1,
    english_share: float = 0.3,
    primary_share: float = 0.2,
    dtype: str = "auto",
    documents_per_language: int = 600,
    questions_per_language: int = 600,
    max_bytes_per_language: int = 400_000,
    min_bytes_per_language: int = 20_000,
    max_bad_share: float = 0.01,
    evaluation_documents: int = 12,
    evaluation_questions: int = 40,
    threads: int = 1,
    seed: int = 0,
) -> None:
    """Universal against cluster tokenizer on a small hybrid model: pretrain, adapt, chat, evaluate, report.

    The sample world in 24 languages, or with `data` your own records (`fields` maps their names: fields=text=content,language=lang).
    Both arms are pretrained on the languages of `primary_cluster` (or `primary_languages`) alone, so that what differs afterwards is
    the tokenizer and not the text; both are then adapted to the others. `attention`, `window`, `full_every` and `rope_theta` make another
    variant of the preset (`koine.model.with_attention`); empty or 0: its own. Each arm trains on `threads` cores, side by side.
    """
    dtype = chosen_dtype(dtype)
    if not primary_languages:
        check_cluster(primary_cluster)
    if data is None:
        corpus = plan.step(
            sample_corpus,
            name="corpus",
            languages=languages or LANGUAGES,
            primary_cluster=primary_cluster,
            primary_languages=primary_languages,
            documents_per_language=documents_per_language,
            questions_per_language=questions_per_language,
            code_bytes=300_000,
            seed=seed,
        )
    else:
        corpus = plan.step(
            own_corpus,
            name="corpus",
            data=plan.input(data, name="data"),
            fields=fields,
            languages=languages,
            primary_cluster=primary_cluster,
            primary_languages=primary_languages,
            max_bytes_per_language=max_bytes_per_language,
            heldout_bytes_per_language=max(10_000, max_bytes_per_language // 10),
            heldout_share=0.05,
            min_bytes_per_language=min_bytes_per_language,
            max_bad_share=max_bad_share,
            questions_per_language=questions_per_language,
            seed=seed,
        )
    tokenizers: dict[str, Artifact] = {}
    documents: dict[str, Artifact] = {}
    pretrained: dict[str, Artifact] = {}
    adapted: dict[str, Artifact] = {}
    models: dict[str, Artifact] = {}
    before: dict[str, Artifact] = {}
    after: dict[str, Artifact] = {}
    final: dict[str, Artifact] = {}

    def tokens(arm: str, part: str, domain: str) -> Artifact:
        return plan.step(
            tokenize_part,
            name=f"tokens/{arm}/{domain}",
            corpus=corpus,
            tokenizer=tokenizers[arm],
            part=part,
            domain=domain,
        )

    def evaluated(arm: str, model: Artifact, name: str, *, questions: int = 0) -> Artifact:
        return plan.step(
            evaluate_model,
            name=f"evaluation/{arm}/{name}",
            corpus=corpus,
            model=model,
            documents_per_language=evaluation_documents,
            questions_per_language=questions,
            threads=threads,
            seed=seed,
        )

    # Stage by stage, so that the two arms run side by side.
    for arm in ARMS:
        tokenizers[arm] = plan.step(
            build_tokenizer,
            name=f"tokenizer/{arm}",
            corpus=corpus,
            scope=arm,
            vocabulary_size=vocabulary_size,
            scheme="bucketed",
            english_share=english_share,
            sample_bytes=4_000_000,
            seed=seed,
        )
    for arm in ARMS:
        documents[arm] = tokens(arm, "documents", "documents")
    code = {
        arm: tokens(arm, "code.jsonl", "code") if data is None and code_share > 0.0 else None for arm in ARMS
    }
    for arm in ARMS:
        pretrained[arm] = plan.step(
            pretrain,
            name=f"pretrained/{arm}",
            corpus=corpus,
            tokenizer=tokenizers[arm],
            documents=documents[arm],
            code=code[arm],
            preset=preset,
            vocabulary_size=vocabulary_size,
            steps=pretrain_steps,
            sequence_length=sequence_length,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            learning_rate=learning_rate,
            dtype=dtype,
            code_share=code_share,
            english_share=english_share,
            attention=attention,
            window=window,
            full_every=full_every,
            rope_theta=rope_theta,
            evaluate_every=max(1, pretrain_steps // 5),
            seed=seed,
            threads=threads,
        )
    for arm in ARMS:
        adapted[arm] = plan.step(
            adapt_to,
            name=f"adapted/{arm}",
            corpus=corpus,
            tokenizer=tokenizers[arm],
            model=pretrained[arm],
            tokens=documents[arm],
            kind="text",
            languages=(),
            primary_share=primary_share,
            preset=preset,
            vocabulary_size=vocabulary_size,
            steps=adapt_steps,
            sequence_length=sequence_length,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            learning_rate=learning_rate / 2,
            dtype=dtype,
            evaluate_every=max(1, adapt_steps // 15),
            evaluation_documents=2,
            evaluation_bytes=3_000,
            seed=seed,
            threads=threads,
        )
    chats = {arm: tokens(arm, "questions/train", "chats") for arm in ARMS}
    # The universal arm's model is the one to talk to.
    names = {"universal": "model", "cluster": "model-cluster"}
    for arm in ARMS:
        models[arm] = plan.step(
            teach_chat,
            name=names[arm],
            tokenizer=tokenizers[arm],
            model=adapted[arm],
            chats=chats[arm],
            preset=preset,
            vocabulary_size=vocabulary_size,
            steps=chat_steps,
            sequence_length=sequence_length,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            learning_rate=learning_rate,
            dtype=dtype,
            seed=seed,
            threads=threads,
        )
    for arm in ARMS:
        before[arm] = evaluated(arm, pretrained[arm], "pretrained")
        after[arm] = evaluated(arm, adapted[arm], "adapted")
        final[arm] = evaluated(arm, models[arm], "chat", questions=evaluation_questions)
    comparison = plan.step(
        compare_arms,
        name="comparison",
        corpus=corpus,
        tokenizers=tokenizers,
        tokens=documents,
        adapted=adapted,
        before=before,
        after=after,
        final=final,
        primary_share=primary_share,
        batch_tokens=batch_size * sequence_length,
        seed=seed,
    )
    plan.export(comparison / "results.json", "results.json")
    plan.closing(
        f"The answer is in {plan.folder / 'report.html'}. Talk to the model: koine chat {plan.folder / 'model'}"
    )
