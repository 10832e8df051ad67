"""The two stages of an arm, and the measures after each.

First pretraining on short texts, then on short and long texts together.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.rope_to_nope.needles import Prompt, held_out_text, prompts
from koine.evaluate import bits_per_byte
from koine.evaluate.long_context.attention import SEGMENTS, attention_of, layer_kind, segment_ids
from koine.files import write_json
from koine.model import VARIANTS, Decoder, LayerSpec, ModelConfig, load_model, variant_layers
from koine.plan import step
from koine.steps import estimates
from koine.tokenizer import load_tokenizer
from koine.train import LanguageModelling, TrainSettings, train

BEGIN = 8
"""Tokens at the beginning that count as the sink (papers: 4 to 10; this paper: 10 of 65,536)."""

INITIALIZER_RANGE = 0.08
"""Standard deviation of all matrices. With a smaller one, attention of a model this narrow stays uniform for
long (pilots on the RoPE arm alone, EXPECTED.md)."""

PAIRS_SHARE = 0.4
"""Share of the first stage's steps on pairs alone; retrieval is learnt there first, then in a haystack."""

Precision = Literal["float32", "bfloat16"]

SHORT_TO_LONG = 3
"""Short texts for each long one in the second stage."""


def layers_of(variant: str, count: int, window: int) -> tuple[LayerSpec, ...]:
    """Return the layers of an arm; `swa-N` has N windowed RoPE layers before each full NoPE layer."""
    if variant.startswith("swa-"):
        every = int(variant.removeprefix("swa-")) + 1
        return variant_layers("rnope-swa", count, window=window, full_every=every)
    assert variant in VARIANTS
    return variant_layers(variant, count)


@step(version="1", estimate=estimates.comparison)
def pretrain_short(
    corpus: Path,
    texts: Path,
    *,
    variant: str,
    theta: float,
    num_layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    window: int,
    length: int,
    longest: int,
    steps: int,
    tokens_per_step: int,
    learning_rate: float,
    prompts: int,
    seed: int,
    threads: int,
    dtype: Precision,
    out: Path,
) -> None:
    """Train the first stage: books, pairs of fact and question, and short texts with facts and questions."""
    tokenizer = load_tokenizer(corpus / "tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        layers=layers_of(variant, num_layers, window),
        rope_theta=theta,
        logit_scale=1.0,
        initializer_range=INITIALIZER_RANGE,
        max_position_embeddings=longest,
    )
    torch.manual_seed(seed)
    model = Decoder(config)
    first = max(1, round(PAIRS_SHARE * steps))
    phases = [({"pairs": 1.0}, first), ({"books": 0.2, "pairs": 0.2, "short": 0.6}, max(1, steps - first))]
    _train(model, corpus, phases, length, tokens_per_step, learning_rate, seed, threads, dtype, out)
    _measure_short(model, corpus, texts, (length,), prompts, out)


@step(version="1", estimate=estimates.comparison)
def extend(
    corpus: Path,
    texts: Path,
    model: Path,
    *,
    theta: float,
    num_layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    window: int,
    short: int,
    long: int,
    steps: int,
    tokens_per_step: int,
    learning_rate: float,
    prompts: int,
    attention_prompts: int,
    seed: int,
    threads: int,
    dtype: Precision,
    out: Path,
) -> None:
    """Train the second stage: three short texts for each long one, in long rows, with a new theta."""
    start = load_model(model, dtype=torch.float32)
    grown = Decoder(replace(start.config, rope_theta=theta))
    grown.load_state_dict(start.state_dict())
    short_share = SHORT_TO_LONG * short / (SHORT_TO_LONG * short + long)
    shares = {"short": short_share, "long": 1.0 - short_share}
    _train(grown, corpus, [(shares, steps)], long, tokens_per_step, learning_rate, seed, threads, dtype, out)
    found = _measure_short(grown, corpus, texts, (short, long, 2 * long, 4 * long), prompts, out)
    found["attention"] = _attention(grown, corpus, texts, long, attention_prompts)
    write_json(out / "measures.json", found)


def _train(
    model: Decoder,
    corpus: Path,
    phases: Sequence[tuple[dict[str, float], int]],
    length: int,
    tokens_per_step: int,
    learning_rate: float,
    seed: int,
    threads: int,
    dtype: Precision,
    out: Path,
) -> None:
    from koine.data import DataOrder, Mixture, Phase, Source

    torch.set_num_threads(threads)

    def sources(shares: dict[str, float]) -> tuple[Source, ...]:
        return tuple(
            Source(name=name, path=corpus / "tokens" / name, proportion=share, max_epochs=1_000.0)
            for name, share in shares.items()
        )

    mixture = Mixture(
        phases=tuple(
            Phase(name=f"phase-{number}", steps=count, sources=sources(shares))
            for number, (shares, count) in enumerate(phases)
        ),
        sequence_length=length,
        batch_size=max(1, tokens_per_step // length),
        seed=seed,
        packing="no_split",
    )
    settings = TrainSettings(
        learning_rate=learning_rate,
        warmup_steps=min(50, min(count for _, count in phases) // 4),
        schedule="cosine",
        dtype=dtype,
        seed=seed,
        compile="off",
        weight_decay=0.1,
        # The loss of an arm without positions may jump and recover; no arm is stopped.
        spike_deviations=0.0,
    )
    train(
        model,
        LanguageModelling(),
        DataOrder(mixture),
        settings,
        out=out,
        tokenizer=corpus / "tokenizer",
        device="cpu" if not torch.cuda.is_available() else "auto",
    )


@torch.no_grad()
def answer_scores(model: Decoder, tested: Sequence[Prompt]) -> dict[str, float]:
    """Score the completions of all questions, given the right tokens before each.

    Returns `accuracy`, the share of questions whose every completion token is the argmax, and
    `log_probability`, the mean over questions of that of a completion token, in nats.
    """
    right: list[float] = []
    scores: list[float] = []
    device = model.output_weight.device
    for prompt in tested:
        tokens = torch.tensor([prompt.tokens], device=device)
        hidden = model(tokens)[0]
        for _, completion, _ in prompt.questions:
            places = torch.tensor(list(completion), device=device)
            logits = model.logits(hidden[places - 1]).float()
            wanted = tokens[0, places]
            right.append(float((logits.argmax(-1) == wanted).all()))
            scores.append(float(logits.log_softmax(-1).gather(1, wanted[:, None]).mean()))
    return {"accuracy": statistics.mean(right), "log_probability": statistics.mean(scores)}


def _measure_short(
    model: Decoder, corpus: Path, texts: Path, lengths: Sequence[int], count: int, out: Path
) -> dict[str, Any]:
    """Measure bits per byte on held-out books in short pieces, and answers at each length; write both."""
    model.eval()
    tokenizer = load_tokenizer(corpus / "tokenizer")
    records = [
        {"text": text, "language": "en", "domain": "books", "id": str(number)}
        for number, text in enumerate(held_out_text(texts, 200))
    ]
    found: dict[str, Any] = {
        "bits_per_byte": bits_per_byte(model, tokenizer, records)["overall"]["bits_per_byte"],
        "answers": {},
    }
    for length in lengths:
        # Short texts hold six facts, long ones eight.
        facts = 6 if length == min(lengths) else 8
        tested = prompts(corpus, texts, length=length, count=count, questions=facts, facts=facts, seed=1)
        found["answers"][str(length)] = answer_scores(model, tested)
    write_json(out / "measures.json", found)
    metrics = {"bits_per_byte": found["bits_per_byte"]}
    metrics |= {f"accuracy_{length}": one["accuracy"] for length, one in found["answers"].items()}
    write_json(out / "metrics.json", metrics)
    return found


def _attention(model: Decoder, corpus: Path, texts: Path, length: int, count: int) -> list[dict[str, Any]]:
    """Measure attention mass by segment, and entropy, of each layer: means over prompts and heads."""
    found = []
    for prompt in prompts(corpus, texts, length=length, count=count, questions=1, facts=8, seed=2, depth=0.5):
        [(question, _, fact)] = prompt.questions
        segments = segment_ids(
            len(prompt.tokens),
            needles=[(fact.start, fact.stop)],
            question_start=question.start,
            begin=BEGIN,
        )
        found.append(attention_of(model, prompt.tokens, segments))
    layers = []
    for layer, spec in enumerate(model.config.layers):
        mass = torch.stack([one.mass[layer] for one in found]).mean(dim=(0, 1)).tolist()
        layers.append(
            {
                "layer": layer,
                "kind": layer_kind(spec),
                "mass": dict(zip(SEGMENTS, mass, strict=True)),
                "entropy_of_rows": statistics.mean(float(one.entropy_of_rows[layer].mean()) for one in found),
                "entropy_of_mean_row": statistics.mean(
                    float(one.entropy_of_layer_mean_row[layer]) for one in found
                ),
            }
        )
    return layers
