"""Look up the documents, or the groups, of a training step, from the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koine.data.batch import Span
from koine.data.data_order import DataOrder
from koine.data.groups import Group, GroupBatch, path_of
from koine.data.mixture import Mixture
from koine.data.preference_order import PreferenceOrder
from koine.data.shards import TokenSource
from koine.errors import UserError
from koine.fields import Fields
from koine.files import read_json, sha256_file
from koine.tokenizer import Tokenizer, load_tokenizer


def documents_at_step(model: Path, step: int) -> list[dict[str, Any]]:
    """Return the document slices in the batch of `step` (from 0), row by row, with their decoded text.

    A group of completions has its `prompt`, its `completions`, and what its record says of them, see
    `describe_group`. `model` is a model directory that was trained here. Raises `UserError` if its `training.json` or the token
    shards are missing, or the shards are not those of the training.
    """
    model = Path(model)
    record = model / "training.json"
    if not record.exists():
        raise UserError(
            "holds no training.json",
            where=model,
            hint="only a model that `koine train` or a plan built knows its data",
        )
    trained = Fields(
        read_json(record), record, hint_if_broken="it is damaged; train again, or copy the folder again"
    )
    mixture = Mixture.from_json(trained.get("mixture"), where=record)
    trained_on = trained.inner("identity").inner("sources")
    paths = {source.name: source.path for phase in mixture.phases for source in phase.all_sources}
    holds_groups = any(TokenSource(path, verify=False).kind != "documents" for path in paths.values())
    order = PreferenceOrder(mixture) if holds_groups else DataOrder(mixture)
    tokenizer = load_tokenizer(model)
    if tokenizer.fingerprint != order.tokenizer_fingerprint:
        raise UserError("the token shards were made with another tokenizer", where=model)
    for name, path in paths.items():
        if sha256_file(path / "manifest.json") != trained_on.text(name):
            raise UserError(
                "these token shards are not the ones that the model was trained on",
                where=path,
                hint="restore them, or train again",
            )
    _check_not_edited(record)
    if isinstance(order, PreferenceOrder):
        return _groups(order.batch(step), tokenizer)
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


def _groups(batch: GroupBatch, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the groups of a batch, row by row."""
    spans = [(row, span) for row, spans in enumerate(batch.documents) for span in spans]
    return [describe_group(batch, number, row, span, tokenizer) for number, (row, span) in enumerate(spans)]


def describe_group(
    batch: GroupBatch, number: int, row: int, span: Span, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return a group of a batch as JSON values.

    `prompt` is text. Each of `completions` has its `text`, its `tokens` that count, and `after`: the text
    between the prompt and it, of a revision. Preferences have `probability` and `margin`, labelled completions
    `labels`, scored ones `scores`.
    """

    def text(segment: int) -> str:
        one = batch.segments[segment]
        ids = batch.tokens[one.row, one.start : one.start + one.length].tolist()
        return tokenizer.decode(ids, skip_special=True)

    own = [index for index, one in enumerate(batch.segments) if one.group == number]
    completions = []
    for index in own:
        one = batch.segments[index]
        if one.completion < 0:
            continue
        between = path_of(batch.segments, index)[1:-1]
        completions.append(
            {
                "text": text(index),
                "tokens": int((batch.completion_of == one.completion).sum()),
                **({"after": "".join(map(text, between))} if between else {}),
            }
        )
    return {
        "row": row,
        **span._asdict(),
        "kind": batch.groups[number].kind,
        "prompt": text(own[0]),
        "completions": completions,
        **_values(batch.groups[number]),
    }


def _values(group: Group) -> dict[str, Any]:
    if group.kind == "preferences":
        return {"probability": group.probability, "margin": group.margin}
    if group.kind == "labelled":
        return {"labels": list(group.labels)}
    return {"scores": list(group.scores)}


def _check_not_edited(record: Path) -> None:
    """Raise `UserError` if `training.json` holds another mixture than the model was trained on.

    It holds the mixture twice, once without paths. If one was changed, the batch of another mixture would be
    shown.
    """
    trained = read_json(record)
    if without_paths(trained["mixture"]) != trained["identity"]["mixture"]:
        raise UserError(
            "tells of another mixture than the training's own",
            where=record,
            hint="it was edited or damaged; copy the model again",
        )


def without_paths(value: Any) -> Any:
    """Return the JSON value without any `path`: data is identified by hashes, so folders may be moved."""
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items() if key != "path"}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    return value
