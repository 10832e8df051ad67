"""The columns of the table of families: what a user can do with a checkpoint, and the check that shows it.

Add a column by adding a `Column` to `COLUMNS`, then `python -m tests.model.families.table --write`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from koine.errors import UserError

from . import checks, combining, gguf_export, methods, variants
from .cases import Case, first_case
from .reference import write_checkpoint


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A family's checkpoint for a check.

    case: the family's first one. folder: float32 weights as `transformers` wrote them. work: an empty folder.
    """

    case: Case
    folder: Path
    work: Path

    def branch(self, seed: int) -> Path:
        """Write a checkpoint of the same shape with other weights."""
        return write_checkpoint(self.case, self.work / f"branch-{seed}", seed=seed)


@dataclass(frozen=True, kw_only=True)
class Column:
    """What one column says.

    title: of the column. meaning: one sentence for the page. check: runs it; raises `UserError` where Koine
    refuses the family (the cell is "no" and the page has the reason). Any other exception is a bug, not a
    cell.
    """

    title: str
    meaning: str
    check: Callable[[Sample], None]


COLUMNS: tuple[Column, ...] = (
    Column(
        title="opens",
        meaning="Koine's own decoder opens the folder, with all its weights.",
        check=lambda sample: checks.opens(sample.folder),
    ),
    Column(
        title="logits",
        meaning="Logits and each block's output are those of `transformers` within 1e-5 in float32: whole "
        "texts, with a KV cache, padded, documents packed.",
        check=lambda sample: checks.forward(sample.folder, sample.case),
    ),
    Column(
        title="saved as own class",
        meaning="The saved folder has the same tensors and configuration; `transformers` opens it as its "
        "own class.",
        check=lambda sample: checks.saved_as_own_class(sample.folder, sample.work),
    ),
    Column(
        title="trains",
        meaning="The gradients of all parameters are those of `transformers` within 1e-4.",
        check=lambda sample: checks.gradients(sample.folder),
    ),
    Column(
        title="batched engine",
        meaning="Continuous batching gives the greedy tokens of `generate`.",
        check=lambda sample: checks.batched_engine(sample.folder, sample.case),
    ),
    Column(
        title="GGUF export",
        meaning="llama.cpp computes from the exported file the same greedy tokens in float32, in prompts "
        "longer than the window where it has windows. The checkpoint has the values of released ones where "
        "llama.cpp fixes them (experts of Qwen3-MoE normalised, OLMoE without GQA). Where llama-cpp-python is not installed, the check "
        "compares the logits of the model that `transformers` reads from the file, for the families that its "
        "reader knows, and for others only exports.",
        check=lambda sample: gguf_export.runs_elsewhere(sample.case, sample.work),
    ),
    Column(
        title="upcycle",
        meaning="BTX, BAM (both variants) and Nexus make a mixture of branches; of identical branches it is the "
        "dense model (within 1e-12 in float64).",
        check=lambda sample: combining.upcycling(sample.folder, sample.case.model_type, sample.work),
    ),
    Column(
        title="LoRA",
        meaning="`peft` opens the adapter and computes the same logits (within 1e-5).",
        check=lambda sample: combining.adapter(sample.folder, sample.work),
    ),
    Column(
        title="attention variants",
        meaning="Each variant of `--attention` on the checkpoint computes what its class does with those layers "
        "(within 1e-5); the weights stay.",
        check=lambda sample: variants.attention_variants(sample.folder, sample.work, checks.agree),
    ),
    Column(
        title="vocabulary extension",
        meaning="Moved to a longer tokenizer, the folder has the tensors and the configuration that its class "
        "gives, and moved back those that it had.",
        check=lambda sample: methods.vocabulary_extension(sample.case, sample.work),
    ),
    Column(
        title="packed training",
        meaning="The gradients of packed documents are the sum of those alone, also with gradient checkpointing.",
        check=lambda sample: methods.trains_on_packed_documents(sample.folder),
    ),
    Column(
        title="attention measured",
        meaning="`koine evaluate long` measures the attention weights that the class returns (within 2e-5).",
        check=lambda sample: methods.attention_weights(sample.folder),
    ),
    Column(
        title="estimates",
        meaning="Parameters and operations are those that torch counts in the class.",
        check=lambda sample: methods.counts(sample.folder),
    ),
)


@dataclass(frozen=True)
class Cell:
    """What a check gave: "yes", or "no" with the reason that Koine gives."""

    word: str
    reason: str = ""


def run_column(column: Column, model_type: str, work: Path) -> Cell:
    """Run a column's check for a family's first case, in an empty folder."""
    case = first_case(model_type)
    (work / "out").mkdir()
    sample = Sample(case=case, folder=write_checkpoint(case, work / "checkpoint"), work=work / "out")
    try:
        column.check(sample)
    except UserError as error:
        return Cell("no", error.what)
    return Cell("yes")
