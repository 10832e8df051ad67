"""Checks of the steps of preference training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.files import sha256_file
from koine.plan.step import PlannedInput
from koine.steps.checks.trainings import check_batch
from koine.steps.facts import ModelFacts, TokensFacts, model_facts, tokens_vocabulary, vocabulary_size

if TYPE_CHECKING:
    from koine.steps.text_mixture import TextMixture
    from koine.train.settings import TrainSettings


def group_tokens(
    records: PlannedInput,
    tokenizer: PlannedInput,
    *,
    kind: str = "preferences",
    revision: str | None = None,
    **_: Any,
) -> TokensFacts:
    """Check the tokenizer, and that revisions are asked for of preferences only."""
    if revision is not None and kind != "preferences":
        raise UserError("a revision turn is for preferences", hint="set kind to preferences with it")
    return TokensFacts(vocab_size=vocabulary_size(tokenizer))


def reference(
    model: PlannedInput, tokens: Mapping[str, PlannedInput], *, mixture: TextMixture, **_: Any
) -> None:
    """Check that model, tokens and rows fit together."""
    check_groups(model, tokens, mixture)


def alignment(
    model: PlannedInput,
    tokens: Mapping[str, PlannedInput],
    reference: PlannedInput | None = None,
    cache: PlannedInput | None = None,
    pairs: PlannedInput | None = None,
    prompts: PlannedInput | None = None,
    *,
    loss: str,
    mixture: TextMixture,
    settings: TrainSettings,
    monitor: Any = None,
    stop_on: str = "",
    **_: Any,
) -> ModelFacts | None:
    """Check the loss, and that model, tokens, rows and what is measured fit together."""
    from koine.align.loss_spec import LossSpec

    LossSpec.parse(loss)
    check_batch(mixture, settings)
    if (monitor is not None or stop_on) and not settings.evaluate_every:
        raise UserError("nothing is measured during the training", hint="set evaluate_every in its settings")
    if monitor is not None and pairs is None and prompts is None:
        raise UserError("a monitor has neither pairs nor prompts", hint="give held-out pairs or prompts")
    if stop_on and monitor is None:
        raise UserError(f"stop_on is {stop_on}, and there is no monitor", hint="give monitor settings")
    if reference is not None:
        check_groups(reference, tokens, mixture)
    return check_groups(model, tokens, mixture)


def check_groups(
    model: PlannedInput, tokens: Mapping[str, PlannedInput], mixture: TextMixture
) -> ModelFacts | None:
    """Raise `UserError` for tokens or rows that a model cannot take; return what is known of the model."""
    if mixture.packing == "concat":
        raise UserError(
            "groups cannot be packed by concat, which cuts them anywhere",
            hint="set packing to no_split or one_per_row",
        )
    facts = model_facts(model)
    size = None if facts is None else facts.vocab_size
    if size is None and facts is not None and facts.config is not None:
        size = facts.config.vocab_size
    for name, planned in tokens.items():
        ids = tokens_vocabulary(planned)
        if size is not None and ids is not None and ids > size:
            raise UserError(
                f"the groups of '{name}' have {ids} ids, and the model knows {size}",
                where=model.path,
                hint="tokenize them with the model's own tokenizer",
            )
    if facts is not None and facts.config is not None:
        most = facts.config.max_position_embeddings
        if mixture.max_length > most:
            raise UserError(
                f"rows have {mixture.max_length} tokens (sequence_length), and the model takes at most {most}",
                where=model.path,
                hint=f"choose at most {most}",
            )
    return facts


def watched(
    models: dict[str, PlannedInput],
    pairs: PlannedInput | None = None,
    prompts: PlannedInput | None = None,
    **_: Any,
) -> None:
    """Check that there are models to watch, and pairs or prompts."""
    if not models:
        raise UserError("no model to watch", hint="give the folders of a training's checkpoints")
    if pairs is None and prompts is None:
        raise UserError("neither pairs nor prompts", hint="give held-out pairs, prompts to answer, or both")
    for name, model in models.items():
        if model.exists and not (model.path / "config.json").exists():
            raise UserError(
                f"'{name}' holds no model", where=model.path, hint="give a folder that holds config.json"
            )


def inspected_groups(
    pairs: PlannedInput, model: PlannedInput, held_out: PlannedInput | None = None, **_: Any
) -> None:
    """Check that token shards are groups, made with the tokenizer of the model."""
    from koine.data.shards import TokenSource

    tokenizer = model.path / "tokenizer.json"
    for one in (pairs, held_out):
        if one is None or not (one.path / "manifest.json").is_file():
            continue
        source = TokenSource(one.path, verify=False)
        if source.kind == "documents":
            raise UserError(
                "holds documents, not groups of completions",
                where=one.path,
                hint="tokenize with --kind preferences, labelled or scored",
            )
        if tokenizer.is_file() and source.tokenizer_fingerprint != sha256_file(tokenizer):
            raise UserError(
                f"tokenized with another tokenizer than {model.path}",
                where=one.path,
                hint="tokenize again with the tokenizer of the model",
            )


def trained_online(
    model: PlannedInput, prompts: PlannedInput, reference: PlannedInput | None = None, *, k: int, **_: Any
) -> None:
    """Check that the models are models, and that there are completions to compare."""
    if k < 2:
        raise UserError(f"k is {k}: completions of a prompt are compared", hint="draw 2 or more of each")
    for one in (model, reference):
        if one is not None and one.exists and not (one.path / "config.json").exists():
            raise UserError("holds no model", where=one.path, hint="give a folder that holds config.json")
