"""Did the universal tokenizer adapt faster, and what did it cost? The figures, and the report's tables and plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koine.files import read_json, write_json
from koine.languages import language
from koine.plan import step
from koine.steps import estimates
from koine.steps.corpus_files import load_roles, read_lines, write_step_report

ARMS = ("universal", "cluster")


def curve(model: Path, metric: str) -> tuple[list[int], list[float]]:
    """Steps done and values of an evaluation metric, from a training's metrics.jsonl."""
    steps, values = [], []
    for line in read_lines(model / "metrics.jsonl"):
        if metric in line:
            # Steps are numbered from 0; an evaluation comes after the step that it is filed under.
            steps.append(int(line["step"]) + 1)
            values.append(float(line[metric]))
    return steps, values


def first_reach(steps: list[int], values: list[float], level: float) -> float | None:
    """The step, interpolated between evaluations, at which a falling curve is first at or below `level`; `None`: never."""
    for index, value in enumerate(values):
        if value <= level:
            if index == 0:
                return float(steps[0])
            before, left, right = values[index - 1], steps[index - 1], steps[index]
            crossed: float = left + (right - left) * (before - level) / (before - value)
            return crossed
    return None


def bytes_per_token(tokens: Path, codes: tuple[str, ...], shares: dict[str, float]) -> float:
    """Bytes that a token of a training mixture stands for, when languages are drawn in `shares` of tokens."""
    totals = read_json(tokens / "tokens" / "manifest.json")["languages"]
    return float(
        sum(shares[code] * totals[code]["bytes"] / totals[code]["tokens"] for code in codes if code in totals)
    )


def part_value(results: dict[str, Any], codes: tuple[str, ...]) -> float:
    """Mean over languages of bits per byte."""
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
    """Write `results.json` and the report of the comparison.

    `before`, `after` and `final` are evaluations of the pretrained, the adapted and the chat models, by arm.
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
                    "primary": part_value(by_arm[arm], roles.primary),
                    "expanded": part_value(by_arm[arm], roles.expanded),
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
        *_curves(curves, token_bytes, batch_tokens),
        *_tables(results, evaluations, roles.primary, roles.expanded),
        *_answers(final["universal"]),
    ]
    write_json(out / "report.json", {"title": "Universal against cluster tokenizer", "blocks": blocks})


def adaptation_speed(
    curves: dict[str, tuple[list[int], list[float]]], token_bytes: dict[str, float]
) -> dict[str, float | str | None]:
    """How much sooner the universal arm is where the cluster arm ends: steps(cluster's end) / steps(universal there).

    `per_byte` compares the bytes of text read in place of the steps: a better tokenizer reads more bytes a
    step.
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
        note = "the universal arm was there at its first evaluation already, so the ratio is a lower bound"
    ratio = steps[-1] / reached
    return {
        "per_step": ratio,
        "per_byte": ratio * token_bytes["cluster"] / token_bytes["universal"],
        "level": values[-1],
        "note": note,
    }


def verdict(results: dict[str, Any]) -> str:
    """The answer in words, from the figures alone."""
    speed, bits = results["adaptation_speed"], results["bits_per_byte"]
    gain = bits["adapted"]["cluster"]["expanded"] - bits["adapted"]["universal"]["expanded"]
    cost = results["cost_on_primary"]["pretrained"]
    if speed["per_step"] is None:
        answer = f"No: {speed['note']}."
    else:
        faster = "Yes" if speed["per_step"] > 1.0 and speed["per_byte"] > 1.0 else "Not by every measure"
        # Already there at the first evaluation: the true ratio is larger.
        least = "at least " if speed["note"] else ""
        answer = (
            f"{faster}: it reached the cluster arm's final bits per byte on the expanded languages "
            f"{least}{speed['per_step']:.1f} times as fast counted in steps, and {least}{speed['per_byte']:.1f} times counted in bytes "
            f"of text read" + (f" ({speed['note']})" if speed["note"] else "") + "."
        )
    return (
        f"{answer} After equal steps of adaptation it stands at {bits['adapted']['universal']['expanded']:.3f} bits per byte there, the "
        f"cluster arm at {bits['adapted']['cluster']['expanded']:.3f} ({'better' if gain > 0 else 'worse'} by {abs(gain):.3f}). "
        f"Its cost on the pretraining languages: {cost:+.3f} bits per byte after pretraining "
        f"({bits['pretrained']['universal']['primary']:.3f} against {bits['pretrained']['cluster']['primary']:.3f}). "
        f"One seed and one small model: intervals are over documents, not over runs."
    )


def _curves(
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


def _tables(
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
                "part",
                "pretrained, universal",
                "pretrained, cluster",
                "adapted, universal",
                "adapted, cluster",
                "bytes/token, universal",
                "bytes/token, cluster",
            ],
            "rows": bits,
            "caption": "Held-out documents, each scored alone from its BOS. Lower bits per byte is better, higher bytes per token is shorter.",
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
    questions = _questions(evaluations["chat"])
    return blocks + ([questions] if questions else [])


def _questions(chat: dict[str, Any]) -> dict[str, Any] | None:
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
        "title": "Questions answered exactly",
        "columns": ["code", "language", *[f"{kind}, {arm}" for arm in ARMS for kind in kinds]],
        "rows": rows,
        "caption": "Recall: the fact was in the pretraining text, its question in no chat. Generalisation: facts and territories that "
        "no text held. In brackets the 95 % bootstrap interval over questions.",
    }


def _answers(evaluation: Path) -> list[dict[str, Any]]:
    samples = read_json(evaluation / "samples.json")
    return [{"kind": "samples", "title": "What the model answers", "samples": samples}] if samples else []


@step(version="2", estimate=estimates.comparison, formerly=("koine.recipes.domains:compare_domains",))
def compare_domains(evaluations: dict[str, Path], *, out: Path) -> None:
    """The models' bits per byte side by side, domain by domain."""
    read = {name: read_json(path / "evaluation.json") for name, path in evaluations.items()}
    domains = list(next(iter(read.values()))["bits_per_byte"])
    rows = [
        [name, *(round(one["bits_per_byte"][domain], 4) for domain in domains), round(one["mean"], 4)]
        for name, one in read.items()
    ]
    write_json(out / "results.json", read)
    best = min(read, key=lambda name: float(read[name]["mean"]))
    first = next(iter(read))
    write_step_report(
        out,
        "Bits per byte and routing",
        [
            {
                "kind": "verdict",
                "title": f"Best over all domains: {best}",
                "text": f"{read[best]['mean']:.4f} bits per byte in the mean over {len(domains)} domains; {first}: {read[first]['mean']:.4f}.",
            },
            {
                "kind": "table",
                "title": "Held-out text, domain by domain",
                "columns": ["model", *domains, "mean"],
                "rows": rows,
            },
            {
                "kind": "bars",
                "categories": domains,
                "series": [
                    {"name": name, "values": [one["bits_per_byte"][domain] for domain in domains]}
                    for name, one in read.items()
                ],
                "x_label": "domain",
                "y_label": "bits per byte",
            },
            *_last_routing(read),
        ],
    )


def _last_routing(read: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the last mixture sends the tokens of each domain; nothing where all models are dense."""
    mixtures = [(name, one["routing"]) for name, one in read.items() if one["routing"]]
    if not mixtures:
        return []
    name, routing = mixtures[-1]
    experts = list(next(iter(routing.values()))["chosen"])
    return [
        {
            "kind": "heatmap",
            "title": f"Tokens by domain and expert: {name}",
            "label": "share",
            "rows": list(routing),
            "columns": experts,
            "values": [[shares["chosen"][expert] for expert in experts] for shares in routing.values()],
        }
    ]


@step(version="2", estimate=estimates.comparison, formerly=("koine.recipes.lengths:compare_lengths",))
def compare_lengths(evaluations: dict[str, Path], *, lengths: tuple[int, ...], out: Path) -> None:
    """The table of bits per byte, stage by length, and what the longest context is worth over the shortest after each stage."""
    read = {stage: read_json(folder / "evaluation.json") for stage, folder in evaluations.items()}
    values = {
        stage: {length: found["lengths"][str(length)]["bits_per_byte"] for length in lengths}
        for stage, found in read.items()
    }
    gain = {stage: row[lengths[0]] - row[lengths[-1]] for stage, row in values.items()}
    any_of = next(iter(read.values()))
    write_json(
        out / "results.json",
        {"bits_per_byte": values, "gain": gain, "documents": any_of["documents"], "evaluations": read},
    )
    last = list(values)[-1]
    write_json(out / "metrics.json", {"gain_of_the_longest": gain[last]})
    names = {stage: stage if stage == "given" else f"after {int(stage):,}" for stage in values}
    blocks: list[dict[str, Any]] = [
        {
            "kind": "text",
            "text": f"{any_of['documents']} held-out documents of {any_of['shortest']:,} to {any_of['longest']:,} tokens, each scored whole with as many "
            "tokens in view as the column says. What lies beyond a document's own length changes nothing.",
        },
        {
            "kind": "table",
            "title": "Bits per byte by length in view",
            "columns": ["model", *(f"{length:,}" for length in lengths), "gain of the longest"],
            "rows": [
                [names[stage], *(round(row[length], 4) for length in lengths), round(gain[stage], 4)]
                for stage, row in values.items()
            ],
        },
        {
            "kind": "bars",
            "title": "Bits per byte by length in view",
            "categories": [f"{length:,}" for length in lengths],
            "series": [
                {"name": names[stage], "values": [row[length] for length in lengths]}
                for stage, row in values.items()
            ],
            "x_label": "tokens in view",
            "y_label": "bits per byte",
        },
    ]
    write_step_report(out, "Context extension", blocks)
