"""Odd values in every configuration: finite results, or one error line."""

from __future__ import annotations

from tests.faults.fuzz_configurations import KINDS, SLOW, chosen, run, summary


def test_no_odd_value_ends_in_a_traceback_or_in_silence() -> None:
    """A few hundred cases of every kind, the same in every run.

    `python -m tests.faults.fuzz_configurations` runs more.
    """
    selection = chosen(250, seed=7, slow=False)
    assert {case.kind for case in selection} == {kind for kind in KINDS if SLOW not in kind}
    counts, wrong = run(selection)
    said = "\n".join(f"{verdict.what}: {verdict.case}: {verdict.why}" for verdict in wrong)
    assert not wrong, f"{summary(counts)}\n{said}"
    assert counts["whole"] > 50
    assert counts["line"] > 50
