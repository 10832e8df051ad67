"""The steps of preference training."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from koine.files import write_json
from koine.plan import step
from koine.steps import checks, estimates
from koine.steps.corpus_files import write_step_report


@step(version="1", estimate=estimates.inspected_groups, check=checks.inspected_groups, threads=0)
def inspect_preferences(
    pairs: Path,
    model: Path,
    held_out: Path | None = None,
    *,
    sequence_length: int = 1024,
    limit: int | None = None,
    identify_languages: bool = True,
    out: Path,
) -> None:
    """Inspect groups before a model is trained on them; write `inspection.json` and a report.

    See `koine.align.inspect_pairs.inspect_groups`. The model reads in float32.

    pairs: token shards of groups. held_out: those of another split. limit: most pairs that the model reads.
    """
    import torch

    from koine.align.inspect_pairs import check_tokenizer, inspect_groups, opened_groups
    from koine.align.inspect_report import report_blocks
    from koine.model.causal_lm import load_as_stored
    from koine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    loaded: Any = load_as_stored(model)
    with ExitStack() as stack:
        source = stack.enter_context(opened_groups(pairs, model))
        other = None if held_out is None else stack.enter_context(opened_groups(held_out, model))
        for one in (source, other):
            if one is not None:
                check_tokenizer(one, tokenizer, model)
        inspection = inspect_groups(
            source,
            tokenizer,
            model=loaded.to(torch.float32).eval(),
            held_out=other,
            sequence_length=sequence_length,
            limit=limit,
            identify_languages=identify_languages,
        )
    write_json(out / "inspection.json", inspection.to_json())
    write_step_report(out, "Preference data before training", list(report_blocks(inspection)))
