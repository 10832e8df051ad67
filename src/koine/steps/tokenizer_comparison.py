"""Compare a universal with a cluster tokenizer: adaptation speed, cost on the primary languages, forgetting."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from koine.files import read_json, write_json
from koine.plan import step
from koine.steps import estimates
from koine.steps.corpus_files import Roles, load_roles, write_step_report
from koine.steps.evaluation import LANGUAGE_TRACK, tracked_languages
from koine.steps.tokenizer_comparison_report import comparison_blocks

ARMS = ("universal", "cluster")
STAGES = ("pretrained", "adapted", "chat")

Curve = tuple[list[int], list[float]]
"""Steps done and bits per byte."""


def curve(model: Path, codes: tuple[str, ...]) -> Curve:
    """Return steps done and mean bits per byte over languages, from a training that tracked its languages.

    The first point, at step 0, is the model before the training.
    """
    tracked = tracked_languages(model / LANGUAGE_TRACK)
    steps = sorted(tracked)
    values = [fmean(tracked[step][code] for code in codes if code in tracked[step]) for step in steps]
    return [max(step, 0) for step in steps], values


def with_ends(points: Curve, first: float, last: float) -> Curve:
    """Return a curve with the ends that the evaluations measured.

    They are of the same documents, in float32; a training measures in its own precision, such as bfloat16.
    """
    steps, values = points
    return steps, [first, *values[1:-1], last]


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
    return fmean(
        results["languages"][code]["bits_per_byte"] for code in codes if code in results["languages"]
    )


def trained_on(model: Path) -> dict[str, Any]:
    """Return steps and tokens of a training, and the shares of its sources, from its `training.json`."""
    mixture = read_json(model / "training.json")["mixture"]
    steps = sum(phase["steps"] for phase in mixture["phases"])
    shares: dict[str, float] = {}
    for phase in mixture["phases"]:
        total = sum(source["proportion"] for source in phase["sources"])
        for source in phase["sources"]:
            share = source["proportion"] / total * phase["steps"] / steps
            shares[source["name"]] = shares.get(source["name"], 0.0) + share
    return {
        "steps": steps,
        "tokens": steps * mixture["batch_size"] * mixture["sequence_length"],
        "sources": shares,
    }


def model_facts(models: dict[str, dict[str, Path]], tokens: dict[str, Path]) -> dict[str, Any]:
    """Return sizes, training and text of each arm; models: by stage, then by arm."""
    from koine.model import read_config
    from koine.model.counting import count_parameters

    facts = {}
    for arm in ARMS:
        config = read_config(models["chat"][arm])
        manifest = read_json(tokens[arm] / "tokens" / "manifest.json")
        facts[arm] = {
            "parameters": count_parameters(config).total,
            "layers": len(config.layers),
            "hidden_size": config.hidden_size,
            "vocabulary": config.vocab_size,
            "training": {stage: trained_on(models[stage][arm]) for stage in STAGES},
            "text": {name: manifest[name] for name in ("documents", "bytes", "tokens")},
        }
    return facts


@step(version="3", estimate=estimates.comparison, formerly=("koine.recipes.compare:compare_arms",))
def compare_arms(
    corpus: Path,
    tokenizers: dict[str, Path],
    tokens: dict[str, Path],
    models: dict[str, dict[str, Path]],
    evaluations: dict[str, dict[str, Path]],
    *,
    primary_share: float,
    seed: int,
    out: Path,
) -> None:
    """Compare the two arms; write `results.json` and the report.

    models, evaluations: by stage (`STAGES`), then by arm. The adapted models have tracked their languages.
    """
    roles = load_roles(corpus)
    measured = {
        stage: {arm: read_json(evaluations[stage][arm] / "evaluation.json") for arm in ARMS}
        for stage in STAGES
    }
    shares = dict.fromkeys(roles.expanded, (1.0 - primary_share) / len(roles.expanded))
    shares |= dict.fromkeys(roles.primary, primary_share / len(roles.primary))
    token_bytes = {arm: bytes_per_token(tokens[arm], roles.all, shares) for arm in ARMS}
    groups = bits_by_group(measured, roles)
    curves = {
        arm: with_ends(
            curve(models["adapted"][arm], roles.expanded),
            *(groups["bits_per_byte"][stage][arm]["expanded"] for stage in ("pretrained", "adapted")),
        )
        for arm in ARMS
    }
    facts = model_facts(models, tokens)
    batch_tokens = facts["universal"]["training"]["adapted"]["tokens"] / curves["universal"][0][-1]
    results: dict[str, Any] = {
        "question": "did the universal tokenizer adapt faster, and what did it cost?",
        "languages": {"primary": roles.primary, "expanded": roles.expanded, "chat": roles.chat},
        "seeds": [seed],
        "models": facts,
        "adaptation_speed": adaptation_speed(curves, token_bytes),
        "curves": {
            arm: {
                "steps": steps,
                "megabytes": [steps_done * batch_tokens * token_bytes[arm] / 1e6 for steps_done in steps],
                "bits_per_byte": values,
            }
            for arm, (steps, values) in curves.items()
        },
        "bytes_per_token": {arm: read_json(tokenizers[arm] / "bytes_per_token.json") for arm in ARMS},
        **groups,
        "questions": {
            arm: measured["chat"][arm]["questions"]["overall"]
            for arm in ARMS
            if "questions" in measured["chat"][arm]
        },
        "evaluations": measured,
    }
    write_json(out / "results.json", results)
    flat = {
        "adaptation_speed_per_step": results["adaptation_speed"]["per_step"],
        "adaptation_speed_per_byte": results["adaptation_speed"]["per_byte"],
        "cost_on_primary_after_pretraining": results["cost_on_primary"]["pretrained"],
    }
    write_json(out / "metrics.json", {name: value for name, value in flat.items() if value is not None})
    samples = read_json(evaluations["chat"]["universal"] / "samples.json")
    write_step_report(out, "Universal against cluster tokenizer", comparison_blocks(results, samples))


def bits_by_group(measured: dict[str, Any], roles: Roles) -> dict[str, Any]:
    """Return mean bits per byte by stage, arm and role; the cost on primary; what the chat stage forgot."""
    groups = {"primary": roles.primary, "expanded": roles.expanded}
    bits = {
        stage: {arm: {name: mean_bits(by_arm[arm], codes) for name, codes in groups.items()} for arm in ARMS}
        for stage, by_arm in measured.items()
    }
    return {
        "bits_per_byte": bits,
        "cost_on_primary": {
            stage: values["universal"]["primary"] - values["cluster"]["primary"]
            for stage, values in bits.items()
        },
        "forgetting_by_chat": {
            arm: {
                name: {
                    "before": bits["adapted"][arm][name],
                    "after": bits["chat"][arm][name],
                    "change": bits["chat"][arm][name] - bits["adapted"][arm][name],
                }
                for name in groups
            }
            for arm in ARMS
        },
    }


def adaptation_speed(curves: dict[str, Curve], token_bytes: dict[str, float]) -> dict[str, Any]:
    """Return how much faster the universal arm reaches the cluster arm's final bits per byte.

    Returns:
        `per_step`: the cluster arm's steps over the universal arm's steps to that level. `per_byte` compares
        bytes of text instead: a better tokenizer reads more bytes a step. Both are `None` where the universal
        arm never gets there, or was there before adaptation. `reached`: its steps to the level, `None` for
        never. `at_least`: whether the ratios are lower bounds. `note`: the reason in words.
    """
    steps, values = curves["cluster"]
    level = values[-1]
    universal_steps, universal_values = curves["universal"]
    reached = first_reach(universal_steps, universal_values, level)
    found = {"per_step": None, "per_byte": None, "level": level, "reached": reached, "at_least": False}
    if reached is None:
        gap = universal_values[-1] - level
        return {**found, "note": f"the universal arm ends {gap:.3f} bits per byte above the cluster arm"}
    if reached == 0.0:
        return {**found, "note": "the universal arm was there before adaptation began"}
    # The first evaluation in training bounds the step from above; a line from step 0 would guess it.
    first = universal_steps[1] if universal_steps[0] == 0 else universal_steps[0]
    at_least = reached <= first
    ratio = steps[-1] / max(reached, first)
    return {
        "per_step": ratio,
        "per_byte": ratio * token_bytes["cluster"] / token_bytes["universal"],
        "level": level,
        "reached": max(reached, float(first)),
        "at_least": at_least,
        "note": f"it was there at the first evaluation, after {first} steps" if at_least else "",
    }
