"""Compare a universal with a cluster tokenizer: adaptation speed, cost on the primary languages, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koine.files import read_json, write_json
from koine.languages import language
from koine.plan import step
from koine.steps import estimates
from koine.steps.corpus_files import load_roles, read_lines

ARMS = ("universal", "cluster")


def curve(model: Path, metric: str) -> tuple[list[int], list[float]]:
    """Return steps done and values of an evaluation metric, from a training's metrics.jsonl."""
    steps, values = [], []
    for line in read_lines(model / "metrics.jsonl"):
        if metric in line:
            # Steps are numbered from 0; an evaluation has the number of the step before it.
            steps.append(int(line["step"]) + 1)
            values.append(float(line[metric]))
    return steps, values


def first_reach(steps: list[int], values: list[float], level: float) -> float | None:
    """Return the step at which a falling curve first reaches `level`, interpolated; `None`: never."""
    for index, value in enumerate(values):
        if value <= level:
            if index == 0:
                return float(steps[0])
            before, left, right = values[index - 1], steps[index - 1], steps[index]
            crossed: float = left + (right - left) * (before - level) / (before - value)
            return crossed
    return None


def bytes_per_token(tokens: Path, codes: tuple[str, ...], shares: dict[str, float]) -> float:
    """Return the bytes per token of a mixture with languages in `shares` of tokens."""
    totals = read_json(tokens / "tokens" / "manifest.json")["languages"]
    return float(
        sum(shares[code] * totals[code]["bytes"] / totals[code]["tokens"] for code in codes if code in totals)
    )


def mean_bits(results: dict[str, Any], codes: tuple[str, ...]) -> float:
    """Return the mean of bits per byte over languages."""
    values: list[float] = [
        results["languages"][code]["bits_per_byte"] for code in codes if code in results["languages"]
    ]
    return sum(values) / len(values)


@step(version="2", estimate=estimates.comparison, formerly=("koine.recipes.compare:compare_arms",))
def compare_arms(
    corpus: Path,
    tokenizers: dict[str, Path],
    tokens: dict[str, Path],
    adapted: dict[str, Path],
    before: dict[str, Path],
    after: dict[str, Path],
    final: dict[str, Path],
    *,
    primary_share: float,
    batch_tokens: int,
    seed: int,
    out: Path,
) -> None:
    """Compare the two arms; write `results.json` and the report.

    before, after, final: evaluations of the pretrained, the adapted and the chat models, by arm.
    """
    roles = load_roles(corpus)
    evaluations = {
        stage: {arm: read_json(folders[arm] / "evaluation.json") for arm in ARMS}
        for stage, folders in (("pretrained", before), ("adapted", after), ("chat", final))
    }
    shares = dict.fromkeys(roles.expanded, (1.0 - primary_share) / len(roles.expanded))
    shares |= dict.fromkeys(roles.primary, primary_share / len(roles.primary))
    token_bytes = {arm: bytes_per_token(tokens[arm], roles.all, shares) for arm in ARMS}
    curves = {arm: curve(adapted[arm], "evaluation/bits_per_byte_adapted") for arm in ARMS}
    speed = adaptation_speed(curves, token_bytes)
    results: dict[str, Any] = {
        "question": "did the universal tokenizer adapt faster, and what did it cost?",
        "languages": {"primary": roles.primary, "expanded": roles.expanded, "chat": roles.chat},
        "seeds": [seed],
        "adaptation_speed": speed,
        "bytes_per_token": {arm: read_json(tokenizers[arm] / "bytes_per_token.json") for arm in ARMS},
        "bits_per_byte": {
            stage: {
                arm: {
                    "primary": mean_bits(by_arm[arm], roles.primary),
                    "expanded": mean_bits(by_arm[arm], roles.expanded),
                }
                for arm in ARMS
            }
            for stage, by_arm in evaluations.items()
        },
        "evaluations": evaluations,
    }
    results["cost_on_primary"] = {
        stage: values["universal"]["primary"] - values["cluster"]["primary"]
        for stage, values in results["bits_per_byte"].items()
    }
    write_json(out / "results.json", results)
    flat = {
        "adaptation_speed_per_step": speed["per_step"],
        "adaptation_speed_per_byte": speed["per_byte"],
        "cost_on_primary_after_pretraining": results["cost_on_primary"]["pretrained"],
    }
    write_json(out / "metrics.json", {name: value for name, value in flat.items() if value is not None})
    blocks = [
        {"kind": "verdict", "title": results["question"], "text": verdict(results)},
        *_curve_blocks(curves, token_bytes, batch_tokens),
        *_table_blocks(results, evaluations, roles.primary, roles.expanded),
        *_answer_blocks(final["universal"]),
    ]
    write_json(out / "report.json", {"title": "Universal against cluster tokenizer", "blocks": blocks})


def adaptation_speed(
    curves: dict[str, tuple[list[int], list[float]]], token_bytes: dict[str, float]
) -> dict[str, float | str | None]:
    """Return how much faster the universal arm reaches the cluster arm's final bits per byte.

    `per_step`: the cluster arm's steps over the universal arm's steps to that value. `per_byte` compares
    bytes of text
    instead: a better tokenizer reads more bytes a step.
    """
    steps, values = curves["cluster"]
    reached = first_reach(*curves["universal"], values[-1])
    if reached is None:
        gap = curves["universal"][1][-1] - values[-1]
        return {
            "per_step": None,
            "per_byte": None,
            "note": f"the universal arm ends {gap:.3f} bits per byte above the cluster arm",
        }
    note = ""
    if curves["universal"][1][0] <= values[-1]:
        note = "the universal arm had reached it at its first evaluation, so the ratio is a lower bound"
    ratio = steps[-1] / reached
    return {
        "per_step": ratio,
        "per_byte": ratio * token_bytes["cluster"] / token_bytes["universal"],
        "level": values[-1],
        "note": note,
    }


def verdict(results: dict[str, Any]) -> str:
    """Return the answer in words."""
    speed, bits = results["adaptation_speed"], results["bits_per_byte"]
    gain = bits["adapted"]["cluster"]["expanded"] - bits["adapted"]["universal"]["expanded"]
    cost = results["cost_on_primary"]["pretrained"]
    if speed["per_step"] is None:
        answer = f"No: {speed['note']}."
    else:
        faster = "Yes" if speed["per_step"] > 1.0 and speed["per_byte"] > 1.0 else "Not by every measure"
        # Reached at the first evaluation: the true ratio is larger.
        least = "at least " if speed["note"] else ""
        answer = (
            f"{faster}: it reached the cluster arm's final bits per byte on the expanded languages "
            f"{least}{speed['per_step']:.1f} times as fast counted in steps, and "
            f"{least}{speed['per_byte']:.1f} times counted in bytes of text read"
            + (f" ({speed['note']})" if speed["note"] else "")
            + "."
        )
    return (
        f"{answer} After equal steps of adaptation it has "
        f"{bits['adapted']['universal']['expanded']:.3f} bits per byte there, "
        f"the cluster arm {bits['adapted']['cluster']['expanded']:.3f} "
        f"({'better' if gain > 0 else 'worse'} by {abs(gain):.3f}). "
        f"Its cost on the pretraining languages: {cost:+.3f} bits per byte after pretraining "
        f"({bits['pretrained']['universal']['primary']:.3f} against "
        f"{bits['pretrained']['cluster']['primary']:.3f}). "
        f"One seed and one small model: intervals are over documents, not over runs."
    )


def _curve_blocks(
    curves: dict[str, tuple[list[int], list[float]]], token_bytes: dict[str, float], batch_tokens: int
) -> list[dict[str, Any]]:
    by_step = [{"name": arm, "x": curves[arm][0], "y": curves[arm][1]} for arm in ARMS]
    by_byte = [
        {
            "name": arm,
            "x": [steps * batch_tokens * token_bytes[arm] / 1e6 for steps in curves[arm][0]],
            "y": curves[arm][1],
        }
        for arm in ARMS
    ]
    label = "bits per byte, expanded languages"
    return [
        {
            "kind": "lines",
            "title": "Adaptation, by step",
            "series": by_step,
            "x_label": "step of adaptation",
            "y_label": label,
        },
        {
            "kind": "lines",
            "title": "Adaptation, by text read",
            "series": by_byte,
            "x_label": "text read, MB",
            "y_label": label,
        },
    ]


def _table_blocks(
    results: dict[str, Any],
    evaluations: dict[str, Any],
    primary: tuple[str, ...],
    expanded: tuple[str, ...],
) -> list[dict[str, Any]]:
    bits = []
    for code in (*primary, *expanded):
        row: list[Any] = [code, language(code).name, "primary" if code in primary else "expanded"]
        for stage in ("pretrained", "adapted"):
            for arm in ARMS:
                found = evaluations[stage][arm]["languages"].get(code)
                row.append(None if found is None else round(found["bits_per_byte"], 3))
        for arm in ARMS:
            row.append(results["bytes_per_token"][arm].get(code))
        bits.append(row)
    blocks: list[dict[str, Any]] = [
        {
            "kind": "table",
            "title": "Bits per byte by language",
            "columns": [
                "code",
                "language",
                "role",
                "pretrained, universal",
                "pretrained, cluster",
                "adapted, universal",
                "adapted, cluster",
                "bytes/token, universal",
                "bytes/token, cluster",
            ],
            "rows": bits,
            "caption": "Held-out documents, each scored from its BOS token. Fewer bits per byte are better. "
            "More bytes per token mean shorter sequences.",
        },
        {
            "kind": "bars",
            "title": "After adaptation",
            "categories": [*primary, *expanded],
            "series": [
                {
                    "name": arm,
                    "values": [
                        evaluations["adapted"][arm]["languages"].get(code, {}).get("bits_per_byte")
                        for code in (*primary, *expanded)
                    ],
                    "intervals": [
                        evaluations["adapted"][arm]["languages"].get(code, {}).get("interval")
                        for code in (*primary, *expanded)
                    ],
                }
                for arm in ARMS
            ],
            "x_label": "language",
            "y_label": "bits per byte",
        },
    ]
    questions = _question_table(evaluations["chat"])
    return blocks + ([questions] if questions else [])


def _question_table(chat: dict[str, Any]) -> dict[str, Any] | None:
    if not all("questions" in chat[arm] for arm in ARMS):
        return None
    codes = list(chat["universal"]["questions"]["languages"])
    kinds = list(chat["universal"]["questions"]["overall"])

    def cell(results: dict[str, Any], kind: str) -> str | None:
        found = results.get(kind)
        if not isinstance(found, dict) or found.get("value") is None:
            return None
        interval = found.get("interval")
        text = f"{found['value']:.0%}"
        return text if interval is None else f"{text} ({interval[0]:.0%}–{interval[1]:.0%})"

    rows = []
    for code in ["all", *codes]:
        row: list[Any] = [code, "all languages" if code == "all" else language(code).name]
        for arm in ARMS:
            questions = chat[arm]["questions"]
            part = questions["overall"] if code == "all" else questions["languages"].get(code, {})
            row += [cell(part, kind) for kind in kinds]
        rows.append(row)
    return {
        "kind": "table",
        "title": "Questions: exact answers",
        "columns": ["code", "language", *[f"{kind}, {arm}" for arm in ARMS for kind in kinds]],
        "rows": rows,
        "caption": "Recall: the fact was in the pretraining text, its question in no chat. "
        "Generalisation: facts and territories that were in no text. "
        "In brackets the 95 % bootstrap interval over questions.",
    }


def _answer_blocks(evaluation: Path) -> list[dict[str, Any]]:
    samples = read_json(evaluation / "samples.json")
    return [{"kind": "samples", "title": "Sample answers", "samples": samples}] if samples else []
