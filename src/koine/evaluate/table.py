"""The table of evaluations: `koine evaluate` and the steps run those that the given records allow.

To add one, write a module with a `measure` and a `blocks` function, and add an entry here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from koine.evaluate.bits import bits_blocks, measure_bits
from koine.evaluate.evaluation import Block, Evaluation, EvaluationSetup
from koine.evaluate.expert_routing import has_experts, measure_routing, routing_blocks
from koine.evaluate.question_answering import measure_questions, question_blocks

EVALUATIONS: dict[str, Evaluation] = {
    "bits per byte": Evaluation(
        title="Bits per byte", reads="documents", measure=measure_bits, blocks=bits_blocks
    ),
    "expert routing": Evaluation(
        title="Expert routing",
        reads="documents",
        measure=measure_routing,
        blocks=routing_blocks,
        applies=has_experts,
    ),
    "question answering": Evaluation(
        title="Question answering", reads="questions", measure=measure_questions, blocks=question_blocks
    ),
}


def run_evaluations(
    setup: EvaluationSetup, records: Mapping[str, Iterable[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Run every evaluation of the table that has records and applies to the model.

    records: by `Evaluation.reads`; each is iterated over once an evaluation.
    Returns the entries of all evaluations together.
    """
    result: dict[str, Any] = {}
    for evaluation in EVALUATIONS.values():
        if evaluation.reads in records and evaluation.applies(setup.model):
            result |= evaluation.measure(setup, records[evaluation.reads])
    return result


def report_sections(result: Mapping[str, Any]) -> list[tuple[str, list[Block]]]:
    """Return the titled sections of a report on the results, one for each evaluation that ran."""
    found = [(evaluation.title, evaluation.blocks(result)) for evaluation in EVALUATIONS.values()]
    return [(title, blocks) for title, blocks in found if blocks]
