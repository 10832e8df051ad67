"""The table of evaluations: what runs on which records, and the sections of a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from koine.evaluate import table
from koine.evaluate.evaluation import Evaluation, EvaluationSetup
from koine.evaluate.table import EVALUATIONS, report_sections, run_evaluations
from koine.model import Decoder
from koine.model.config import MixtureConfig
from koine.plan.report.blocks import check_block
from koine.tokenizer import Tokenizer, load_tokenizer
from tests.combine.models import small_config, write_branches
from tests.evaluate.conftest import Uniform

DOCUMENTS = [{"text": "Das Gebiet liegt nicht weit.", "language": "de", "domain": "web"}] * 2
QUESTIONS = [{"messages": [{"role": "user", "content": "Wo?"}], "answer": "Hier", "language": "de"}]


@pytest.fixture
def setup(tokenizer: Tokenizer) -> EvaluationSetup:
    return EvaluationSetup(model=Uniform(tokenizer.vocab_size), tokenizer=tokenizer)


def test_each_kind_of_records_has_its_evaluations(setup: EvaluationSetup) -> None:
    assert set(run_evaluations(setup, {"documents": DOCUMENTS})) == {"overall", "languages", "domains"}
    assert set(run_evaluations(setup, {"questions": QUESTIONS})) == {"questions"}
    assert run_evaluations(setup, {}) == {}


def test_every_evaluation_that_ran_has_a_section_with_valid_blocks(
    setup: EvaluationSetup, tmp_path: Path
) -> None:
    result = run_evaluations(setup, {"documents": DOCUMENTS, "questions": QUESTIONS})
    assert [title for title, _ in report_sections(result)] == ["Bits per byte", "Question answering"]
    write_branches(tmp_path, ())
    mixture = Decoder(replace(small_config(), mixture=MixtureConfig(experts=("a", "b")))).eval()
    of_mixture = EvaluationSetup(model=mixture, tokenizer=load_tokenizer(tmp_path / "tokenizer"))
    result |= run_evaluations(of_mixture, {"documents": DOCUMENTS})
    sections = report_sections(result)
    assert [title for title, _ in sections] == [one.title for one in EVALUATIONS.values()]
    for title, blocks in sections:
        for block in blocks:
            check_block(block, title)
        assert blocks[0]["kind"] == "table"


def test_a_new_entry_runs_and_is_reported(setup: EvaluationSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(setup: EvaluationSetup, records: Any) -> dict[str, Any]:
        return {"count": len(list(records))}

    added = Evaluation(
        title="Count",
        reads="documents",
        measure=measure,
        blocks=lambda result: [{"kind": "text", "text": str(result["count"])}],
    )
    monkeypatch.setattr(table, "EVALUATIONS", {"count": added})
    result = run_evaluations(setup, {"documents": DOCUMENTS})
    assert result == {"count": 2}
    assert report_sections(result) == [("Count", [{"kind": "text", "text": "2"}])]
