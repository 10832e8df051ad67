"""One verdict a hypothesis, by the rules that EXPECTED.md set before the first run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.common.hypotheses import (
    above,
    combine_verdicts,
    differences,
    hypothesis,
    verdict_blocks,
    within,
)
from experiments.rope_to_nope.stages import layers_of
from koine.files import read_json, write_json
from koine.generate.cache.contexts import PrefillContext
from koine.generate.cache.paged_cache import PagedCache
from koine.model import Decoder, LayerSpec, ModelConfig, preset
from koine.model.counting import all_full, cache_bytes
from koine.plan import step
from koine.steps import estimates

TIE = 0.03
"""Bits per byte within which two arms count as equal on short texts."""

THETAS = {"rnope-10k": 1e4, "rnope-100k": 1e5, "rnope-2m": 2e6, "rnope-4m": 4e6}
STEP_TOKENS = 8192
Values = list[float]


class Runs:
    """Measures by `ARM/SEED`; every method returns one value a seed."""

    def __init__(self, folders: Mapping[str, Path], seeds: int) -> None:
        self.measures: dict[str, Any] = {
            name: read_json(path / "measures.json") for name, path in folders.items()
        }
        self.seeds = range(seeds)

    def bits(self, arm: str) -> Values:
        """Bits per byte of held-out books in short stretches."""
        return [self.measures[f"{arm}/{seed}"]["bits_per_byte"] for seed in self.seeds]

    def score(self, arm: str, lengths: Sequence[int]) -> Values:
        """Log-probability of the answers in nats, the mean over lengths."""
        return [
            statistics.mean(
                self.measures[f"{arm}/{seed}"]["answers"][str(length)]["log_probability"]
                for length in lengths
            )
            for seed in self.seeds
        ]

    def attention(self, arm: str, measure: str, kind: str | None = None) -> Values:
        """Mean over layers (of a kind) of the attention mass on a segment, or of the `entropy`."""
        found = []
        for seed in self.seeds:
            layers = [
                layer
                for layer in self.measures[f"{arm}/{seed}"]["attention"]
                if kind is None or layer["kind"] == kind
            ]
            found.append(
                statistics.mean(
                    layer["entropy_of_rows"] if measure == "entropy" else layer["mass"][measure]
                    for layer in layers
                )
            )
        return found


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the line of least squares."""
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


@step(version="1", estimate=estimates.comparison)
def judge(
    runs: dict[str, Path],
    *,
    scale: str,
    arms: tuple[str, ...],
    seeds: int,
    short: int,
    long: int,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    threads: int,
    out: Path,
) -> None:
    """Write results.json (every seed, one verdict a hypothesis) and the report."""
    found = Runs(runs, seeds)
    torch.set_num_threads(threads)
    config = ModelConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        layers=layers_of("swa-3", layers, short // 2),
    )
    speed = speed_and_cache(config, seeds=max(seeds, 3))
    hypotheses = verdicts(found, long, speed, arms)
    results = {
        "experiment": "rope_to_nope",
        "scale": scale,
        "seeds": list(range(seeds)),
        "lengths": {"short": short, "long": long},
        "arms": list(arms),
        "hypotheses": hypotheses,
        "speed": speed,
        "runs": found.measures,
    }
    write_json(out / "results.json", results)
    write_json(out / "report.json", {"title": "RoPE to NoPE: verdicts", "blocks": verdict_blocks(hypotheses)})


def verdicts(found: Runs, long: int, speed: Mapping[str, Any], arms: Sequence[str]) -> dict[str, Any]:
    """Judge RN1 to RN9 and CA1; of a scale with RoPE and 3:1 alone, RN7, RN8 and CA1."""
    windowed = windowed_verdicts(found, long, speed)
    if "qk-norm" not in arms:
        return windowed
    return {
        **encoding_verdicts(found),
        **hybrid_layer_verdicts(found),
        **extrapolation_verdicts(found, long),
        **windowed,
        **ratio_verdicts(found, long),
    }


def encoding_verdicts(found: Runs) -> dict[str, Any]:
    """Judge RN1 to RN3: RoPE, QK-Norm and NoPE after the second stage."""
    rope, qk, nope = "rope", "qk-norm", "nope"
    rn1 = {
        "QK-Norm less RoPE, bits per byte": differences(found.bits(qk), found.bits(rope)),
        "NoPE less QK-Norm": differences(found.bits(nope), found.bits(qk)),
    }
    rn2 = {
        "NoPE less RoPE, needle mass": differences(
            found.attention(nope, "needle"), found.attention(rope, "needle")
        ),
        "RoPE less QK-Norm": differences(found.attention(rope, "needle"), found.attention(qk, "needle")),
    }
    rn3 = {
        "QK-Norm less RoPE, bits": differences(
            found.attention(qk, "entropy"), found.attention(rope, "entropy")
        )
    }
    first, second = rn1.values()
    return {
        "RN1": hypothesis(
            combine_verdicts([above(first, -TIE), above(second)]),
            rn1,
            "1.52 / 1.53 / 1.58",
            "RoPE at most QK-Norm (a tie counts), which is below NoPE",
        ),
        "RN2": hypothesis(
            combine_verdicts(map(above, rn2.values())),
            rn2,
            ".0325 / .0201 / .0056",
            "NoPE, then RoPE, then QK-Norm",
        ),
        "RN3": hypothesis(
            combine_verdicts(map(above, rn3.values())),
            rn3,
            "12.46 against 6.95 bits",
            "QK-Norm spreads attention",
        ),
    }


def hybrid_layer_verdicts(found: Runs) -> dict[str, Any]:
    """Judge RN4: attention of the layers with and without positions inside RNoPE."""
    rnope, full, rotary = "rnope-10k", "full NoPE", "full RoPE"
    rn4 = {
        "log ratio of needle mass, NoPE over RoPE layers": [
            math.log(a / b)
            for a, b in zip(
                found.attention(rnope, "needle", full), found.attention(rnope, "needle", rotary), strict=True
            )
        ],
        "log ratio of qc mass, RoPE over NoPE layers": [
            math.log(a / b)
            for a, b in zip(
                found.attention(rnope, "question", rotary),
                found.attention(rnope, "question", full),
                strict=True,
            )
        ],
    }
    return {
        "RN4": hypothesis(
            combine_verdicts(map(above, rn4.values())),
            rn4,
            "needle .0765 against .0004; qc .0287 against .3142",
            "full layers hold the needle, RoPE layers what is near",
        ),
    }


def extrapolation_verdicts(found: Runs, long: int) -> dict[str, Any]:
    """Judge RN5 and RN6: scores beyond the length of training."""
    beyond = (2 * long, 4 * long)
    rope, rnope = "rope", "rnope-10k"
    by_theta = {arm: found.score(arm, beyond) for arm in THETAS}
    rn5 = {
        "nats lost for each factor of ten in theta": [
            -slope([math.log10(theta) for theta in THETAS.values()], [by_theta[arm][seed] for arm in THETAS])
            for seed in found.seeds
        ]
    }
    rn6 = {
        "windowed less full RNoPE, nats": differences(
            found.score("swa-1", beyond), found.score(rnope, beyond)
        ),
        "RNoPE less RoPE": differences(found.score(rnope, beyond), found.score(rope, beyond)),
    }
    return {
        "RN5": hypothesis(
            combine_verdicts(map(above, rn5.values())),
            rn5,
            "8.036 / 7.461 / 7.022 / 6.203",
            "a larger theta is worse",
        ),
        "RN6": hypothesis(
            combine_verdicts(map(above, rn6.values())),
            rn6,
            "9.562 / 8.036 / 7.395",
            "windowed, then RNoPE, then RoPE",
        ),
    }


def ratio_verdicts(found: Runs, long: int) -> dict[str, Any]:
    """Judge RN9: the number of windowed layers for each full one."""
    beyond = (2 * long, 4 * long)
    rn9 = {
        "1:3 less 1:7, nats": differences(found.score("swa-3", beyond), found.score("swa-7", beyond)),
        "1:3 less 1:1": differences(found.score("swa-3", beyond), found.score("swa-1", beyond)),
    }
    return {
        "RN9": hypothesis(
            above(rn9["1:3 less 1:7, nats"]),
            rn9,
            "1:3 chosen, no numbers",
            "1:7 has the smaller cache, so 1:3 must answer better; 1:1 has the larger one",
        )
    }


def windowed_verdicts(found: Runs, long: int, speed: Mapping[str, Any]) -> dict[str, Any]:
    """Judge RN7, RN8 and CA1: three windowed layers for each full one, beside RoPE."""
    rope, swa = "rope", "swa-3"
    better = differences(found.score(swa, (4 * long,)), found.score(rope, (4 * long,)))
    tie = differences(found.bits(swa), found.bits(rope))
    rn7 = {"RNoPE-SWA less RoPE at four times the length, nats": better, "short texts, bits per byte": tie}
    rn8 = {"steps of RoPE over steps of RNoPE-SWA, time": speed["ratios"]}
    exact = speed["held_bytes"] == speed["formula_bytes"]
    share = speed["command_a_share_128k"]
    return {
        "RN7": hypothesis(
            combine_verdicts([above(better), within(tie, TIE)]),
            rn7,
            "RULER at 256k 74.8 against 57.1; short tasks equal",
            "long better, short equal",
        ),
        "RN8": hypothesis(
            combine_verdicts([above(speed["ratios"], 1.0), "reproduced" if exact else "not reproduced"]),
            rn8,
            "training +50 % at 64k, twice at 128k; cache down by up to 75 %",
            f"faster at {STEP_TOKENS} tokens, "
            f"and bytes of cache {'equal to' if exact else 'off'} the formula",
        ),
        "CA1": hypothesis(
            combine_verdicts(
                [
                    above(better),
                    within(tie, TIE),
                    "reproduced" if abs(share - 0.27) < 0.01 else "not reproduced",
                ]
            ),
            {"RNoPE-SWA less RoPE, nats": better, "short texts, bits per byte": tie},
            "equal short, better long, cache about 27 % at 128k",
            f"cache of Command A's layers at 128k: {share:.1%} of the all-full twin",
        ),
    }


def speed_and_cache(config: ModelConfig, *, seeds: int) -> dict[str, Any]:
    """Time a training step of the hybrid and of its all-full RoPE twin; count the bytes of the KV cache."""
    twin = replace(config, layers=(LayerSpec(),) * len(config.layers))
    ratios = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        seconds = [_step_seconds(Decoder(one).bfloat16()) for one in (config, twin)]
        ratios.append(seconds[1] / seconds[0])
    model = Decoder(config).bfloat16().eval()
    cache = PagedCache.of_model(model)
    with torch.inference_mode():
        context = PrefillContext(cache, [cache.add()], [STEP_TOKENS])
        model(torch.zeros(1, STEP_TOKENS, dtype=torch.long), context=context)
    # Command A's pattern (command-a.md): 64 layers, 3:1, window 4,096. Widths do not change the share.
    command_a = replace(preset("koine-8b"), layers=layers_of("swa-3", 64, 4096))
    return {
        "step_tokens": STEP_TOKENS,
        "ratios": ratios,
        "held_bytes": cache.bytes_held(),
        "formula_bytes": cache_bytes(config, STEP_TOKENS),
        "share_of_all_full": cache_bytes(config, STEP_TOKENS) / cache_bytes(all_full(config), STEP_TOKENS),
        "command_a_share_128k": cache_bytes(command_a, 131_072) / cache_bytes(all_full(command_a), 131_072),
    }


def _step_seconds(model: Decoder) -> float:
    """Time forward and backward over one long row, the better of two."""
    tokens = torch.randint(0, model.config.vocab_size, (1, STEP_TOKENS))
    best = math.inf
    for _ in range(2):
        start = time.perf_counter()
        model(tokens).float().square().mean().backward()
        best = min(best, time.perf_counter() - start)
        model.zero_grad()
    return best
