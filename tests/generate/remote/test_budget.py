"""Money is counted exactly, and never forgotten."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

from koine.errors import UserError
from koine.generate.remote.budget import Budget, Ledger


def a_budget(ceiling: str = "1") -> Budget:
    return Budget(prompt_price=0.15, completion_price="0.60", ceiling=ceiling)


def test_prices_are_for_a_million_tokens_and_exact() -> None:
    assert a_budget().cost(2_000_000, 1_000_000) == Decimal("0.90")
    assert a_budget().cost(1, 1) == Decimal("0.00000075")


def test_many_calls_leave_no_rounding(tmp_path: Path) -> None:
    ledger = Ledger(a_budget(), tmp_path)
    for _ in range(30):
        worst = Decimal("0.0123456789")
        assert ledger.reserve(worst)
        ledger.settle(worst, prompt_tokens=7, completion_tokens=3)
    spending = Ledger(a_budget(), tmp_path).spending()
    assert spending.spent == 30 * (7 * Decimal("0.15") + 3 * Decimal("0.6")) / 1_000_000
    assert spending.unsettled == 0


def test_the_ceiling_counts_what_is_unsettled(tmp_path: Path) -> None:
    ledger = Ledger(a_budget("1"), tmp_path)
    assert ledger.reserve(Decimal("0.6"))
    assert not ledger.reserve(Decimal("0.5"))
    # as a process that was killed leaves it
    again = Ledger(a_budget("1"), tmp_path)
    assert again.spending().unsettled == Decimal("0.6")
    assert not again.reserve(Decimal("0.5"))
    again.release(Decimal("0.6"))
    assert again.reserve(Decimal("0.5"))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"version": 2}', "null", "[" * 100_000, '{"version": ' + "1" * 5000 + "}", '{"version": true}',
     *(
         json.dumps({"version": 1, "spent": "0", "unsettled": "0", "calls": 0, "prompt_tokens": 0, "completion_tokens": 0} | wrong)
         for wrong in (
             {"calls": -1}, {"calls": True}, {"calls": 1.5}, {"calls": "1"}, {"calls": None}, {"prompt_tokens": 10**30}, {"spent": 5},
             {"spent": "1e999999"}, {"spent": "Infinity"}, {"spent": "sNaN"}, {"unsettled": [1]}, {"unsettled": "-0.1"}, {"spent": ""},
         )
     ), '{"version": 1, "spent": "x"}',
     '{"version": 1, "spent": "-1", "unsettled": "0", "calls": 0, "prompt_tokens": 0, "completion_tokens": 0}',
     '{"version": 1, "spent": "nan", "unsettled": "0", "calls": 0, "prompt_tokens": 0, "completion_tokens": 0}'],
)  # fmt: skip
def test_a_damaged_ledger_is_never_replaced_by_an_empty_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(UserError, match="the ledger is damaged"):
        Ledger(a_budget(), tmp_path)
    assert (tmp_path / "ledger.json").read_text() == text


def test_a_ledger_lowered_by_hand_never_falls_below_zero(tmp_path: Path) -> None:
    ledger = Ledger(a_budget(), tmp_path)
    assert ledger.reserve(Decimal("0.5"))
    path = tmp_path / "ledger.json"
    path.write_text(path.read_text().replace('"0.5"', '"0.1"'))
    ledger.release(Decimal("0.5"))
    assert Ledger(a_budget(), tmp_path).spending().unsettled == 0


def test_a_folder_in_place_of_the_ledger(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").mkdir()
    with pytest.raises(UserError, match="the ledger is damaged"):
        Ledger(a_budget(), tmp_path)


@pytest.mark.parametrize(
    "amount", ["much", "-1", "nan", "inf", "sNaN", "1e30", "1e-40", "True", "[1]", "1" * 5000]
)
def test_an_invalid_amount_of_money_is_refused(amount: str) -> None:
    with pytest.raises(UserError, match=re.escape(amount[:30])):
        a_budget(amount)
