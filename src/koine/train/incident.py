"""Stop a training whose loss or gradient went wrong, with a file that lists the documents of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from koine.errors import UserError
from koine.files import write_json
from koine.train import checkpoint as checkpoints
from koine.train.distributed import Ranks
from koine.train.export import OutputFolder

if TYPE_CHECKING:
    from koine.data.batch import StepBatches


class TrainingStopped(UserError):  # noqa: N818
    """The loss or the gradient went wrong; the weights are those of the last good checkpoint."""


def write_incident(
    problem: str,
    step: int,
    loss: float,
    gradient_norm: float,
    data: StepBatches,
    output: OutputFolder,
    ranks: Ranks,
) -> TrainingStopped:
    """Write `incident-step-N.json` with the documents of the whole batch; return the error to raise."""
    paths = checkpoints.list_checkpoints(output.checkpoints)
    last_good = str(paths[-1]) if paths else None
    documents = [
        {
            "row": row,
            "source": span.source,
            "language": span.language,
            "domain": span.domain,
            "id": span.record_id,
            "start": span.start,
            "end": span.end,
        }
        for row, spans in enumerate(data.batch(step).documents)
        for span in spans
    ]
    path = output.path / f"incident-step-{step}.json"
    if ranks.is_main:
        record = {
            "step": step,
            "trouble": problem,
            "loss": str(loss),
            "gradient_norm": str(gradient_norm),
            "last_good_checkpoint": last_good,
            "documents": documents,
        }
        write_json(path, record)
    ids = list(dict.fromkeys(str(document["id"]) for document in documents))
    shown = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
    hint = "look at these documents, then lower the learning rate or raise spike_deviations, in a new --out"
    if last_good:
        hint += f" (from the model of `koine model export {last_good} --format safetensors --out MODEL`)"
    return TrainingStopped(
        f"{problem} at step {step}, before the weights were changed; documents of the batch: {shown}; "
        f"last good checkpoint: {last_good or 'none yet'}",
        where=path,
        hint=hint,
    )
