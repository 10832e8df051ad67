"""Made-up evaluations of arms on domains."""

from __future__ import annotations

from experiments.common.domains import DomainRuns

Bits = dict[str, dict[str, float]]


def made_up_runs(bits: Bits) -> DomainRuns:
    """Three seeds of each arm, a little apart; half of the code goes to the code expert."""
    evaluations = {
        f"{arm}/{seed}": {
            "bits_per_byte": {
                text: value * (1 + 0.01 * seed) + 1e-4 * ((seed * 2 + number) % 3)
                for text, value in by_text.items()
            },
            "routing": {"code": {"chosen": {"code": 0.5}}},
        }
        for number, (arm, by_text) in enumerate(bits.items())
        for seed in range(3)
    }
    return DomainRuns(evaluations, range(3))
