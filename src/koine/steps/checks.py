"""Checks of the steps' arguments before anything runs.

Each stands beside a step as `@step(check=...)`: it gets the step's arguments with a `PlannedInput` for each
input, raises `UserError` for what cannot work, warns with `KoineWarning` of what may surprise, and returns
the facts that the checks of later steps build on.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.errors import KoineWarning, UserError, did_you_mean
from koine.files import walk
from koine.languages import language
from koine.model.config import MixtureConfig, ModelConfig
from koine.plan import PlannedInput
from koine.steps.corpus_files import Roles, field_mapping, split_roles
from koine.steps.estimates import CHAT_BYTES, DIALOGUE_BYTES, RECORD_BYTES
from koine.steps.facts import (
    CorpusFacts,
    ModelFacts,
    TokenizerFacts,
    TokensFacts,
    corpus_facts,
    dense_model,
    model_facts,
    own_model,
    tokens_vocabulary,
    vocabulary_size,
)

if TYPE_CHECKING:
    from koine.data.preview import DataPreview
    from koine.steps.text_mixture import TextMixture
    from koine.train.settings import TrainSettings


SETTINGS = {
    "--field text=COLUMN": "--set fields=text=COLUMN",
    "--max-bad": "--set max_bad_share=SHARE",
    "(--format)": "(--set format=NAME)",
    "--base MODEL": "--set base=MODEL",
    "leave --base out": "leave base out",
}
"""Options that hints of other rooms name, and the setting of a plan that does the same."""


def surprise(text: str) -> None:
    """Warn of something that works and may not be what the user wants."""
    warnings.warn(text, KoineWarning, stacklevel=3)


def sample(
    *,
    languages: tuple[str, ...],
    primary_cluster: str,
    primary_languages: tuple[str, ...],
    documents_per_language: int,
    questions_per_language: int,
    code_bytes: int,
    **_: Any,
) -> CorpusFacts:
    """Check that the sample world can be written in all languages, and that each has a role."""
    from koine.data.sample import QUESTION_LANGUAGES, sample_languages
    from koine.data.sample.coverage import covers
    from koine.data.sample.world import DIALOGUES, heldout_count

    codes = known_codes("languages", languages)
    for code in codes:
        if not covers(code):
            raise UserError(
                f"languages has '{code}' ({language(code).name}), of which CLDR knows too little for the "
                "sample world",
                hint=f"it is there in {len(sample_languages())} languages, with questions in "
                f"{', '.join(QUESTION_LANGUAGES)}; for others give text of your own (data=PATH)",
            )
    absent = [code for code in known_codes("primary_languages", primary_languages) if code not in codes]
    if absent:
        raise UserError(
            f"primary_languages has {', '.join(absent)}, and languages has not",
            hint=f"possible are: {', '.join(codes)}",
        )
    primary, expanded = split_roles(
        codes, primary_cluster=primary_cluster, primary_languages=primary_languages
    )
    chat = tuple(code for code in codes if code in QUESTION_LANGUAGES)
    silent = [code for code in codes if code not in QUESTION_LANGUAGES]
    if chat and silent:
        surprise(
            f"the sample world has no questions in {', '.join(silent)}: the model reads text in these "
            f"languages and is not taught to answer in them"
        )
    return CorpusFacts(
        primary=primary,
        expanded=expanded,
        chat=chat,
        heldout_documents=heldout_count(documents_per_language),
        part_bytes={
            "documents": len(codes) * documents_per_language * RECORD_BYTES,
            "questions/train": len(chat) * questions_per_language * CHAT_BYTES,
            "dialogues": len(chat) * DIALOGUES * questions_per_language * DIALOGUE_BYTES,
            "code.jsonl": int(1.2 * code_bytes),
        },
    )


def known_codes(parameter: str, given: Iterable[str]) -> tuple[str, ...]:
    """Return our codes of languages; raise `UserError` for an unknown or repeated one."""
    found: dict[str, str] = {}
    for text in given:
        try:
            code = language(text).code
        except UserError as error:
            raise UserError(f"{parameter} has '{text}', which is no language", hint=error.hint) from None
        if code in found:
            same = f"'{text}'" if found[code] == text else f"'{found[code]}' and '{text}', the same language,"
            raise UserError(f"{parameter} names {same} twice", hint="name each language once")
        found[code] = text
    return tuple(found)


def own_corpus(
    data: PlannedInput,
    *,
    fields: tuple[str, ...],
    languages: tuple[str, ...],
    max_bytes_per_language: int,
    min_bytes_per_language: int,
    max_bad_share: float,
    record_format: str = "",
    primary_cluster: str,
    primary_languages: tuple[str, ...],
    **_: Any,
) -> CorpusFacts | None:
    """Check the user's text, and that both roles of languages can be filled from it."""
    primary_codes = known_codes("primary_languages", primary_languages)
    preview = preview_of(data, fields, max_bad_share, record_format)
    kept = kept_languages(
        data, preview, known_codes("languages", languages), min_bytes_per_language, max_bytes_per_language
    )
    if kept is None or preview is None:
        return None
    absent = [code for code in primary_codes if code not in kept]
    if absent and len(absent) < len(primary_codes):
        surprise(f"primary_languages has {', '.join(absent)}, and the data have not enough text of it")
    primary, expanded = split_roles(
        kept, primary_cluster=primary_cluster, primary_languages=primary_languages
    )
    return text_facts(preview, kept, max_bytes_per_language, primary, expanded)


def text_corpus(
    data: PlannedInput,
    *,
    fields: tuple[str, ...],
    languages: tuple[str, ...],
    max_bytes_per_language: int,
    min_bytes_per_language: int,
    max_bad_share: float,
    record_format: str = "",
    **_: Any,
) -> CorpusFacts | None:
    """Check the user's text where all languages have the same role."""
    preview = preview_of(data, fields, max_bad_share, record_format)
    kept = kept_languages(
        data, preview, known_codes("languages", languages), min_bytes_per_language, max_bytes_per_language
    )
    if kept is None or preview is None:
        return None
    return text_facts(preview, kept, max_bytes_per_language, kept, ())


def domain_text(
    data: PlannedInput,
    *,
    domain: str,
    fields: tuple[str, ...],
    max_bytes: int,
    max_bad_share: float,
    record_format: str = "",
    **_: Any,
) -> CorpusFacts | None:
    """Check a domain's text."""
    preview = preview_of(data, fields, max_bad_share, record_format)
    if preview is None:
        return None
    count = preview.documents + preview.chats
    if preview.whole and count < 2:
        raise UserError(
            f"the domain '{domain}' has {count} documents",
            where=data.path,
            hint="give more: one in twenty is held out, at least one",
        )
    written = min(int(1.5 * max_bytes), preview.file_bytes)
    return CorpusFacts(
        part_bytes={"documents": written},
        document_bytes=(sum(preview.text_bytes.values()) + preview.chat_bytes) // max(1, count) or 1,
    )


def preview_of(
    data: PlannedInput, fields: tuple[str, ...], max_bad_share: float, record_format: str
) -> DataPreview | None:
    """Return the beginning of the user's data; None where they do not exist yet."""
    mapping = field_mapping(fields)
    if not data.exists:
        return None
    try:
        return _preview(data.path, tuple(mapping.items()), max_bad_share, record_format, _state(data.path))
    except UserError as error:
        raise with_settings(error, data.path) from None


def _state(path: Path) -> tuple[tuple[int, int], ...]:
    """Return time and size of every file, which change with the content."""
    files = walk(path) if path.is_dir() else [path]
    found = [file.stat() for file in files if file.exists()]
    return tuple((about.st_mtime_ns, about.st_size) for about in found)


@functools.lru_cache(maxsize=64)
def _preview(
    path: Path,
    fields: tuple[tuple[str, str], ...],
    max_bad_share: float,
    record_format: str,
    state: tuple[tuple[int, int], ...],
) -> DataPreview:
    """Return `preview_records`, once for each `state` of the files: several steps may read the same data."""
    from koine.data.preview import preview_records

    return preview_records(
        path, fields=dict(fields), max_bad_share=max_bad_share, record_format=record_format
    )


def with_settings(error: UserError, where: Path | None = None) -> UserError:
    """Return an error whose hint names settings of a plan in place of options of a command."""
    hint = error.hint
    for option, setting in SETTINGS.items():
        hint = None if hint is None else hint.replace(option, setting)
    return UserError(error.what, where=error.where or where, hint=hint)


def kept_languages(
    data: PlannedInput,
    preview: DataPreview | None,
    wanted: tuple[str, ...],
    min_bytes: int,
    max_bytes: int,
) -> tuple[str, ...] | None:
    """Return the languages that have enough text; None where only the whole data tell.

    Raises `UserError` where none has enough, or one that is asked for is not there.
    """
    if min_bytes > max_bytes:
        raise UserError(
            f"min_bytes_per_language is {min_bytes}, and at most {max_bytes} are taken of each",
            hint="it must not be above max_bytes_per_language",
        )
    if preview is None or not preview.whole:
        return None
    absent = [code for code in wanted if code not in preview.languages]
    if absent:
        raise UserError(
            f"languages has {', '.join(absent)}, of which the data have no text",
            where=data.path,
            hint=f"they have: {', '.join(preview.languages) or 'no language at all'}",
        )
    kept = tuple(
        code
        for code in preview.languages
        if preview.text_bytes.get(code, 0) >= max(1, min_bytes) and (not wanted or code in wanted)
    )
    if kept:
        return kept
    sizes = ", ".join(f"{code} {preview.text_bytes.get(code, 0):,}" for code in preview.languages)
    raise UserError(
        f"no language has {min_bytes:,} bytes of text (by language: {sizes or 'none is named'})",
        where=data.path,
        hint="lower min_bytes_per_language, or give more text"
        if sizes
        else "map the field that names it: --set fields=text=...,language=...",
    )


def mean_document(preview: DataPreview) -> int:
    """Return the mean bytes of a document."""
    return sum(preview.text_bytes.values()) // max(1, preview.documents) or 1


def text_facts(
    preview: DataPreview,
    kept: tuple[str, ...],
    max_bytes: int,
    primary: tuple[str, ...],
    expanded: tuple[str, ...],
) -> CorpusFacts:
    """Return the facts of a corpus made of the user's text."""
    from koine.data.sample import QUESTION_LANGUAGES

    chat = tuple(code for code in kept if code in preview.chat_languages)
    taken = sum(min(max_bytes, preview.text_bytes[code]) for code in kept)
    return CorpusFacts(
        primary=primary,
        expanded=expanded,
        chat=chat or tuple(code for code in kept if code in QUESTION_LANGUAGES) or ("en",),
        part_bytes={"documents": int(1.3 * taken), "questions/train": 2**20},
        document_bytes=mean_document(preview),
    )


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
    found = replace(
        found,
        max_position_embeddings=max(found.max_position_embeddings, context_length),
        rope_theta=rope_theta or found.rope_theta,
    )
    if mixture.max_length > found.max_position_embeddings:
        raise UserError(
            f"rows have {mixture.max_length} tokens (sequence_length), and the model takes at most "
            f"{found.max_position_embeddings}",
            where=None if model is None else model.path,
            hint=f"choose at most {found.max_position_embeddings}, or lengthen the model's context with the "
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


def copied(model: PlannedInput, **_: Any) -> ModelFacts | None:
    """Hand on what is known of a model that is copied."""
    return model_facts(model)


def combined(
    seed_model: PlannedInput,
    experts: Mapping[str, PlannedInput],
    corpora: Mapping[str, PlannedInput],
    *,
    method: str,
    top_k: int,
    attention_top_k: int,
    encoder: str,
    domain_size: int,
    seed_copies: int = 0,
    **_: Any,
) -> ModelFacts | None:
    """Check that the branches are dense models of one shape, and that the mixture can be made of them."""
    from koine.combine.moe.branches import check_other_shapes
    from koine.steps.combination import METHODS

    if method not in METHODS:
        raise UserError(f"method is '{method}'", hint=did_you_mean(method, METHODS))
    if method == "nexus" and encoder not in ("tfidf", "svd", "hidden") and not Path(encoder).is_dir():
        raise UserError(
            f"encoder is '{encoder}'",
            hint="possible are: tfidf, svd, hidden, or the folder of a sentence model",
        )
    root = dense_model(seed_model)
    for planned in experts.values():
        branch = dense_model(planned)
        if root is not None and branch is not None:
            check_other_shapes(root, branch, planned.path, than=seed_model.path)
    mixture = combined_mixture(method, tuple(experts), top_k, attention_top_k, domain_size, seed_copies)
    if attention_top_k and not method.startswith("bam"):
        surprise(
            f"attention_top_k is {attention_top_k}, and only bam has attention experts (method={method})"
        )
    if root is None:
        return None
    return ModelFacts(
        model_type="koine", config=replace(root, mixture=mixture), vocab_size=known_size(seed_model)
    )


def combined_mixture(
    method: str,
    names: tuple[str, ...],
    top_k: int,
    attention_top_k: int,
    domain_size: int,
    seed_copies: int,
) -> MixtureConfig | None:
    """Return the mixture that a method makes of branches; None for an average.

    Raises `UserError` where more experts are chosen than there are.
    """
    if method == "average":
        return None
    if method.startswith("nexus"):
        return MixtureConfig(
            experts=names,
            top_k=top_k,
            shared_expert=True,
            domain_size=domain_size if method == "nexus" else None,
        )
    if method.startswith("bam"):
        return MixtureConfig(
            experts=("seed", *names),
            top_k=top_k,
            attention="kv-experts" if method == "bam" else "shared-kv",
            attention_top_k=attention_top_k or None,
        )
    copies = tuple(f"seed-{number}" for number in range(2, seed_copies + 2))
    return MixtureConfig(experts=("seed", *names, *copies), top_k=top_k)


def known_size(planned: PlannedInput) -> int | None:
    """Return the number of ids of a model's tokenizer; None where unknown."""
    facts = model_facts(planned)
    return None if facts is None else facts.vocab_size


def merged(
    models: list[PlannedInput],
    base: PlannedInput | None = None,
    *,
    method: str,
    weights: tuple[float, ...],
    seed: int,
    options: tuple[str, ...] = (),
    **_: Any,
) -> ModelFacts | None:
    """Plan the merge where all models are there, which checks that they fit; else its configuration alone."""
    from koine.combine.merging.config import MergeConfig, check_config
    from koine.combine.merging.methods import find_method
    from koine.combine.merging.plan import plan_merge

    given = [*models, *([] if base is None else [base])]
    facts = [model_facts(one) for one in given]
    config = MergeConfig(
        method=method,
        models=tuple(one.path for one in models),
        base=None if base is None else base.path,
        weights=weights,
        options=find_method(method).parse_options(options),
        seed=seed,
    )
    try:
        if all(one.exists for one in given):
            plan_merge(config).close()
        else:
            check_config(config)
    except UserError as error:
        raise with_settings(error) from None
    return facts[0]


def grown(
    model: PlannedInput, expert: PlannedInput, corpus: PlannedInput, *, domain: str, **_: Any
) -> ModelFacts | None:
    """Check that a dense branch of the same shape can become one more expert of a mixture."""
    from koine.combine.moe.branches import check_other_shapes

    config, branch = own_model(model), dense_model(expert)
    if config is None:
        return None
    if config.mixture is None:
        raise UserError("is a dense model", where=model.path, hint="give a mixture of experts")
    if domain in config.mixture.experts:
        raise UserError(f"has an expert '{domain}' already", where=model.path, hint="choose another name")
    if branch is not None:
        check_other_shapes(config, branch, expert.path, than=model.path)
    mixture = replace(config.mixture, experts=(*config.mixture.experts, domain))
    return ModelFacts(
        model_type="koine", config=replace(config, mixture=mixture), vocab_size=known_size(model)
    )
