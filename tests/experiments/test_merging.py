"""Merging: verdicts on made-up measures."""

from __future__ import annotations

from experiments.merging.judge import verdicts
from tests.experiments.made_up_runs import Bits, made_up_runs


def merging_bits(*, linear: float, complex_: float, touched: float, small: float, large: float) -> Bits:
    """Two domains and two languages; own experts at 1.0, clusters apart at 2.0, merged by so much better."""
    domains = ("code", "maths")
    bits: Bits = {f"expert-{domain}": dict.fromkeys(domains, 1.0) for domain in domains}
    bits |= {arm: dict.fromkeys(domains, linear) for arm in ("linear", "linear-pair")}
    bits |= {
        arm: dict.fromkeys(domains, complex_)
        for arm in ("task-arithmetic", "ties", "dare-ties", "model-stock", "slerp-pair")
    }
    bits["touched-up"] = dict.fromkeys(domains, touched)
    for size, gain in (("small", small), ("large", large)):
        bits[f"{size}-west"] = bits[f"{size}-east"] = {"en": 2.0, "pl": 2.0, "it": 2.0}
        bits[f"{size}-clusters"] = dict.fromkeys(("en", "pl", "it"), 2.0 - gain)
        bits[f"{size}-languages"] = dict.fromkeys(("en", "pl", "it"), 2.1)
    return bits


def judged(bits: Bits) -> dict[str, str]:
    clusters = {"west": ("it",), "east": ("pl",)}
    found = verdicts(made_up_runs(bits), ("code", "maths"), clusters, ("en",), ("small", "large"))
    return {name: one["verdict"] for name, one in found.items()}


def test_verdicts() -> None:
    good = merging_bits(linear=1.01, complex_=1.02, touched=0.98, small=0.1, large=0.3)
    assert set(judged(good).values()) == {"reproduced"}
    bad = merging_bits(linear=1.5, complex_=1.2, touched=1.3, small=0.3, large=0.1)
    assert set(judged(bad).values()) == {"not reproduced"}
