"""The steps that train: pretraining and chat; adaptation is in `regimes`.

Heavy imports are inside the functions, so that a run in which everything is up to date never loads torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from koine.errors import UserError
from koine.files import write_json
from koine.plan import step
from koine.steps import estimates
from koine.steps.corpus_files import load_roles
from koine.steps.evaluation import bits_per_byte_probe

if TYPE_CHECKING:
    from koine.data.mixture import Mixture, Packing, Source
    from koine.model import Decoder
    from koine.model.language_model import LanguageModel
    from koine.model.layer_patterns import Variant
    from koine.train import TrainSettings


@step(version="1", estimate=estimates.training)
def pretrain(
    corpus: Path,
    tokenizer: Path,
    documents: Path,
    code: Path | None = None,
    *,
    preset: str,
    vocabulary_size: int,
    steps: int,
    sequence_length: int,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: float,
    dtype: str,
    code_share: float,
    english_share: float,
    evaluate_every: int,
    seed: int,
    threads: int,
    expanded_share: float = 0.0,
    track_languages: bool = False,
    attention: str = "",
    window: int = 0,
    full_every: int = 0,
    rope_theta: float = 0.0,
    out: Path,
) -> None:
    """Pretrain a new model of `preset` on the primary languages (and code), from random weights.

    `attention`, `window`, `full_every` and `rope_theta` are those of `koine.model.with_attention`; empty or 0: the preset's own.

    `expanded_share` of the text is of the expanded languages, in equal parts, and comes out of English's share, as in the
    5 % arm of arXiv 2506.10766. With `track_languages`, each evaluation also writes every language's bits per byte to `languages.jsonl`.
    """
    import torch

    from koine.data import Source
    from koine.model import Decoder
    from koine.model import preset as model_preset
    from koine.tokenizer import load_tokenizer

    roles = load_roles(corpus)
    torch.manual_seed(seed)
    found = load_tokenizer(tokenizer).vocab_size
    if found != vocabulary_size:
        raise UserError(
            f"the text gave {found} of the {vocabulary_size} tokens asked for",
            where=tokenizer,
            hint=f"set vocabulary_size={found} or add text",
        )
    config = model_preset(
        preset,
        vocabulary_size,
        attention=cast("Variant | None", attention or None),
        window=window or None,
        full_every=full_every or None,
        rope_theta=rope_theta or None,
    )
    model = Decoder(config)
    if not 0.0 <= expanded_share < english_share:
        raise UserError(
            f"the share of expanded languages is {expanded_share}, that of English {english_share}",
            hint="the first comes out of the second, so it must be smaller",
        )
    primary_english = (english_share - expanded_share) / (1.0 - expanded_share)
    text_share = 1.0 - (code_share if code is not None else 0.0)
    sources = [
        Source(
            name="documents",
            path=documents / "tokens",
            proportion=text_share * (1.0 - expanded_share),
            languages=with_english_share(roles.primary, primary_english),
        )
    ]
    if expanded_share > 0.0:
        sources.append(
            Source(
                name="expanded",
                path=documents / "tokens",
                proportion=text_share * expanded_share,
                languages=dict.fromkeys(roles.expanded, 1.0),
            )
        )
    if code is not None:
        sources.append(Source(name="code", path=code / "tokens", proportion=code_share))
    train_step(
        model,
        phase_of("pretrain", sources, steps, sequence_length, batch_size, seed, packing="concat"),
        training_settings(
            learning_rate=learning_rate,
            schedule="cosine",
            steps=steps,
            micro_batch_size=micro_batch_size,
            dtype=dtype,
            evaluate_every=evaluate_every,
            seed=seed,
            threads=threads,
        ),
        out=out,
        tokenizer=tokenizer,
        evaluate=bits_per_byte_probe(
            corpus,
            tokenizer,
            {"primary": roles.primary},
            most_bytes=3_000 if track_languages else None,
            tracked=out / "languages.jsonl" if track_languages else None,
        ),
    )


@step(version="1", estimate=estimates.training)
def teach_chat(
    tokenizer: Path,
    model: Path,
    chats: Path,
    *,
    preset: str,
    vocabulary_size: int,
    steps: int,
    sequence_length: int,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: float,
    dtype: str,
    seed: int,
    threads: int,
    out: Path,
) -> None:
    """Supervised fine-tuning on chats: whole conversations packed, loss on the completions only."""
    from koine.data import Source

    train_step(
        load_of_preset(model, preset, vocabulary_size),
        phase_of(
            "sft",
            [Source(name="chats", path=chats / "tokens", proportion=1.0)],
            steps,
            sequence_length,
            batch_size,
            seed,
            packing="no_split",
        ),
        training_settings(
            learning_rate=learning_rate,
            schedule="linear",
            steps=steps,
            micro_batch_size=micro_batch_size,
            dtype=dtype,
            evaluate_every=0,
            seed=seed,
            threads=threads,
        ),
        out=out,
        tokenizer=tokenizer,
        evaluate=None,
        init_from=model,
    )


def load_of_preset(path: Path, preset: str, vocabulary_size: int) -> Decoder:
    """A model that must be of a preset's sizes ("": any), whatever its attention; raises `UserError` where it is of others."""
    from koine.model import load_model
    from koine.model import preset as model_preset

    model = load_model(path)
    if not preset:
        return model
    expected, found = model_preset(preset, vocab_size=vocabulary_size), model.config
    same_attention = replace(expected, layers=found.layers, rope_theta=found.rope_theta)
    if found != same_attention or len(found.layers) != len(expected.layers):
        raise UserError(
            f"is not a {preset} with {vocabulary_size} tokens",
            where=path,
            hint="set preset and vocabulary_size",
        )
    return model


def with_english_share(codes: tuple[str, ...], share: float) -> dict[str, float]:
    """Weights over `codes`: English pinned to `share` where it is one of several, the others equal."""
    if "en" not in codes or len(codes) == 1:
        return dict.fromkeys(codes, 1.0)
    other = (1.0 - share) / (len(codes) - 1)
    return {code: share if code == "en" else other for code in codes}


def phase_of(
    name: str,
    sources: list[Source],
    steps: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
    *,
    packing: Packing,
) -> Mixture:
    from koine.data import Mixture, Phase

    return Mixture(
        phases=(Phase(name=name, steps=steps, sources=tuple(sources)),),
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        packing=packing,
    )


def training_settings(*, steps: int, **fields: Any) -> TrainSettings:
    from koine.train import TrainSettings

    return TrainSettings(
        warmup_steps=max(1, steps // 20),
        checkpoint_every=max(10, steps // 10),
        keep_last=1,
        # A recipe's first steps are short and its phases change the data at once: a rise is no accident here.
        spike_deviations=0.0,
        **fields,
    )


def train_step(
    model: Decoder,
    mixture: Mixture,
    settings: TrainSettings,
    *,
    out: Path,
    tokenizer: Path,
    evaluate: Callable[[LanguageModel, int], Mapping[str, float]] | None,
    init_from: Path | None = None,
) -> None:
    """Train over a mixture.

    began_as: the folder that `model` was opened from, after whose text the sources go on.
    """
    import torch

    from koine.data import DataOrder
    from koine.data.drawn import read_drawn
    from koine.train import LanguageModelling, SupervisedFineTuning, train

    chats = mixture.phases[0].name == "sft"
    if init_from is not None:
        mixture = replace(mixture, drawn=read_drawn(init_from))
    train(
        model.to(torch.float32),
        SupervisedFineTuning() if chats else LanguageModelling(),
        DataOrder(mixture),
        settings,
        out=out,
        tokenizer=tokenizer,
        init_from=init_from,
        evaluate=evaluate,
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    metrics = {"loss": sum(losses[-10:]) / len(losses[-10:])}
    for line in reversed(lines):
        found = {
            key.removeprefix("evaluation/"): value
            for key, value in line.items()
            if key.startswith("evaluation/")
        }
        if found:
            metrics |= found
            break
    write_json(out / "metrics.json", metrics)
