"""One verdict a hypothesis, by the rules that EXPECTED.md set before the first run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.hypotheses import below, combine_verdicts, interval, within
from koine.files import read_json, write_json
from koine.plan import step
from koine.steps import estimates
from koine.steps.corpus_files import existing, read_lines
from koine.steps.evaluation import LANGUAGE_TRACK, tracked_languages
from koine.steps.tokenizer_comparison import first_reach

PRIMARY_MARGIN = 0.05
"""Bits per byte within which the primary languages count as equal."""
REPLACED = ("random", "mean", "subword-mean", "focus", "distill")

Values = list[float]


class Runs:
    """Bits per byte by run, seed, step and language."""

    def __init__(self, tracked: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
        """tracked: run with its seed, step, language -> bits per byte."""
        self.tracked = tracked

    @classmethod
    def read(cls, folders: Mapping[str, Path]) -> Runs:
        """Read what the trainings tracked."""
        return cls({name: tracked_languages(path / LANGUAGE_TRACK) for name, path in folders.items()})

    def final(self, run: str, seed: int, codes: Sequence[str]) -> float:
        """Return the mean over languages at the last evaluation."""
        tracked = self.tracked[f"{run}/{seed}"]
        last = tracked[max(tracked)]
        return statistics.mean(last[code] for code in codes)

    def difference(self, stage: str, codes: Sequence[str], seeds: Iterable[int]) -> Values:
        """Universal minus Cluster at the last evaluation, one value a seed."""
        return [
            self.final(f"{stage}/universal", seed, codes) - self.final(f"{stage}/cluster", seed, codes)
            for seed in seeds
        ]

    def curve(self, run: str, seed: int, codes: Sequence[str]) -> tuple[list[int], list[float]]:
        """Return the steps, and the mean over languages at each."""
        tracked = self.tracked[f"{run}/{seed}"]
        steps = sorted(tracked)
        return [max(one, 0) for one in steps], [statistics.mean(tracked[s][c] for c in codes) for s in steps]


def at_bytes(curve: tuple[list[int], list[float]], budget: float, bytes_per_step: float) -> float:
    """Interpolate the value of a curve after `budget` bytes of training."""
    steps, values = curve
    wanted = budget / bytes_per_step
    for index in range(1, len(steps)):
        if steps[index] >= wanted:
            share = (wanted - steps[index - 1]) / (steps[index] - steps[index - 1])
            return values[index - 1] + max(0.0, share) * (values[index] - values[index - 1])
    return values[-1]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Languages, vocabulary sizes and seeds of the scale that is judged."""

    primary: tuple[str, ...]
    expanded: tuple[str, ...]
    unseen: tuple[str, ...]
    unseen_with_chats: tuple[str, ...]
    chat_languages: tuple[str, ...]
    sweep: tuple[int, ...]
    seeds: int
    primary_seeds: int


@step(version="3", estimate=estimates.comparison)
def judge(
    corpus: Path,
    runs: dict[str, Path],
    tokens: dict[str, Path],
    tokenizers: dict[str, Path],
    *,
    scale: str,
    primary: tuple[str, ...],
    expanded: tuple[str, ...],
    unseen: tuple[str, ...],
    unseen_with_chats: tuple[str, ...],
    chat_languages: tuple[str, ...],
    sweep: tuple[int, ...],
    seeds: int,
    primary_seeds: int,
    out: Path,
) -> None:
    """Write results.json (every seed, one verdict a hypothesis) and the report."""
    found = Runs.read(runs)
    settings = Settings(
        primary=primary,
        expanded=expanded,
        unseen=unseen,
        unseen_with_chats=unseen_with_chats,
        chat_languages=chat_languages,
        sweep=sweep,
        seeds=seeds,
        primary_seeds=primary_seeds,
    )
    step_bytes = {kind: bytes_of_a_token(tokens[kind], expanded) for kind in ("universal", "cluster")}
    results = {
        "scale": scale,
        "seeds": list(range(seeds)),
        "primary_seeds": list(range(primary_seeds)),
        "languages": {
            "primary": primary,
            "expanded": expanded,
            "unseen": unseen,
            "unseen_with_chats": unseen_with_chats,
            "chats": chat_languages,
        },
        "bytes_per_token": {
            kind: read_json(path / "bytes_per_token.json") for kind, path in tokenizers.items()
        },
        "training_bytes_per_token": step_bytes,
        "hypotheses": verdicts(found, settings, step_bytes),
        "predictor": predictor(corpus, tokenizers["cluster"], found, seeds, primary, expanded),
        "runs": found.tracked,
    }
    write_json(out / "results.json", results)
    write_json(out / "report.json", report(results, found, range(seeds), expanded, step_bytes))


def verdicts(found: Runs, settings: Settings, step_bytes: Mapping[str, float]) -> dict[str, Any]:
    """Judge UT1 to UT9; step_bytes: bytes of expanded text per training token, by tokenizer."""
    seeds, expanded = range(settings.seeds), settings.expanded

    def against_universal(run: str) -> Values:
        """Continued training of Universal minus that of another run, on the expanded languages."""
        return [
            found.final("continued/universal", seed, expanded) - found.final(run, seed, expanded)
            for seed in seeds
        ]

    continued = found.difference("continued", expanded, seeds)
    equal_bytes = difference_at_equal_bytes(found, seeds, expanded, step_bytes)
    pretrained = found.difference("pretrained", settings.primary, range(settings.primary_seeds))
    chats = found.difference("chats", settings.chat_languages, seeds)
    five = [-value for value in against_universal("continued/universal-5")]
    vocabularies = {
        size: found.difference(f"sweep-{size}", settings.primary, seeds) for size in settings.sweep
    }
    return {
        "UT1": entry(
            combine_verdicts((below(continued), below(equal_bytes))),
            continued,
            "+18.9 points of win rate",
            at_equal_bytes=equal_bytes,
        ),
        "UT2": entry(
            within(pretrained, PRIMARY_MARGIN), pretrained, "less than 0.5 points", margin=PRIMARY_MARGIN
        ),
        "UT3": entry(below(chats), chats, "+14.6 points"),
        "UT4": unseen_entry(found, settings),
        "UT5": speed_entry([speed_of(found, seed, expanded, step_bytes) for seed in seeds]),
        "UT6": entry(
            combine_verdicts((below(five), below(continued))),
            five,
            "+19.8 (5 %) and +12.8 (0 %) points over Cluster",
            zero_minus_cluster=continued,
        ),
        "UT7": replacement_entry(
            {method: against_universal(f"continued/replaced-{method}") for method in REPLACED}
        ),
        "UT8": weights_entry(found, settings),
        "UT9": sweep_entry(vocabularies),
    }


def difference_at_equal_bytes(
    found: Runs, seeds: Iterable[int], codes: Sequence[str], step_bytes: Mapping[str, float]
) -> Values:
    """Return Universal minus Cluster after as many bytes of training as Cluster has in all."""
    values = []
    for seed in seeds:
        universal, cluster = (
            found.curve(f"continued/{arm}", seed, codes) for arm in ("universal", "cluster")
        )
        budget = cluster[0][-1] * step_bytes["cluster"]
        values.append(at_bytes(universal, budget, step_bytes["universal"]) - cluster[1][-1])
    return values


def unseen_entry(found: Runs, settings: Settings) -> dict[str, Any]:
    """Judge UT4, on chats of unseen languages; fine-tuning on text stands beside it."""
    seeds, chatting = range(settings.seeds), settings.unseen_with_chats
    text = {code: found.difference(f"unseen-{code}", (code,), seeds) for code in settings.unseen}
    on_text = [statistics.mean(text[code][seed] for code in settings.unseen) for seed in seeds]
    chats = {code: found.difference(f"unseen-chats-{code}", (code,), seeds) for code in chatting}
    on_chats = [statistics.mean(chats[code][seed] for code in chatting) for seed in seeds]
    before = {
        code: [
            before_any_step(found, f"unseen-chats-{code}/universal/{seed}", code)
            - before_any_step(found, f"unseen-chats-{code}/cluster/{seed}", code)
            for seed in seeds
        ]
        for code in chatting
    }
    return entry(
        below(on_chats),
        on_chats,
        "+2.0 points, best +5.0",
        languages=chats,
        before_fine_tuning=before,
        on_text={
            "verdict": below(on_text),
            "measured": statistics.mean(on_text),
            "interval": interval(on_text),
            "by_seed": on_text,
            "languages": text,
        },
    )


def replacement_entry(replaced: Mapping[str, Values]) -> dict[str, Any]:
    """Judge UT7, from Universal minus Cluster with a replaced vocabulary, by method of initialisation."""
    mean, pieces, random = replaced["mean"], replaced["subword-mean"], replaced["random"]
    better_mean = [max(a, b) - c for a, b, c in zip(mean, pieces, random, strict=True)]
    return entry(
        combine_verdicts((below(mean), below(pieces), below([-value for value in better_mean]))),
        pieces,
        "ahead of the mean by 7, of random by 35.2 points",
        universal_minus_replaced=replaced,
    )


def weights_entry(found: Runs, settings: Settings) -> dict[str, Any]:
    """Judge UT8: bucketed weights against uniform ones, under both readings of the bucket's mass."""
    codes = (*settings.primary, *settings.expanded)
    weights = {
        kind: [
            found.final(f"continued/{kind}", seed, codes) - found.final("continued/uniform", seed, codes)
            for seed in range(settings.seeds)
        ]
        for kind in ("universal", "data-mass")
    }
    # One reading that holds is enough: the paper does not say which it means.
    judged = [below(values) for values in weights.values()]
    if "reproduced" in judged:
        verdict = "reproduced"
    else:
        verdict = combine_verdicts(judged) if len(set(judged)) == 1 else "inconclusive"
    return entry(
        verdict,
        weights["universal"],
        "bucketed 41.9, uniform 41.0; better on 21 of 27 languages",
        by_bucket_mass=weights,
    )


def bytes_of_a_token(tokens: Path, codes: Sequence[str]) -> float:
    """Return the mean bytes per training token over languages."""
    totals: dict[str, dict[str, int]] = read_json(tokens / "tokens" / "manifest.json")["languages"]
    return statistics.mean(totals[code]["bytes"] / totals[code]["tokens"] for code in codes)


def entry(verdict: str, values: Values, paper: str, **more: Any) -> dict[str, Any]:
    """Return the entry of a hypothesis: mean difference in bits per byte, interval, every seed."""
    return {
        "verdict": verdict,
        "measured": statistics.mean(values),
        "interval": interval(values),
        "by_seed": values,
        "paper": paper,
        "why": f"mean {statistics.mean(values):+.4f} bits per byte over {len(values)} seeds",
        **more,
    }


def speed_of(found: Runs, seed: int, codes: Sequence[str], step_bytes: Mapping[str, float]) -> dict[str, Any]:
    """Return steps of Cluster over steps of Universal to reach Cluster's final level.

    It is a lower bound where Universal was there before its first step.
    """
    ours, theirs = (found.curve(f"continued/{arm}", seed, codes) for arm in ("universal", "cluster"))
    reached = first_reach(*ours, theirs[1][-1])
    if reached is None:
        return {"per_step": None, "per_byte": None, "lower_bound": False}
    ratio = theirs[0][-1] / max(reached, 1.0)
    return {
        "per_step": ratio,
        "per_byte": ratio * step_bytes["cluster"] / step_bytes["universal"],
        "lower_bound": ours[1][0] <= theirs[1][-1],
    }


def speed_entry(speed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Judge UT5, on the logarithm of the ratios."""
    if any(one["per_step"] is None for one in speed):
        return {
            "verdict": "not reproduced",
            "measured": None,
            "interval": None,
            "by_seed": speed,
            "paper": "about 8",
            "why": "Universal does not reach Cluster's final level in some seed",
        }
    logs = {key: [math.log(one[key]) for one in speed] for key in ("per_step", "per_byte")}
    means = {key: math.exp(statistics.mean(values)) for key, values in logs.items()}
    return {
        "verdict": combine_verdicts(below([-value for value in values]) for values in logs.values()),
        "measured": means["per_step"],
        "interval": [math.exp(edge) for edge in interval(logs["per_step"])],
        "per_byte": {
            "measured": means["per_byte"],
            "interval": [math.exp(edge) for edge in interval(logs["per_byte"])],
        },
        "by_seed": speed,
        "paper": "about 8",
        "why": f"{means['per_step']:.1f} times fewer steps, {means['per_byte']:.1f} times fewer bytes"
        + (" (lower bounds)" if any(one["lower_bound"] for one in speed) else ""),
    }


def sweep_entry(vocabularies: Mapping[int, Values]) -> dict[str, Any]:
    """Judge UT9: above 0 at the smallest vocabulary and below 0 at the largest."""
    sizes = sorted(vocabularies)
    small, large = vocabularies[sizes[0]], vocabularies[sizes[-1]]
    return {
        "verdict": combine_verdicts((below([-value for value in small]), below(large))),
        "measured": {str(size): statistics.mean(vocabularies[size]) for size in sizes},
        "interval": {str(size): interval(vocabularies[size]) for size in sizes},
        "by_seed": {str(size): vocabularies[size] for size in sizes},
        "paper": "Cluster ahead at 100k and 175k, Universal at 250k",
        "why": ", ".join(f"{statistics.mean(vocabularies[size]):+.4f} at {size:,}" for size in sizes),
    }


def predictor(
    corpus: Path,
    tokenizer: Path,
    found: Runs,
    seeds: int,
    primary: Sequence[str],
    expanded: Sequence[str],
) -> dict[str, Any]:
    """Return expected costs of languages, and their rank correlation with bits per byte after training."""
    from koine.tokenizer.loaders import open_tokenizer
    from koine.tokenizer.predict import predict_costs, spearman

    texts = {
        code: [record["text"] for record in read_lines(path)]
        for code, path in existing(corpus, "documents-heldout", (*primary, *expanded)).items()
    }
    expected = predict_costs(open_tokenizer(tokenizer), texts, primary=primary)
    cost = {one.language: one.cost for one in expected}
    seen = {
        code: statistics.mean(found.final("continued/cluster", seed, (code,)) for seed in range(seeds))
        for code in expanded
    }
    first = {
        code: statistics.mean(
            before_any_step(found, f"continued/cluster/{seed}", code) for seed in range(seeds)
        )
        for code in expanded
    }
    return {
        "expected": [
            {
                "language": one.language,
                "tokens_per_byte": one.tokens_per_byte,
                "script_overlap": one.script_overlap,
                "cost": one.cost,
            }
            for one in expected
        ],
        "bits_per_byte_after": seen,
        "spearman_with_bits_per_byte_after": spearman(cost, seen),
        "spearman_with_drop": spearman(cost, {code: first[code] - seen[code] for code in expanded}),
    }


def before_any_step(found: Runs, run: str, code: str) -> float:
    """Return the bits per byte of a language at the first evaluation of a run."""
    tracked = found.tracked[run]
    return float(tracked[min(tracked)][code])


def report(
    results: Mapping[str, Any],
    found: Runs,
    seeds: Iterable[int],
    expanded: Sequence[str],
    step_bytes: Mapping[str, float],
) -> dict[str, Any]:
    """Return the report: verdicts, curves by step and by byte, and bytes per token."""
    rows = [[name, one["verdict"], one["why"], one["paper"]] for name, one in results["hypotheses"].items()]
    good = [name for name, one in results["hypotheses"].items() if one["verdict"] == "reproduced"]

    def curves(scale: Callable[[str], float]) -> list[dict[str, Any]]:
        return [learning_curve(found, arm, seeds, expanded, scale(arm)) for arm in SHOWN]

    def token_bytes(arm: str) -> float:
        return step_bytes["cluster" if arm == "cluster" else "universal"]

    kinds = list(results["bytes_per_token"])
    codes = list(results["bytes_per_token"][kinds[0]])
    return {
        "title": "Universal tokenizer",
        "blocks": [
            {
                "kind": "verdict",
                "title": "Which of UT1 to UT9 hold here?",
                "text": f"Reproduced: {', '.join(good) or 'none'}.",
            },
            {"kind": "table", "columns": ["hypothesis", "verdict", "measured", "paper"], "rows": rows},
            {
                "kind": "lines",
                "title": "Expanded languages while they are learnt, per step",
                "x_label": "steps",
                "y_label": "bits per byte",
                "series": curves(lambda arm: 1.0),
            },
            {
                "kind": "lines",
                "title": "The same, per byte of expanded text",
                "x_label": "steps times bytes per token of expanded text",
                "y_label": "bits per byte",
                "series": curves(token_bytes),
            },
            {
                "kind": "heatmap",
                "title": "Bytes per token on held-out text",
                "label": "bytes per token",
                "rows": codes,
                "columns": kinds,
                "values": [[results["bytes_per_token"][kind][code] for kind in kinds] for code in codes],
            },
        ],
    }


SHOWN = ("universal", "universal-5", "cluster", "replaced-subword-mean", "replaced-random")


def learning_curve(
    found: Runs, arm: str, seeds: Iterable[int], codes: Sequence[str], scale: float
) -> dict[str, Any]:
    """A report's curve of an arm: mean and range over seeds, by steps times `scale`."""
    runs = [found.curve(f"continued/{arm}", seed, codes) for seed in seeds]
    values = list(zip(*(run[1] for run in runs), strict=True))
    return {
        "name": arm,
        "x": [steps * scale for steps in runs[0][0]],
        "y": [statistics.mean(part) for part in values],
        "lower": [min(part) for part in values],
        "upper": [max(part) for part in values],
    }
