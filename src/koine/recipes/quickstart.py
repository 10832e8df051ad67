"""Train a small chat model with a universal and with a cluster tokenizer, and compare (arXiv 2506.10766)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

from koine.data.hub_data import dataset_folder
from koine.hardware import chosen_dtype
from koine.languages import CLUSTERS
from koine.model import PRESETS, VARIANTS, ModelConfig
from koine.model import preset as preset_config
from koine.model.layer_patterns import Variant
from koine.plan import Artifact, Parameter, Plan
from koine.recipes.closings import chat_answer
from koine.recipes.parameters import (
    BatchSize,
    DType,
    EvaluationDocuments,
    FieldNames,
    FormatName,
    Languages,
    LearningRate,
    MaxBadShare,
    MaxBytesPerLanguage,
    MicroBatchSize,
    MinBytesPerLanguage,
    Seed,
    SequenceLength,
)
from koine.steps.corpora import own_corpus, sample_corpus
from koine.steps.evaluation import evaluate_model
from koine.steps.examples import add_examples
from koine.steps.text_mixture import (
    TextSource,
    adaptation_sources,
    chat_sources,
    pretraining_sources,
    with_dialogues,
)
from koine.steps.tokenizer_comparison import ARMS, compare_arms
from koine.steps.tokenizers import build_tokenizer, tokenize_part
from koine.steps.trainer import Trainer
from koine.steps.training import HeldOutProbe, doubling_steps
from koine.train.settings import OptimiserName

SAMPLE_LANGUAGES = ("en", "de", "fr", "es", "zh", "ja", "ko", "vi", "ar", "fa", "tr", "hi")
"""Four languages of each cluster: a model of this size learns their facts in minutes, but not those of 24."""
EVALUATION_BYTES = 4_000
"""Length to which a held-out document is cut; few in the sample world are as long."""
Arms = Mapping[str, Artifact]
Tokens = Mapping[str, Arms]
"""Token shards of each source, of both arms."""
Sources = tuple[TextSource, ...]


def quickstart(
    plan: Plan,
    *,
    data: Annotated[
        Path | None, Parameter("Your text in place of the sample world: a file, a folder, or OWNER/NAME.")
    ] = None,
    fields: FieldNames = (),
    format: FormatName = "",
    languages: Languages = (),
    primary_cluster: Annotated[
        str, Parameter("Languages to pretrain on: those of this cluster.", choices=CLUSTERS)
    ] = "european",
    primary_languages: Annotated[
        tuple[str, ...], Parameter("Languages to pretrain on, by code, in place of a cluster.")
    ] = (),
    preset: Annotated[str, Parameter("Sizes of the model.", choices=tuple(PRESETS))] = "koine-2m",
    attention: Annotated[
        str, Parameter("Attention layers; empty: the preset's.", choices=("", *VARIANTS))
    ] = "",
    window: Annotated[
        int, Parameter("Window of the sliding-window layers; 0: the preset's.", unit="tokens", low=0)
    ] = 0,
    full_every: Annotated[
        int,
        Parameter("Every how many layers one attends to everything; 0: the preset's.", unit="layers", low=0),
    ] = 0,
    rope_theta: Annotated[float, Parameter("Base of the rotary embedding; 0: the preset's.", low=0)] = 0.0,
    vocabulary_size: Annotated[int, Parameter("Size of each tokenizer.", unit="tokens", low=264)] = 4096,
    pretrain_steps: Annotated[
        int, Parameter("Steps of pretraining on the primary languages.", unit="steps", low=1)
    ] = 300,
    adapt_steps: Annotated[
        int, Parameter("Steps of adaptation to the other languages.", unit="steps", low=1)
    ] = 1200,
    chat_steps: Annotated[int, Parameter("Steps of fine-tuning on chats.", unit="steps", low=1)] = 700,
    sequence_length: SequenceLength = 256,
    batch_size: BatchSize = 8,
    micro_batch_size: MicroBatchSize = 8,
    optimiser: Annotated[str, Parameter("Optimiser of all stages.", choices=("adamw", "muon"))] = "muon",
    learning_rate: LearningRate = 5e-3,
    code_share: Annotated[
        float, Parameter("Share of code in pretraining (sample world only).", low=0, below=1)
    ] = 0.1,
    english_share: Annotated[
        float, Parameter("Share of English in the tokenizers' text and in pretraining.", above=0, below=1)
    ] = 0.3,
    primary_share: Annotated[
        float, Parameter("Share of the primary languages during adaptation.", low=0, below=1)
    ] = 0.2,
    dialogue_share: Annotated[
        float,
        Parameter("Share of dialogues in pretraining and adaptation (sample world only).", low=0, below=1),
    ] = 0.85,
    replayed_dialogues: Annotated[
        float, Parameter("Share of dialogues in the chat stage (sample world only).", low=0, below=1)
    ] = 0.5,
    replayed_documents: Annotated[
        float, Parameter("Share of documents in the chat stage, so that less is forgotten.", low=0, below=1)
    ] = 0.03,
    dtype: DType = "auto",
    documents_per_language: Annotated[
        int, Parameter("Documents of each language in the sample world.", unit="documents", low=1)
    ] = 600,
    questions_per_language: Annotated[
        int, Parameter("Chats of each language in the sample world.", unit="chats", low=1)
    ] = 600,
    max_bytes_per_language: MaxBytesPerLanguage = 400_000,
    min_bytes_per_language: MinBytesPerLanguage = 20_000,
    max_bad_share: MaxBadShare = 0.01,
    evaluation_documents: EvaluationDocuments = 10,
    evaluation_questions: Annotated[
        int, Parameter("Questions of each language in the evaluation.", unit="questions", low=0)
    ] = 40,
    seed: Seed = 0,
) -> None:
    """Train a small chat model from multilingual text, with a universal and with a cluster tokenizer.

    Both arms are pretrained on the primary languages alone, so that they differ in the tokenizer and not in
    the text.
    Then both are adapted to the other languages and taught to chat. The report compares them.
    """
    dtype = chosen_dtype(dtype)
    roles: dict[str, Any] = {
        "primary_cluster": primary_cluster,
        "primary_languages": primary_languages,
        "questions_per_language": questions_per_language,
        "seed": seed,
    }
    if data is None:
        corpus = plan.step(
            sample_corpus,
            name="corpus",
            purpose="Write facts in many languages, as text and as questions.",
            languages=languages or SAMPLE_LANGUAGES,
            documents_per_language=documents_per_language,
            code_bytes=300_000,
            **roles,
        )
    else:
        corpus = plan.step(
            own_corpus,
            name="corpus",
            purpose="Sort your text by language, and hold some of it out.",
            data=plan.input(dataset_folder(data), name="data"),
            fields=fields,
            record_format=format,
            languages=languages,
            max_bytes_per_language=max_bytes_per_language,
            heldout_bytes_per_language=max(10_000, max_bytes_per_language // 10),
            heldout_share=0.05,
            min_bytes_per_language=min_bytes_per_language,
            max_bad_share=max_bad_share,
            **roles,
        )
    config = preset_config(
        preset,
        vocabulary_size,
        attention=cast("Variant | None", attention or None),
        window=window or None,
        full_every=full_every or None,
        rope_theta=rope_theta or None,
    )
    study = Study(
        corpus,
        Trainer(
            plan=plan,
            sequence_length=sequence_length,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            dtype=dtype,
            seed=seed,
            optimiser=cast("OptimiserName", optimiser),
        ),
        config,
        learning_rate,
        evaluation_documents,
    )
    # Stage by stage, so that the two arms run side by side.
    tokenizers = study.tokenizers(english_share)
    documents = study.tokens(tokenizers, "documents", "documents")
    if data is not None:
        code_share = dialogue_share = replayed_dialogues = 0.0
    tokens = dict.fromkeys(("documents", "primary", "adapted", "replayed"), documents)
    if code_share:
        tokens["code"] = study.tokens(tokenizers, "code.jsonl", "code")
    if dialogue_share or replayed_dialogues:
        tokens["dialogues"] = study.tokens(tokenizers, "dialogues", "dialogues")
    tokens["chats"] = study.tokens(tokenizers, "questions/train", "chats")
    pretrained = study.pretrained(
        tokenizers,
        tokens,
        with_dialogues(
            pretraining_sources(english_share=english_share, code_share=code_share),
            dialogue_share,
            ("primary",),
        ),
        pretrain_steps,
    )
    adapted = study.adapted(
        tokenizers,
        tokens,
        pretrained,
        with_dialogues(adaptation_sources((), primary_share), dialogue_share),
        adapt_steps,
    )
    models = study.chat_models(
        tokenizers,
        tokens,
        adapted,
        chat_sources(dialogue_share=replayed_dialogues, document_share=replayed_documents),
        chat_steps,
    )
    evaluations = {
        "pretrained": study.evaluated("pretrained", pretrained),
        "adapted": study.evaluated("adapted", adapted),
        "chat": study.evaluated("chat", models, evaluation_questions),
    }
    comparison = plan.step(
        compare_arms,
        name="comparison",
        purpose="Compare the two tokenizers, and write the verdict.",
        corpus=corpus,
        tokenizers=tokenizers,
        tokens=documents,
        models={"pretrained": pretrained, "adapted": adapted, "chat": models},
        evaluations=evaluations,
        primary_share=primary_share,
        seed=seed,
    )
    plan.export(comparison / "results.json", "results.json")
    plan.step(
        add_examples,
        name="model",
        purpose="Put questions that it answers right beside the chat model.",
        model=models["universal"],
        evaluation=evaluations["chat"]["universal"],
    )
    plan.closing(chat_answer, comparison=comparison)


class Study:
    """Adds the stages of the comparison to a plan, each for both arms."""

    def __init__(
        self, corpus: Artifact, trainer: Trainer, config: ModelConfig, learning_rate: float, documents: int
    ) -> None:
        self.corpus, self.trainer, self.config, self.learning_rate = corpus, trainer, config, learning_rate
        self.documents = documents
        self.plan = trainer.plan

    def tokenizers(self, english_share: float) -> dict[str, Artifact]:
        """Train a tokenizer on all languages, and one on the primary ones."""
        return {
            arm: self.plan.step(
                build_tokenizer,
                name=f"tokenizer/{arm}",
                purpose="Train one tokenizer on all languages and one on the primary ones.",
                corpus=self.corpus,
                scope=arm,
                vocabulary_size=self.config.vocab_size,
                scheme="bucketed",
                english_share=english_share,
                sample_bytes=4_000_000,
                seed=self.trainer.seed,
            )
            for arm in ARMS
        }

    def tokens(self, tokenizers: Arms, part: str, domain: str) -> dict[str, Artifact]:
        """Tokenize a part of the corpus."""
        return {
            arm: self.plan.step(
                tokenize_part,
                name=f"tokens/{arm}/{domain}",
                purpose="Turn the texts into token ids, with each tokenizer.",
                corpus=self.corpus,
                tokenizer=tokenizers[arm],
                part=part,
                domain=domain,
            )
            for arm in ARMS
        }

    def pretrained(
        self, tokenizers: Arms, tokens: Tokens, sources: Sources, steps: int
    ) -> dict[str, Artifact]:
        """Pretrain new models on the primary languages, and on code."""
        return {
            arm: self.trainer.train(
                f"pretrained/{arm}",
                None,
                of_arm(tokens, arm),
                sources,
                steps=steps,
                learning_rate=self.learning_rate,
                tokenizer=tokenizers[arm],
                corpus=self.corpus,
                config=self.config,
                probe=self.probe("primary"),
                settings={"evaluate_every": max(1, steps // 5)},
                purpose="Train a new model with each tokenizer, on the primary languages.",
            )
            for arm in ARMS
        }

    def adapted(
        self, tokenizers: Arms, tokens: Tokens, models: Arms, sources: Sources, steps: int
    ) -> dict[str, Artifact]:
        """Adapt the models to the other languages."""
        return {
            arm: self.trainer.train(
                f"adapted/{arm}",
                models[arm],
                of_arm(tokens, arm),
                sources,
                steps=steps,
                learning_rate=self.learning_rate,
                settings={"schedule": "linear", "evaluate_every": doubling_steps(steps)[0]},
                purpose="Train both models on the other languages too.",
                tokenizer=tokenizers[arm],
                corpus=self.corpus,
                config=self.config,
                probe=self.probe("primary", "expanded", track_languages=True, at=doubling_steps(steps)),
            )
            for arm in ARMS
        }

    def chat_models(
        self, tokenizers: Arms, tokens: Tokens, models: Arms, sources: Sources, steps: int
    ) -> dict[str, Artifact]:
        """Fine-tune the models on chats."""
        return {
            arm: self.trainer.train(
                f"chat/{arm}",
                models[arm],
                of_arm(tokens, arm),
                sources,
                steps=steps,
                learning_rate=self.learning_rate,
                settings={"schedule": "linear"},
                packing="no_split",
                purpose="Teach both models to answer questions.",
                objective="fine-tuning",
                tokenizer=tokenizers[arm],
                config=self.config,
            )
            for arm in ARMS
        }

    def probe(self, *roles: str, **fields: Any) -> HeldOutProbe:
        """Return the evaluation of a training, on the documents of `evaluated`, so that their figures agree."""
        return HeldOutProbe(
            groups={role: (role,) for role in roles},
            documents=self.documents,
            max_bytes=EVALUATION_BYTES,
            **fields,
        )

    def evaluated(self, stage: str, models: Arms, questions: int = 0) -> dict[str, Artifact]:
        """Evaluate the models of a stage on held-out documents, and on questions."""
        return {
            arm: self.plan.step(
                evaluate_model,
                name=f"evaluation/{arm}/{stage}",
                purpose="Measure the models after each stage on held-out text and questions.",
                corpus=self.corpus,
                model=models[arm],
                documents_per_language=self.documents,
                questions_per_language=questions,
                max_document_bytes=EVALUATION_BYTES,
                seed=self.trainer.seed,
            )
            for arm in ARMS
        }


def of_arm(tokens: Tokens, arm: str) -> dict[str, Artifact]:
    """Return the token shards of one arm, by source."""
    return {name: arms[arm] for name, arms in tokens.items()}
