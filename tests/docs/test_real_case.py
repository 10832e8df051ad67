"""The table of the manual's real case is that of the committed result, and the commands are those of the manual."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "tokenizer_real_case.json"
PAGE = ROOT / "docs" / "how-to" / "tokenizer.md"

sys.path.append(str(ROOT / "benchmarks"))
from tokenizer_real_case import ARMS, CLUSTER, CODES, GROUPS, table  # noqa: E402

from koine.languages import CLUSTERS  # noqa: E402


@pytest.mark.skipif(not RESULT.exists(), reason="not measured yet: python benchmarks/tokenizer_real_case.py")
def test_the_manual_has_the_table_of_the_committed_result() -> None:
    assert table(json.loads(RESULT.read_text(encoding="utf-8"))) in PAGE.read_text(encoding="utf-8")


def test_the_commands_are_the_manual_s() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert f"CODES={CODES}\n" in page
    for arm, (_, languages, options) in ARMS.items():
        shown = "$CODES" if languages == CODES else CLUSTER
        words = [
            "koine tokenizer train --data TEXT --languages",
            shown,
            "--vocab-size 16384 --sample-bytes 20000000",
        ]
        assert " ".join([*words, *options, "--out", arm]) in page
    assert f"koine tokenizer measure {' '.join(ARMS)} --data flores.jsonl.xz --languages $CODES" in page
    assert set(GROUPS) == {f"cluster:{cluster}" for cluster in CLUSTERS}


def test_a_row_by_hand() -> None:
    row = {"bytes_per_token": 3.666, "parity": 1.479, "gini": 0.0742, "partial_character_share": 0.0391}
    groups = dict(zip(GROUPS, (3.171, 3.638, 4.584), strict=True))
    result = {"overall": dict.fromkeys(ARMS, row), "bytes_per_token_by_cluster": dict.fromkeys(ARMS, groups)}
    assert "| uniform | 3.67 | 1.48 | 0.074 | 3.9 % | 3.17 | 3.64 | 4.58 |\n" in table(result)
