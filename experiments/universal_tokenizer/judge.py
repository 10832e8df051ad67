"""From the runs to one verdict a hypothesis, as EXPECTED.md said beforehand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common.hypotheses import below, combine_verdicts, interval, within
from koine.files import read_json, write_json
from koine.plan import step
from koine.steps import estimates
from koine.steps.adaptation import TRACK
from koine.steps.comparison import first_reach
from koine.steps.corpus_files import existing, read_lines
from koine.steps.evaluation import tracked_languages

PRIMARY_MARGIN = 0.05

Values = list[float]


class Runs:
    """Bits per byte by run, seed, evaluation and language."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.tracked = {name: tracked_languages(path / TRACK) for name, path in folders.items()}

    def final(self, run: str, seed: int, codes: Sequence[str]) -> float:
        """Mean over languages at the last evaluation."""
        tracked = self.tracked[f"{run}/{seed}"]
        last = tracked[max(tracked)]
        return statistics.mean(last[code] for code in codes)

    def curve(self, run: str, seed: int, codes: Sequence[str]) -> tuple[list[int], list[float]]:
        """Steps done, and the mean over languages after them."""
        tracked = self.tracked[f"{run}/{seed}"]
        steps = sorted(tracked)
        return [max(one, 0) for one in steps], [statistics.mean(tracked[s][c] for c in codes) for s in steps]


def at_bytes(curve: tuple[list[int], list[float]], budget: float, bytes_per_step: float) -> float:
    """The value of a curve, interpolated, once `budget` bytes have been read."""
    steps, values = curve
    wanted = budget / bytes_per_step
    for index in range(1, len(steps)):
        if steps[index] >= wanted:
            share = (wanted - steps[index - 1]) / (steps[index] - steps[index - 1])
            return values[index - 1] + max(0.0, share) * (values[index] - values[index - 1])
    return values[-1]


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
    found = Runs(runs)
    every = range(seeds)

    def difference(stage: str, codes: Sequence[str], arm: str = "universal", count: int = seeds) -> Values:
        return [
            found.final(f"{stage}/{arm}", seed, codes) - found.final(f"{stage}/cluster", seed, codes)
            for seed in range(count)
        ]

    step_bytes = {kind: bytes_of_a_token(tokens[kind], expanded) for kind in ("universal", "cluster")}
    equal_bytes = []
    for seed in every:
        ours, theirs = (found.curve(f"continued/{arm}", seed, expanded) for arm in ("universal", "cluster"))
        budget = theirs[0][-1] * step_bytes["cluster"]
        equal_bytes.append(at_bytes(ours, budget, step_bytes["universal"]) - theirs[1][-1])
    ut1 = difference("continued", expanded)
    ut2 = difference("pretrained", primary, count=primary_seeds)
    ut3 = difference("chats", chat_languages)
    unseen_difference = {code: difference(f"unseen-{code}", (code,)) for code in unseen}
    unseen_text = [statistics.mean(unseen_difference[code][seed] for code in unseen) for seed in every]
    chats_difference = {code: difference(f"unseen-chats-{code}", (code,)) for code in unseen_with_chats}
    ut4 = [statistics.mean(chats_difference[code][seed] for code in unseen_with_chats) for seed in every]
    chats_before = {
        code: [
            before_any_step(found, f"unseen-chats-{code}/universal/{seed}", code)
            - before_any_step(found, f"unseen-chats-{code}/cluster/{seed}", code)
            for seed in every
        ]
        for code in unseen_with_chats
    }
    speed = [speed_of(found, seed, expanded, step_bytes) for seed in every]
    five = [
        found.final("continued/universal-5", seed, expanded)
        - found.final("continued/universal", seed, expanded)
        for seed in every
    ]
    replaced = {
        method: [
            found.final("continued/universal", seed, expanded)
            - found.final(f"continued/replaced-{method}", seed, expanded)
            for seed in every
        ]
        for method in ("random", "mean", "subword-mean", "focus", "distill")
    }
    better_mean = [
        max(replaced["mean"][seed], replaced["subword-mean"][seed]) - replaced["random"][seed]
        for seed in every
    ]
    everywhere = (*primary, *expanded)
    weights = {
        kind: [
            found.final(f"continued/{kind}", seed, everywhere)
            - found.final("continued/uniform", seed, everywhere)
            for seed in every
        ]
        for kind in ("universal", "data-mass")
    }
    vocabularies = {size: difference(f"sweep-{size}", primary) for size in sweep}
    hypotheses = {
        "UT1": entry(
            combine_verdicts((below(ut1), below(equal_bytes))),
            ut1,
            "+18.9 points of win rate",
            at_equal_bytes=equal_bytes,
        ),
        "UT2": entry(within(ut2, PRIMARY_MARGIN), ut2, "less than 0.5 points", margin=PRIMARY_MARGIN),
        "UT3": entry(below(ut3), ut3, "+14.6 points"),
        "UT4": entry(
            below(ut4),
            ut4,
            "+2.0 points, best +5.0",
            languages=chats_difference,
            before_fine_tuning=chats_before,
            on_text={
                "verdict": below(unseen_text),
                "measured": statistics.mean(unseen_text),
                "interval": interval(unseen_text),
                "by_seed": unseen_text,
                "languages": unseen_difference,
            },
        ),
        "UT5": speed_entry(speed),
        "UT6": entry(
            combine_verdicts((below(five), below(ut1))),
            five,
            "+19.8 (5 %) and +12.8 (0 %) points over Cluster",
            zero_minus_cluster=ut1,
        ),
        "UT7": entry(
            combine_verdicts(
                (below(replaced["mean"]), below(replaced["subword-mean"]), below([-v for v in better_mean]))
            ),
            replaced["subword-mean"],
            "ahead of the mean by 7, of random by 35.2 points",
            universal_minus_replaced=replaced,
        ),
        "UT8": entry(
            "reproduced"
            if "reproduced" in (verdicts := [below(values) for values in weights.values()])
            else combine_verdicts(verdicts)
            if len(set(verdicts)) == 1
            else "inconclusive",
            weights["universal"],
            "bucketed 41.9, uniform 41.0; better on 21 of 27 languages",
            by_bucket_mass=weights,
        ),
        "UT9": sweep_entry(vocabularies),
    }
    results = {
        "scale": scale,
        "seeds": list(every),
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
        "hypotheses": hypotheses,
        "predictor": predictor(corpus, tokenizers["cluster"], found, seeds, primary, expanded),
        "runs": found.tracked,
    }
    write_json(out / "results.json", results)
    write_json(out / "report.json", report(results, found, every, expanded, step_bytes))


def bytes_of_a_token(tokens: Path, codes: Sequence[str]) -> float:
    """Bytes that a training token of these languages, in equal parts, stands for."""
    totals: dict[str, dict[str, int]] = read_json(tokens / "tokens" / "manifest.json")["languages"]
    return statistics.mean(totals[code]["bytes"] / totals[code]["tokens"] for code in codes)


def entry(verdict: str, values: Values, paper: str, **more: Any) -> dict[str, Any]:
    """One hypothesis: the mean difference in bits per byte, its interval, and every seed."""
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
    """Steps of Cluster over steps of Universal to Cluster's last level; a lower bound where Universal was there before its first step."""
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
    """UT5, on the logarithm of the ratios."""
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
    """UT9: above 0 at the smallest size and below 0 at the largest."""
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
    """The ranking made before any training, and Spearman's correlation with what training then shows."""
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
    """Bits per byte of a language at the first evaluation of a run."""
    tracked = found.tracked[run]
    return float(tracked[min(tracked)][code])


def report(
    results: Mapping[str, Any],
    found: Runs,
    seeds: Iterable[int],
    expanded: Sequence[str],
    step_bytes: Mapping[str, float],
) -> dict[str, Any]:
    """The verdicts, the curves per step and per byte, and bytes per token."""
    rows = [[name, one["verdict"], one["why"], one["paper"]] for name, one in results["hypotheses"].items()]
    good = [name for name, one in results["hypotheses"].items() if one["verdict"] == "reproduced"]
    arms = ("universal", "universal-5", "cluster", "replaced-subword-mean", "replaced-random")

    def curves(scaled: Callable[[str, int], float]) -> list[dict[str, Any]]:
        series = []
        for arm in arms:
            runs = [found.curve(f"continued/{arm}", seed, expanded) for seed in seeds]
            values = list(zip(*(run[1] for run in runs), strict=True))
            series.append(
                {
                    "name": arm,
                    "x": [scaled(arm, one) for one in runs[0][0]],
                    "y": [statistics.mean(part) for part in values],
                    "lower": [min(part) for part in values],
                    "upper": [max(part) for part in values],
                }
            )
        return series

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
                "series": curves(lambda arm, steps: float(steps)),
            },
            {
                "kind": "lines",
                "title": "The same, per byte of expanded text",
                "x_label": "steps times bytes per token of expanded text",
                "y_label": "bits per byte",
                "series": curves(lambda arm, steps: steps * token_bytes(arm)),
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
