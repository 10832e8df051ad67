"""Report blocks of a monitor's files: likelihoods, entropy beside mass, languages by step, samples, verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from koine.align.overoptimisation import Verdict
from koine.languages import LANGUAGES

Block = dict[str, Any]
Row = Mapping[str, Any]

LINES = (
    ("Log-likelihood of held-out completions", "nats per token", ("chosen", "rejected")),
    ("Margin: chosen less rejected", "nats per token", ("margin",)),
    ("Held-out pairs whose chosen completion is likelier", "share", ("accuracy",)),
    ("Entropy of the top 10 next tokens", "bits", ("entropy", "entropy_raw")),
    ("Probability mass of the top 10 next tokens", "probability", ("mass",)),
    ("Cross-input diversity (EAD)", "EAD", ("ead",)),
    ("KL to the reference on own samples", "nats per token", ("kl",)),
    ("Length of a sample", "tokens", ("length",)),
    ("Repetition and samples cut off", "share", ("repetition", "cut_off")),
    ("Samples in the language that was asked in", "share", ("asked_language",)),
)
"""Plots: title, unit, figures. Those that were not measured are left out."""
HEATMAPS = (
    ("Entropy by language", "bits", "entropy"),
    ("Cross-input diversity by language", "EAD", "ead"),
    ("Accuracy by language", "share of pairs", "accuracy"),
    ("Margin by language", "nats per token", "margin"),
    ("Answers in the language asked", "share of samples", "asked_language"),
)
NAMES = {
    "chosen": "chosen",
    "rejected": "rejected",
    "entropy": "renormalised",
    "entropy_raw": "raw: also falls with the mass",
}
SAMPLES = 3
"""Prompts whose samples are shown, of the first, the kept and the last evaluation."""


def behaviour_blocks(
    table: Sequence[Row], judged: Verdict | None, samples: Sequence[Row] = (), *, stop: int | None = None
) -> list[Block]:
    """Return the blocks of a report, the verdict first.

    Args:
        table: lines of `metrics-behaviour.jsonl`.
        judged: the verdict on them.
        samples: lines of `metrics-samples.jsonl`.
        stop: step at which the training was stopped, marked in the plots.
    """
    blocks: list[Block] = []
    if judged is not None:
        blocks.append(
            {"kind": "verdict", "title": "Is it over-optimised?", "text": f"{_upper(judged.text)}."}
        )
        stop = judged.step if stop is None else stop
    blocks += _lines(table, stop)
    blocks += _heatmaps(table)
    blocks.append(_languages(table[-1]))
    blocks += _samples(samples, table, None if judged is None else judged.keep)
    return blocks


def _lines(table: Sequence[Row], stop: int | None) -> list[Block]:
    """Return the plots by step; the step of the stop is a vertical line."""
    rewards = sorted({name for row in table for name in row["overall"] if name.startswith("reward/")})
    plots = (*LINES, *((f"Reward: {name[len('reward/') :]}", "mean reward", (name,)) for name in rewards))
    caption = "" if stop is None else f"Over-optimised at step {stop:,}: the vertical line."
    blocks = []
    for title, unit, names in plots:
        series = [one for name in names if (one := _series(table, name)) is not None]
        if not series:
            continue
        if stop is not None:
            found = [value for one in series for value in one["y"] if value is not None]
            series.append({"name": "stop", "x": [stop, stop], "y": [min(found), max(found)]})
        block = {"kind": "lines", "title": title, "caption": caption}
        blocks.append({**block, "x_label": "step", "y_label": unit, "series": series})
    return blocks


def _series(table: Sequence[Row], name: str) -> Block | None:
    """Return the values of a figure by step; None where it was not measured."""
    values = [row["overall"].get(name) for row in table]
    if all(value is None for value in values):
        return None
    shown = NAMES.get(name, name.replace("_", " "))
    return {"name": shown, "x": [row["step"] for row in table], "y": values}


def _heatmaps(table: Sequence[Row]) -> list[Block]:
    codes = list(table[0]["languages"])
    if len(codes) < 2:
        return []
    blocks = []
    for title, unit, name in HEATMAPS:
        rows = [code for code in codes if any(name in row["languages"].get(code, {}) for row in table)]
        if rows:
            blocks.append(
                {
                    "kind": "heatmap",
                    "title": title,
                    "label": unit,
                    "rows": [_name(code) for code in rows],
                    "columns": [str(row["step"]) for row in table],
                    "values": [[row["languages"].get(code, {}).get(name) for row in table] for code in rows],
                }
            )
    return blocks


def _languages(last: Row) -> Block:
    """Return the table of the last evaluation: a row for each figure, with its worst language."""
    codes = list(last["languages"])
    rows = [
        [
            name,
            _round(value),
            "" if name not in last["worst"] else _name(last["worst"][name]),
            *(_round(last["languages"][code].get(name)) for code in codes),
        ]
        for name, value in last["overall"].items()
    ]
    return {
        "kind": "table",
        "title": f"Figures at step {last['step']:,}",
        "columns": ["figure", "all", "worst language", *map(_name, codes)],
        "rows": rows,
    }


def _samples(samples: Sequence[Row], table: Sequence[Row], keep: int | None) -> list[Block]:
    """Return the answers to the first prompts before, at the best evaluation, and last."""
    first, last = table[0]["step"], table[-1]["step"]
    steps = dict.fromkeys(step for step in (first, keep, last) if step is not None)
    prompts = list(dict.fromkeys(line["id"] for line in samples))[:SAMPLES]
    shown = [
        {
            "title": f"step {step:,}" + (", the best" if step == keep else ""),
            "language": line["language"],
            "messages": [*line["messages"], {"role": "assistant", "content": line["completion"]}],
        }
        for prompt in prompts
        for step in steps
        for line in samples
        if line["id"] == prompt and line["step"] == step
    ]
    return [{"kind": "samples", "title": "Answers to the same prompts", "samples": shown}] if shown else []


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _name(code: str) -> str:
    return LANGUAGES[code].name if code in LANGUAGES else code


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
