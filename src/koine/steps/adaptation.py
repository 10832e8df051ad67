"""The study's three ways to adapt a model to languages, as steps, with what each language gains and loses on a fixed schedule.

| regime | learns from | source |
|---|---|---|
| `continued` | text of the expanded languages, with a share of the primary ones re-injected | continued pretraining, arXiv 2506.10766 |
| `targeted` | chats (or text) of the chosen languages alone | targeted adaptation, the same |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import write_json
from koine.languages import language
from koine.plan import step
from koine.steps import estimates
from koine.steps.corpus_files import load_roles, write_step_report
from koine.steps.evaluation import bits_per_byte_probe, tracked_languages
from koine.steps.training import load_of_preset, phase_of, train_step, training_settings

TRACK = "languages.jsonl"
BEFORE = -1
"""What the evaluation before the first step is filed under; the others are filed under the number of steps done."""


@step(version="2", estimate=estimates.training)
def adapt_to(
    corpus: Path,
    tokenizer: Path,
    model: Path,
    tokens: Path,
    *,
    kind: str,
    languages: tuple[str, ...],
    primary_share: float,
    preset: str,
    vocabulary_size: int,
    steps: int,
    sequence_length: int,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: float,
    dtype: str,
    evaluate_every: int,
    evaluation_documents: int,
    evaluation_bytes: int,
    seed: int,
    threads: int,
    out: Path,
) -> None:
    """Adapt a model to `languages` (none named: the corpus's expanded ones), drawn in equal parts; bits per byte of these and of the primary languages every `evaluate_every` steps.

    kind: `text` (language modelling on `tokens` of documents) or `chats` (loss on the completions of `tokens` of chats).
    primary_share: of the text, from the corpus's primary languages: 0 for targeted adaptation.
    """
    import torch

    from koine.data import Source

    if kind not in ("text", "chats"):
        raise UserError(f"unknown kind '{kind}'", hint="text or chats")
    roles = load_roles(corpus)
    languages = languages or roles.expanded
    sources = [
        Source(
            name="adapted",
            path=tokens / "tokens",
            proportion=1.0 - primary_share,
            languages=dict.fromkeys(languages, 1.0),
        )
    ]
    if primary_share > 0.0:
        sources.append(
            Source(
                name="primary",
                path=tokens / "tokens",
                proportion=primary_share,
                languages=dict.fromkeys(roles.primary, 1.0),
            )
        )
    probe = bits_per_byte_probe(
        corpus,
        tokenizer,
        {"primary": roles.primary, "adapted": languages},
        documents=evaluation_documents,
        most_bytes=evaluation_bytes,
        tracked=out / TRACK,
    )
    start = load_of_preset(model, preset, vocabulary_size)
    if not (out / TRACK).exists():
        # What is forgotten is counted from before the first step.
        probe(start.to(torch.float32), BEFORE)
    train_step(
        start,
        phase_of(
            "sft" if kind == "chats" else "continue",
            sources,
            steps,
            sequence_length,
            batch_size,
            seed,
            packing="no_split" if kind == "chats" else "concat",
        ),
        training_settings(
            learning_rate=learning_rate,
            schedule="constant",
            steps=steps,
            micro_batch_size=micro_batch_size,
            dtype=dtype,
            evaluate_every=evaluate_every,
            seed=seed,
            threads=threads,
        ),
        out=out,
        tokenizer=tokenizer,
        evaluate=probe,
        init_from=model,
    )
    write_step_report(out, f"Adapted to {', '.join(languages)}", forgetting_blocks(out, roles.primary))


def forgetting_blocks(model: Path, primary: tuple[str, ...]) -> list[dict[str, Any]]:
    """A heat map of bits per byte, language by step, and what each language gained or lost from the first to the last evaluation."""
    tracked = tracked_languages(model / TRACK)
    if not tracked:
        return []
    steps = sorted(tracked)
    codes = list(tracked[steps[-1]])
    change = {code: tracked[steps[-1]][code] - tracked[steps[0]][code] for code in codes}
    write_json(model / "forgetting.json", {"steps": steps, "bits_per_byte": tracked, "change": change})
    return [
        {
            "kind": "heatmap",
            "title": "Bits per byte while it adapts",
            "label": "bits per byte",
            "rows": codes,
            "columns": [str(max(step, 0)) for step in steps],
            "values": [[tracked[step][code] for step in steps] for code in codes],
        },
        {
            "kind": "table",
            "title": "From the first evaluation to the last",
            "caption": "Below 0: learnt. Above 0: forgotten.",
            "columns": ["language", "name", "part", "change in bits per byte"],
            "rows": [
                [
                    code,
                    language(code).name,
                    "primary" if code in primary else "adapted",
                    round(change[code], 4),
                ]
                for code in sorted(codes, key=lambda code: change[code])
            ],
        },
    ]


@step(version="2", estimate=estimates.tokens)
def move_to_tokenizer(
    model: Path,
    tokenizer: Path,
    corpus: Path,
    *,
    method: str,
    languages: tuple[str, ...],
    seed: int,
    out: Path,
) -> None:
    """Swap a model's vocabulary for `tokenizer`'s (the CVA baselines of arXiv 2506.10766 and later ones; see `koine.model.adapt.vocabulary_transfer`).

    languages: whose text `focus` and `distill` learn from; empty for all of the corpus.
    """
    from koine.model.adapt.vocabulary_transfer import TEXT_METHODS, move_model
    from koine.steps.corpus_files import existing, read_lines

    texts = None
    if method in TEXT_METHODS:
        paths = existing(corpus, "documents", languages or load_roles(corpus).all).values()
        texts = [
            record["text"] for path in paths for record, _ in zip(read_lines(path), range(60), strict=False)
        ]
    moved = move_model(model, tokenizer, out, method=method, texts=texts, seed=seed)  # type: ignore[arg-type]
    write_json(
        out / "metrics.json", {"shared": moved.shared, "spelled": moved.spelled, "dropped": moved.dropped}
    )
