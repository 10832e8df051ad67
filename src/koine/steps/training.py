"""The training step: one for pretraining, adaptation, fine-tuning, experts and context extension.

Heavy imports are inside the functions, so that a run in which everything is up to date never loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from koine.errors import UserError
from koine.files import write_json
from koine.model.config import ModelConfig
from koine.plan import step
from koine.steps import checks, estimates
from koine.steps.corpus_files import Roles, load_roles, write_step_report
from koine.steps.evaluation import LANGUAGE_TRACK, bits_per_byte_probe, forgetting_blocks
from koine.steps.text_mixture import TextMixture, language_codes
from koine.train.settings import TrainSettings

if TYPE_CHECKING:
    from koine.model import Decoder
    from koine.model.language_model import LanguageModel

ObjectiveName = Literal["language-modelling", "fine-tuning"]
"""Names of `koine.train.LanguageModelling` and `SupervisedFineTuning`: importing them would load torch."""
BEFORE_TRAINING = -1
"""Step number of the evaluation before the first step; the others have the number of steps done."""


@dataclass(frozen=True, kw_only=True)
class HeldOutProbe:
    """An evaluation during training: bits per byte of a few held-out documents of the corpus.

    How often is `TrainSettings.evaluate_every`.
    """

    groups: dict[str, tuple[str, ...]]
    """Languages (codes or roles) of each figure `bits_per_byte_NAME`."""
    documents: int = 3
    """Documents of each language."""
    max_bytes: int | None = None
    """Length to which a document is cut."""
    track_languages: bool = False
    """Write every language's figure to `languages.jsonl`; of a given model also before the first step."""
    at: tuple[int, ...] = ()
    """Numbers of steps done at which to measure, out of those of `evaluate_every`; empty: all of them."""


def doubling_steps(steps: int) -> tuple[int, ...]:
    """Return steps at which to measure a curve that falls fast at first: each twice the one before, and the last.

    All but the last are multiples of the first, about a 32nd of `steps`.
    """
    first = max(1, steps // 32)
    found = []
    step = first
    while step <= 0.75 * steps:
        found.append(step)
        step *= 2
    return (*found, steps)


@step(version="1", estimate=estimates.training, check=checks.training, threads=0)
def train_model(
    model: Path | None,
    tokens: dict[str, Path],
    tokenizer: Path | None = None,
    corpus: Path | None = None,
    *,
    mixture: TextMixture,
    settings: TrainSettings,
    objective: ObjectiveName = "language-modelling",
    config: ModelConfig | None = None,
    probe: HeldOutProbe | None = None,
    context_length: int = 0,
    rope_theta: float = 0.0,
    out: Path,
) -> None:
    """Train a model on a mixture of texts.

    Args:
        model: folder of the model to train further; None: a new model of `config`, from random weights.
        tokens: folder of the token shards of each source of the mixture, written by a step that tokenizes.
        tokenizer: folder of the tokenizer; the model's own by default.
        corpus: folder of the corpus, for roles of languages and for the probe.
        mixture: what to train on.
        settings: how to train.
        objective: `fine-tuning` has loss on the completions of chats only.
        config: sizes of a new model; those that a given model must have, its attention aside.
        probe: what to evaluate on the way; None: nothing.
        context_length: positions that the model is made for, where that is more than it had; 0: unchanged.
        rope_theta: base of the rotary embedding; 0: unchanged.

    Raises:
        UserError: no model and no config, a model of other sizes, a tokenizer of another size.
    """
    import torch

    from koine.data import DataOrder
    from koine.data.drawn import read_drawn
    from koine.train import LanguageModelling, SupervisedFineTuning, train
    from koine.train.progress import final_metrics
    from koine.train.tracking.run_logger import logger_from_environment

    tokenizer = tokenizer or model
    if tokenizer is None:
        raise UserError("a new model needs a tokenizer", where="train_model")
    roles = None if corpus is None else load_roles(corpus)
    start = new_model(config, tokenizer, settings.seed) if model is None else open_model(model, config)
    extend_context(start, context_length, rope_theta)
    data = mixture.build({name: path / "tokens" for name, path in tokens.items()}, roles)
    if model is not None:
        # Sources go on after the text that the model has seen.
        data = replace(data, drawn=read_drawn(model))
    evaluate = None if probe is None else make_probe(probe, corpus, tokenizer, roles, out)
    tracked = probe is not None and probe.track_languages and model is not None
    if evaluate is not None and tracked and not (out / LANGUAGE_TRACK).exists():
        evaluate(start.to(torch.float32), BEFORE_TRAINING)
    train(
        start.to(torch.float32),
        SupervisedFineTuning() if objective == "fine-tuning" else LanguageModelling(),
        DataOrder(data),
        settings,
        out=out,
        tokenizer=tokenizer,
        init_from=model,
        evaluate=evaluate,
        # By the environment and not by a parameter: a tracker does not change what the step makes.
        logger=logger_from_environment(),
    )
    write_json(out / "metrics.json", final_metrics(out / "metrics.jsonl"))
    if probe is not None and tracked:
        groups = {name: language_codes(members, roles) for name, members in probe.groups.items()}
        added = groups.get("adapted") or groups.get("expanded") or ()
        title = f"Adapted to {', '.join(added)}".removesuffix(" to ")
        write_step_report(out, title, forgetting_blocks(out, groups.get("primary", ())))


def new_model(config: ModelConfig | None, tokenizer: Path, seed: int) -> Decoder:
    """Return a new model with random weights; raises `UserError` where the tokenizer has another size."""
    import torch

    from koine.model import Decoder
    from koine.tokenizer import load_tokenizer

    if config is None:
        raise UserError("a new model needs a config", where="train_model")
    found = load_tokenizer(tokenizer).vocab_size
    if found != config.vocab_size:
        raise UserError(
            f"the text gave {found} of the {config.vocab_size} tokens asked for",
            where=tokenizer,
            hint=f"set vocabulary_size={found} or add text",
        )
    torch.manual_seed(seed)
    return Decoder(config)


def open_model(path: Path, config: ModelConfig | None) -> Decoder:
    """Return the model of a folder.

    Raises `UserError` if its sizes are not those of `config`, attention aside.
    """
    from koine.model import load_model

    model = load_model(path)
    if config is None:
        return model
    found = model.config
    expected = replace(config, layers=found.layers, rope_theta=found.rope_theta)
    if found != expected or len(found.layers) != len(config.layers):
        have, want = ({**asdict(one), "layers": len(one.layers)} for one in (found, config))
        other = [
            f"{key} is {have[key]}, not {want[key]}"
            for key in have
            if key != "rope_theta" and have[key] != want[key]
        ]
        raise UserError(
            f"is another model than expected: {', '.join(other)}",
            where=path,
            hint="set preset and vocabulary_size",
        )
    return model


def extend_context(model: Decoder, context_length: int, rope_theta: float) -> None:
    """Change the base of the rotary embedding and the number of positions in place; 0: unchanged."""
    from koine.model import set_rope_theta
    from koine.model.layer_patterns import reconfigure

    if rope_theta:
        set_rope_theta(model, rope_theta)
    if context_length > model.context_length:
        reconfigure(model, model.config.with_context(context_length))


def make_probe(
    probe: HeldOutProbe, corpus: Path | None, tokenizer: Path, roles: Roles | None, out: Path
) -> Callable[[LanguageModel, int], Mapping[str, float]]:
    """Return the evaluation that the training loop calls."""
    if corpus is None:
        raise UserError("a probe needs a corpus", where="train_model")
    return bits_per_byte_probe(
        corpus,
        tokenizer,
        {name: language_codes(members, roles) for name, members in probe.groups.items()},
        documents=probe.documents,
        max_bytes=probe.max_bytes,
        tracked=out / LANGUAGE_TRACK if probe.track_languages else None,
        at=probe.at,
    )


def training_settings(*, steps: int, **fields: Any) -> TrainSettings:
    """Return settings for `steps` steps: a short warm-up, ten checkpoints, no stop at loss spikes.

    fields: fields of `TrainSettings`, which come first.
    """
    # The first steps of a short training, and a change of its data, make the loss jump: that is no accident.
    defaults = {
        "warmup_steps": max(1, steps // 20),
        "checkpoint_every": max(10, steps // 10),
        "keep_last": 1,
        "spike_deviations": 0.0,
    }
    return TrainSettings(**{**defaults, **fields})
