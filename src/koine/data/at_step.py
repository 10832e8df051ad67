"""What a training step saw, asked of the model that came out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koine.data.mixture import Mixture
from koine.data.order import DataOrder
from koine.errors import UserError
from koine.files import read_json, sha256_file
from koine.tokenizer import load_tokenizer


def documents_at_step(model: Path, step: int) -> list[dict[str, Any]]:
    """The stretches of documents in the batch of `step` (from 0), row by row, with their decoded text.

    `model` is a model directory that was trained here. Raises `UserError` where its `training.json` or the token shards that it names
    are missing, or the shards are no longer the ones that it was trained on.
    """
    model = Path(model)
    record = model / "training.json"
    if not record.exists():
        raise UserError(
            "holds no training.json",
            where=model,
            mend="only a model that `koine train` or a plan built knows its data",
        )
    trained = read_training_record(record)
    mixture = Mixture.from_json(trained["mixture"], where=record)
    order = DataOrder(mixture)
    trained_on = trained["identity"]["sources"]
    tokenizer = load_tokenizer(model)
    if tokenizer.fingerprint != order.tokenizer_fingerprint:
        raise UserError("the token shards were made with another tokenizer", where=model)
    paths = {source.name: source.path for phase in mixture.phases for source in phase.all_sources}
    for name, path in paths.items():
        if sha256_file(path / "manifest.json") != trained_on.get(name):
            raise UserError(
                "these token shards are not the ones that the model was trained on",
                where=path,
                mend="restore them, or train again",
            )
    out = []
    for row, spans in enumerate(order.batch(step).documents):
        for span in spans:
            source = order.sources[paths[span.source]]
            document = source.number(span.shard, span.document)
            ids = source.tokens(document, span.start, span.end)
            out.append(
                {"row": row, **span._asdict(), "text": tokenizer.decode(ids.tolist(), skip_special=True)}
            )
    return out


def read_training_record(path: Path) -> dict[str, Any]:
    """The content of a `training.json`. Raises `UserError` where it is damaged."""
    content = read_json(path)
    fields = content if isinstance(content, dict) else {}
    identity, best = fields.get("identity"), fields.get("best")
    whole = (
        isinstance(identity, dict)
        and isinstance(identity.get("sources"), dict)
        and isinstance(fields.get("mixture"), dict)
        and (best is None or (isinstance(best, dict) and type(best.get("step")) is int))
    )
    if not whole:
        raise UserError(
            "is not the record of a training", where=path, mend="copy the folder whole, or train again"
        )
    return fields
