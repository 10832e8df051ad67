"""Estimates of the memory, time and disk space of steps, made before they run.

Training and evaluation follow from the model and from this machine's speed (`koine.train.speed`). The other
steps follow from rates measured on one core of a server; earlier builds in the same run folder then correct
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.files import read_json
from koine.plan import Estimate, PlannedInput
from koine.steps.facts import CorpusFacts, corpus_facts, folder_bytes, model_facts

if TYPE_CHECKING:
    from koine.model.config import ModelConfig
    from koine.steps.text_mixture import TextMixture
    from koine.steps.training import HeldOutProbe
    from koine.train.settings import TrainSettings

MEGABYTE = 2**20
LIGHT, IMPORTED = 26 * MEGABYTE, 310 * MEGABYTE
"""Resident bytes of a process without torch, and of one that has imported it and an evaluation."""
IMPORT_SECONDS = 1.8
"""Time to import torch and the evaluations."""
RECORD_BYTES, CHAT_BYTES, DIALOGUE_BYTES = 600, 320, 480
"""Bytes of a document, a chat and a dialogue of the sample world, as JSON."""
TEXT_BYTES = 600
"""Bytes of text of a document, where they are not known."""
BYTES_PER_TOKEN = 3.5
QUESTION_TOKENS = 40
"""Forward passes of one token that cost as much as reading and answering a short question."""
UNKNOWN_LANGUAGES = 12
UNKNOWN_PARAMETERS = 10_000_000
SCORED_BYTES, SCORED_BYTES_PER_TOKEN = 80 * MEGABYTE, 80_000
"""Activations of a batch that is scored during a training; its logits, for each token of the vocabulary."""


def sample(
    *,
    languages: tuple[str, ...],
    documents_per_language: int,
    questions_per_language: int,
    code_bytes: int = 0,
    **_: Any,
) -> Estimate:
    """Return the estimate of the sample world: 12 MB a second, after reading CLDR."""
    from koine.data.sample.world import DIALOGUES

    written = int(code_bytes * 1.2) + len(languages) * int(
        1.1 * documents_per_language * RECORD_BYTES
        + 1.5 * questions_per_language * CHAT_BYTES
        + DIALOGUES * questions_per_language * DIALOGUE_BYTES
    )
    return Estimate(LIGHT + 16 * MEGABYTE + 5 * written // 2, 1.8 + written / 12e6, written)


def own(*, max_bytes_per_language: int, planned: Mapping[str, Any], **_: Any) -> Estimate:
    """Return the estimate of sorting the user's text, which is streamed."""
    facts = planned_facts(planned, "data")
    known = UNKNOWN_LANGUAGES if facts is None or facts.languages is None else len(facts.languages)
    return own_text(max_bytes=known * max_bytes_per_language, planned=planned)


def own_text(*, max_bytes: int, planned: Mapping[str, Any], **_: Any) -> Estimate:
    """Return the estimate of reading text until there are `max_bytes`: 40 MB a second."""
    given = sum(folder_bytes(one.path) for one in flat_inputs(planned.values()) if one.exists)
    written = min(int(1.5 * max_bytes), given)
    return Estimate(LIGHT + 4 * MEGABYTE, 0.02 + given / 4e7 + written / 4e7, written)


def planned_facts(planned: Mapping[str, Any], name: str = "corpus") -> CorpusFacts | None:
    """Return what is known of the corpus among a step's inputs."""
    given = planned.get(name)
    return corpus_facts(given) if isinstance(given, PlannedInput) else None


def tokenizer(
    *, sample_bytes: int, vocabulary_size: int, planned: Mapping[str, Any], scope: str = "universal", **_: Any
) -> Estimate:
    """Return the estimate of BPE training: the table of pre-tokens grows with the sample."""
    facts = planned_facts(planned)
    text = sample_bytes
    if facts is not None and facts.part_bytes.get("documents"):
        share = 1.0
        if scope != "universal" and facts.languages and facts.primary:
            share = len(facts.primary) / len(facts.languages)
        text = min(text, int(facts.part_bytes["documents"] * share))
    return Estimate(
        LIGHT + 19 * MEGABYTE + 8 * text + 1_000 * vocabulary_size, 0.2 + text / 5e6, 80 * vocabulary_size
    )


def tokens(*, part: str, planned: Mapping[str, Any], **_: Any) -> Estimate:
    """Return the estimate of tokenizing a part of a corpus."""
    facts = planned_facts(planned)
    size = 16 * MEGABYTE if facts is None else facts.part_bytes.get(part, 0)
    # Half of a short chat's record is its structure and not its text.
    return tokenized(size, text_share=0.5 if part in ("dialogues", "questions/train") else 1.0)


def domain_tokens(*, planned: Mapping[str, Any], **_: Any) -> Estimate:
    """Return the estimate of tokenizing a domain."""
    return tokens(part="documents", planned=planned)


def tokenized(text: int, *, text_share: float = 1.0) -> Estimate:
    """Return the estimate of tokenizing so many bytes: memory is bounded by the shards in work.

    text_share: share of text in the bytes of the records.
    """
    memory = LIGHT + 64 * MEGABYTE + 32 * min(int(text_share * text), 20 * MEGABYTE)
    return Estimate(memory, 0.15 + text / 4e6, MEGABYTE // 64 + 3 * text // 5)


def training(
    model: Path | None,
    *,
    mixture: TextMixture,
    settings: TrainSettings,
    config: ModelConfig | None,
    probe: HeldOutProbe | None = None,
    threads: int,
    planned: Mapping[str, Any],
    **_: Any,
) -> Estimate:
    """Return the estimate of `koine.train`; of a model of unknown sizes that of ten million parameters."""
    from koine.steps.corpus_files import Roles
    from koine.train import estimate_training

    config = planned_config(planned) or config or unknown_model()
    roles = Roles(primary=("en",), expanded=("de",), chat=())
    found = estimate_training(config, replace(settings, threads=threads), mixture.build({}, roles))
    trained = mixture.steps * mixture.batch_size * mixture.sequence_length
    scored = (
        0.0 if probe is None else evaluated_tokens(probe, settings, mixture.steps, planned_facts(planned))
    )
    return Estimate(
        found.peak_bytes + (SCORED_BYTES + SCORED_BYTES_PER_TOKEN * config.vocab_size if scored else 0),
        IMPORT_SECONDS + 0.6 + found.seconds * (1.0 + scored / (3.0 * trained)),
        found.kept_bytes + MEGABYTE // 4 + 80 * config.vocab_size,
        found.temporary_bytes,
        found.basis,
        found.measured,
    )


def planned_config(planned: Mapping[str, Any]) -> ModelConfig | None:
    """Return the configuration of the input `model`; None where there is none, or it is not known."""
    given = planned.get("model")
    facts = model_facts(given) if isinstance(given, PlannedInput) else None
    return None if facts is None else facts.config


def unknown_model() -> ModelConfig:
    """Return a configuration of some ten million parameters."""
    from koine.model import preset

    return preset("koine-8m", 8192)


def evaluated_tokens(
    probe: HeldOutProbe, settings: TrainSettings, steps: int, facts: CorpusFacts | None
) -> float:
    """Return the tokens that all evaluations of a training score."""
    if not settings.evaluate_every:
        return 0.0
    named = {one for members in probe.groups.values() for one in members}
    languages = len(named)
    if facts is not None and facts.languages is not None:
        roles = {"primary": facts.primary or (), "expanded": facts.expanded or ()}
        languages = len({code for one in named for code in roles.get(one, (one,))})
    elif named & {"primary", "expanded"}:
        languages = UNKNOWN_LANGUAGES
    document = document_bytes(facts)
    document = document if probe.max_bytes is None else min(document, probe.max_bytes)
    times = len(probe.at) or -(-steps // settings.evaluate_every)
    return float((times + probe.track_languages) * languages * probe.documents * document / BYTES_PER_TOKEN)


def document_bytes(facts: CorpusFacts | None) -> int:
    """Return the bytes of text of a document."""
    return TEXT_BYTES if facts is None else facts.document_bytes


def scoring(
    config: ModelConfig | None, tokens: float, threads: int, *, more_seconds: float = 0.0
) -> Estimate:
    """Return the estimate of a step that scores so many tokens with a float32 model."""
    from koine.model.counting import count_parameters
    from koine.train.settings import TrainSettings
    from koine.train.speed import training_speed

    config = config or unknown_model()
    # A forward pass takes a third of a forward and backward pass.
    speed = training_speed(config, TrainSettings(dtype="float32"), 4, 256, threads)
    seconds = IMPORT_SECONDS + more_seconds + tokens * speed.micro_batch / 3 / (4 * 256)
    memory = IMPORTED + 8 * count_parameters(config).total + SCORED_BYTES
    return Estimate(memory, seconds, MEGABYTE // 16, 0, speed.basis, speed.measured)


def evaluation(
    *,
    documents_per_language: int,
    questions_per_language: int,
    max_document_bytes: int | None = None,
    threads: int,
    planned: Mapping[str, Any],
    **_: Any,
) -> Estimate:
    """Return the estimate of an evaluation on documents and questions."""
    facts = planned_facts(planned)
    languages = UNKNOWN_LANGUAGES if facts is None or facts.languages is None else len(facts.languages)
    chats = languages if facts is None or facts.chat is None else len(facts.chat)
    documents = documents_per_language
    if facts is not None and facts.heldout_documents is not None:
        documents = min(documents, facts.heldout_documents)
    each = document_bytes(facts)
    each = each if max_document_bytes is None else min(each, max_document_bytes)
    tokens = languages * documents * each / BYTES_PER_TOKEN
    tokens += chats * (questions_per_language + 1) * QUESTION_TOKENS
    return scoring(planned_config(planned), tokens, threads)


def comparison(**_: Any) -> Estimate:
    """Return the estimate of reading evaluations and writing tables."""
    return Estimate(LIGHT, 0.05, MEGABYTE // 4)


def long_evaluation(
    *, lengths: tuple[int, ...], documents: int, threads: int, planned: Mapping[str, Any], **_: Any
) -> Estimate:
    """Return the estimate of an evaluation at several context lengths."""
    # The longest documents are chosen: they are taken to be as long as the longest context.
    each = max(max(lengths), document_bytes(planned_facts(planned)) / BYTES_PER_TOKEN)
    # Windows overlap by half, so that most tokens are read twice.
    tokens = 1.5 * documents * each * len(lengths)
    return scoring(planned_config(planned), tokens, threads)


def domains(
    corpora: Mapping[str, Path],
    *,
    documents: int,
    characters: int,
    threads: int,
    planned: Mapping[str, Any],
    **_: Any,
) -> Estimate:
    """Return the estimate of an evaluation on several domains."""
    known = [facts for facts in map(corpus_facts, planned.get("corpora", {}).values()) if facts is not None]
    document = max((facts.document_bytes for facts in known), default=TEXT_BYTES)
    tokens = len(corpora) * documents * min(document, characters) / BYTES_PER_TOKEN
    return scoring(planned_config(planned), tokens, threads)


def mixed(
    seed_model: Path, experts: Mapping[str, Path], *, method: str, planned: Mapping[str, Any], **_: Any
) -> Estimate:
    """Return the estimate of combining branches: all of them are in memory, the result too."""
    from koine.model.counting import count_parameters

    facts = model_facts(planned["seed_model"]) if "seed_model" in planned else None
    config = None if facts is None else facts.config
    size = 4 * (UNKNOWN_PARAMETERS if config is None else count_parameters(config).total)
    count = len(experts) + 1
    # Encoders of domain embeddings are fitted on the text.
    fitted = 1.5 if method == "nexus" else 0.0
    memory = IMPORTED + int(fitted * 120 * MEGABYTE) + 2 * count * size
    return Estimate(
        memory, IMPORT_SECONDS + 0.5 + fitted + count * size / 3e8, count * size + int(fitted * 3 * MEGABYTE)
    )


def mixing(planned: Mapping[str, Any], **_: Any) -> Estimate:
    """Return the estimate of reading some models and writing one of the size of the first."""
    size = max(given_bytes(planned.values()), 4 * UNKNOWN_PARAMETERS // 10)
    return Estimate(IMPORTED, IMPORT_SECONDS + size / 2e8, size)


def flat_inputs(values: Iterable[Any]) -> Iterator[PlannedInput]:
    """Yield every input, those in lists and dictionaries too."""
    for value in values:
        if isinstance(value, PlannedInput):
            yield value
        elif isinstance(value, dict):
            yield from flat_inputs(value.values())
        elif isinstance(value, list):
            yield from flat_inputs(value)


def given_bytes(values: Iterable[Any]) -> int:
    """Return the size of the largest model among a step's inputs that are there already."""
    there = [one.path for one in flat_inputs(values) if one.exists]
    return max((sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in there), default=0)


def sample_code(**_: Any) -> Estimate:
    """Return the estimate of some megabytes of Python."""
    return Estimate(LIGHT + 100 * MEGABYTE, 3.0, 10 * MEGABYTE)


def copy(planned: Mapping[str, Any], **_: Any) -> Estimate:
    """Return the estimate of copying a model."""
    from koine.model.counting import count_parameters

    config = planned_config(planned)
    size = given_bytes(planned.values()) if config is None else 4 * count_parameters(config).total
    return Estimate(LIGHT, 0.01 + size / 5e8, size)


def profile_sample(*, languages: tuple[str, ...], documents: int, **_: Any) -> Estimate:
    """Return the estimate of writing parallel text: the locales of Babel take most of the time."""
    written = len(languages) * documents * RECORD_BYTES
    return Estimate(LIGHT + 16 * MEGABYTE + 3 * written, 1.0 + 0.05 * len(languages) + written / 6e6, written)


def stored_parameters(planned: PlannedInput) -> int:
    """Return the parameters of a model of any architecture, from its weights; a default where they are away."""
    facts = model_facts(planned)
    if facts is not None and facts.config is not None:
        from koine.model.counting import count_parameters

        return count_parameters(facts.config).active
    if not planned.exists:
        return UNKNOWN_PARAMETERS
    from koine.files import read_json_object

    value = read_json_object(planned.path / "config.json", hint="it is no model's configuration")
    stored = str(value.get("dtype") or value.get("torch_dtype") or "float32")
    size = given_bytes([planned]) // (2 if "16" in stored else 4)
    return size or UNKNOWN_PARAMETERS


def forward_seconds(parameters: int, tokens: float, dtype: str, threads: int) -> float:
    """Return the seconds of forward passes over so many tokens, at an assumed rate of each core."""
    from koine.train.speed import ASSUMED_RATE

    return 2.0 * parameters * tokens / (ASSUMED_RATE[dtype] * threads)


ASSUMED = "Speed of profiles: assumed, it may be off by a factor of 3."


def profile_model(*, dtype: str, threads: int, planned: Mapping[str, Any], **_: Any) -> Estimate:
    """Return the estimate of scoring the documents of each language."""
    facts = planned["text"].facts
    facts = facts if isinstance(facts, CorpusFacts) else None
    languages = UNKNOWN_LANGUAGES if facts is None or facts.languages is None else len(facts.languages)
    documents = 10 if facts is None or facts.heldout_documents is None else facts.heldout_documents
    tokens = languages * documents * document_bytes(facts) / BYTES_PER_TOKEN
    parameters = stored_parameters(planned["model"])
    seconds = IMPORT_SECONDS + 3.0 + forward_seconds(parameters, 2.0 * tokens, dtype, threads)
    memory = IMPORTED + (10 if dtype == "float32" else 6) * parameters + 4 * SCORED_BYTES
    return Estimate(memory, seconds, MEGABYTE // 8, 0, ASSUMED, measured=False)


def profile_speed(
    *,
    lengths: tuple[int, ...],
    repeats: int,
    max_seconds: float,
    dtype: str,
    threads: int,
    planned: Mapping[str, Any],
    **_: Any,
) -> Estimate:
    """Return the estimate of measuring each model at each length, with the limit of time."""
    from koine.generate.speed import NEW_TOKENS

    seconds, largest = IMPORT_SECONDS, 0
    for model in planned["models"].values():
        parameters = stored_parameters(model)
        largest = max(largest, parameters)
        # A decode step reads all weights; it takes about as long as a prefill of eight tokens.
        each = [forward_seconds(parameters, length + 8 * NEW_TOKENS, dtype, threads) for length in lengths]
        seconds += 3.0 + sum(min(max_seconds, repeats * one) for one in each if one <= max_seconds)
    memory = IMPORTED + (10 if dtype == "float32" else 6) * largest + 6 * SCORED_BYTES
    return Estimate(memory, seconds, MEGABYTE // 64, 0, ASSUMED, measured=False)


def inspected_groups(
    pairs: Path, *, limit: int | None = None, threads: int, planned: Mapping[str, Any], **_: Any
) -> Estimate:
    """Return the estimate of reading groups with a model; those that are not written yet count as few."""
    tokens, groups = 100_000.0, 0
    manifest = pairs / "manifest.json"
    if manifest.is_file():
        about = read_json(manifest)
        tokens, groups = float(about["tokens"]), int(about["documents"])
    if limit is not None and groups > limit:
        tokens *= limit / groups
    return scoring(planned_config(planned), tokens, threads)


def group_tokens(*, planned: Mapping[str, Any], **_: Any) -> Estimate:
    """Return the estimate of tokenizing groups; of records that are not there yet, of 16 MB."""
    given = planned.get("records")
    there = isinstance(given, PlannedInput) and given.exists
    size = folder_bytes(given.path) if isinstance(given, PlannedInput) and there else 16 * MEGABYTE
    return tokenized(size, text_share=0.5)


def reference(*, mixture: TextMixture, threads: int, planned: Mapping[str, Any], **_: Any) -> Estimate:
    """Return the estimate of the reference's log-probabilities: a forward pass of each row of the mixture."""
    rows = float(mixture.steps * mixture.batch_size * mixture.sequence_length)
    return scoring(planned_config(planned), rows, threads)


def alignment(
    model: Path,
    *,
    mixture: TextMixture,
    settings: TrainSettings,
    monitor: Any = None,
    threads: int,
    planned: Mapping[str, Any],
    **_: Any,
) -> Estimate:
    """Return the estimate of preference training: that of a training on as many tokens, and the evaluations."""
    trained = training(
        model, mixture=mixture, settings=settings, config=None, threads=threads, planned=planned
    )
    if monitor is None or not settings.evaluate_every:
        return trained
    evaluations = -(-mixture.steps // settings.evaluate_every)
    limit = 1_000 if monitor.limit is None else monitor.limit
    answers = UNKNOWN_LANGUAGES * limit
    # A token that is generated costs about as much as two that are scored; answers are scored once more.
    tokens = evaluations * answers * (3 * monitor.max_new_tokens / 2 + 2 * mixture.sequence_length)
    measured = scoring(planned_config(planned), float(tokens), threads)
    return replace(
        trained,
        memory_bytes=max(trained.memory_bytes, measured.memory_bytes),
        seconds=trained.seconds + measured.seconds,
    )
