"""Checks of tokenizers, tokens, trainings and evaluations: what must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.model.config import ModelConfig
from koine.plan import PlannedInput
from koine.steps.checks.messages import surprise
from koine.steps.corpus_files import Roles
from koine.steps.facts import (
    CorpusFacts,
    ModelFacts,
    TokenizerFacts,
    TokensFacts,
    corpus_facts,
    model_facts,
    own_model,
    tokens_vocabulary,
    vocabulary_size,
)

if TYPE_CHECKING:
    from koine.steps.text_mixture import TextMixture
    from koine.train.settings import TrainSettings


def tokenizer(corpus: PlannedInput, *, vocabulary_size: int, **_: Any) -> TokenizerFacts:
    """Return the size of the tokenizer that will be trained."""
    return TokenizerFacts(vocab_size=vocabulary_size)


def shared_tokenizer(
    corpora: Mapping[str, PlannedInput], *, vocabulary_size: int, **_: Any
) -> TokenizerFacts:
    """Return the size of the tokenizer that will be trained on several domains."""
    return TokenizerFacts(vocab_size=vocabulary_size)


def tokens(corpus: PlannedInput, tokenizer: PlannedInput, *, part: str, **_: Any) -> TokensFacts:
    """Check the tokenizer, and that the corpus has the part."""
    facts = corpus_facts(corpus)
    if part.startswith("questions") and facts is not None and facts.chat == ():
        from koine.data.sample import QUESTION_LANGUAGES

        raise UserError(
            f"none of the languages has questions to learn chatting from ({', '.join(facts.languages or ())})",
            hint=f"add one to languages; questions are there in: {', '.join(QUESTION_LANGUAGES)}",
        )
    return TokensFacts(vocab_size=vocabulary_size(tokenizer))


def domain_tokens(corpus: PlannedInput, tokenizer: PlannedInput, **_: Any) -> TokensFacts:
    """Check the tokenizer of a domain's tokens."""
    return TokensFacts(vocab_size=vocabulary_size(tokenizer))


def moved(
    model: PlannedInput, tokenizer: PlannedInput, corpus: PlannedInput, *, method: str, **_: Any
) -> ModelFacts | None:
    """Check the model and the tokenizer that it moves to; the result has the tokenizer's size."""
    size = vocabulary_size(tokenizer)
    vocabulary_size(model)
    facts = model_facts(model)
    if facts is None or size is None:
        return facts
    config = None if facts.config is None else replace(facts.config, vocab_size=size)
    return replace(facts, config=config, vocab_size=size)


def other_attention(
    model: PlannedInput, *, attention: str, window: int = 0, full_every: int = 0, **_: Any
) -> ModelFacts | None:
    """Check that the variant fits the model; the result has its layers."""
    from koine.model.formats.config_json import model_type
    from koine.model.layer_patterns import with_attention

    found = own_model(model)
    if found is None:
        return None
    config = with_attention(
        found,
        attention=attention,  # type: ignore[arg-type]
        window=window or None,
        full_every=full_every or None,
    )
    return ModelFacts(model_type=model_type(config), config=config, vocab_size=vocabulary_size(model))


def training(
    model: PlannedInput | None,
    tokens: Mapping[str, PlannedInput],
    tokenizer: PlannedInput | None = None,
    corpus: PlannedInput | None = None,
    *,
    mixture: TextMixture,
    settings: TrainSettings,
    config: ModelConfig | None = None,
    context_length: int = 0,
    rope_theta: float = 0.0,
    **_: Any,
) -> ModelFacts | None:
    """Check that model, tokenizer, tokens, rows and languages fit together."""
    found = config if model is None else own_model(model)
    source = tokenizer or model
    if found is None and model is None:
        raise UserError("a new model needs a config", where="train_model")
    if source is None:
        raise UserError("a new model needs a tokenizer", where="train_model")
    size = vocabulary_size(source)
    check_languages(mixture, None if corpus is None else corpus_facts(corpus))
    check_batch(mixture, settings)
    if found is None:
        return None
    if model is None and size is not None and size != found.vocab_size:
        raise UserError(
            f"the tokenizer has {size} tokens, and the new model is asked to have {found.vocab_size}",
            where=source.path,
            hint=f"set vocabulary_size={size}, or use another tokenizer",
        )
    for name, planned in tokens.items():
        ids = tokens_vocabulary(planned)
        if ids is not None and ids > found.vocab_size:
            raise UserError(
                f"the tokens of '{name}' have {ids} ids, and the model knows {found.vocab_size}",
                where=source.path if model is None else model.path,
                hint="give the model's own tokenizer, or move the model to the other one first",
            )
    found = replace(found.with_context(context_length), rope_theta=rope_theta or found.rope_theta)
    if mixture.max_length > found.context_length:
        raise UserError(
            f"rows have {mixture.max_length} tokens (sequence_length), and the model takes at most "
            f"{found.context_length}",
            where=None if model is None else model.path,
            hint=f"choose at most {found.context_length}, or lengthen the model's context with the "
            "recipe extend",
        )
    if model is None:
        check_windows(found, mixture.max_length)
    return ModelFacts(model_type="koine", config=found, vocab_size=size)


def check_languages(mixture: TextMixture, facts: CorpusFacts | None) -> None:
    """Raise `UserError` for a language that a source names and the corpus does not have."""
    from koine.steps.text_mixture import language_codes

    if facts is None or facts.languages is None:
        return
    roles = Roles(primary=facts.primary or (), expanded=facts.expanded or (), chat=facts.chat or ())
    for source in mixture.all_sources:
        codes = language_codes(source.languages, roles)
        absent = [code for code in codes if code not in roles.all]
        if absent:
            raise UserError(
                f"training on '{source.name}' names {', '.join(absent)}, and the corpus has no text of it",
                hint=f"possible are: {', '.join(roles.all)}",
            )


def check_batch(mixture: TextMixture, settings: TrainSettings) -> None:
    """Warn of a micro-batch larger than the batch, and of emulated bfloat16."""
    from koine.hardware import chosen_dtype

    if settings.micro_batch_size > mixture.batch_size:
        surprise(
            f"micro_batch_size is {settings.micro_batch_size}, and batch_size {mixture.batch_size}: all rows "
            "of a step are computed at once"
        )
    if settings.dtype == "bfloat16" and chosen_dtype("auto") == "float32":
        surprise("dtype is bfloat16, which this processor computes slower than float32")


def check_windows(config: ModelConfig, longest: int) -> None:
    """Warn where the sliding windows of a new model are no shorter than its rows."""
    windows = [layer.window for layer in config.layers if layer.window is not None]
    if windows and min(windows) >= longest:
        surprise(
            f"window is {min(windows)}, and rows have {longest} tokens (sequence_length): no layer learns to "
            "do without distant text"
        )


def evaluation(
    corpus: PlannedInput,
    model: PlannedInput,
    *,
    documents_per_language: int,
    **_: Any,
) -> None:
    """Check the model and the number of documents."""
    own_model(model)
    facts = corpus_facts(corpus)
    held = None if facts is None else facts.heldout_documents
    if held is not None and documents_per_language > held:
        surprise(
            f"evaluation_documents is {documents_per_language}, and the corpus holds out {held} of each "
            "language: all of them are used"
        )


def evaluated_model(model: PlannedInput, **_: Any) -> None:
    """Check the model that is evaluated."""
    own_model(model)
