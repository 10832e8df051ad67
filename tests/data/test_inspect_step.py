"""Documents of a step are those of the data order; other shards raise an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from koine.data import DataOrder, Mixture, Phase, Source, tokenize
from koine.data.inspect_step import documents_at_step
from koine.errors import UserError
from koine.model import Decoder, preset
from koine.tokenizer import load_tokenizer
from koine.train import LanguageModelling, TrainSettings, train
from tests.data.conftest import document, write_records


def test_documents_at_step(tokenizer: Path, tmp_path: Path) -> None:
    records = [{"id": f"r{number}", "text": document(number), "language": "en"} for number in range(60)]
    tokenize(write_records(tmp_path / "a.jsonl", records), tokenizer, out=tmp_path / "tokens")
    source = Source(name="a", path=tmp_path / "tokens", proportion=1.0)
    mixture = Mixture(phases=(Phase(name="p", steps=3, sources=(source,)),), sequence_length=32, batch_size=2)
    order = DataOrder(mixture)
    model = Decoder(preset("koine-0.5m", vocab_size=load_tokenizer(tokenizer).vocab_size))
    settings = TrainSettings(dtype="float32", threads=1)
    train(
        model,
        LanguageModelling(),
        order,
        settings,
        out=tmp_path / "model",
        tokenizer=tokenizer,
        progress=False,
    )

    told = documents_at_step(tmp_path / "model", 2)
    expected = [(row, span) for row, spans in enumerate(order.batch(2).documents) for span in spans]
    assert [(one["row"], one["record_id"], one["start"], one["end"]) for one in told] == [
        (row, span.record_id, span.start, span.end) for row, span in expected
    ]
    by_id = {record["id"]: record["text"] for record in records}
    assert all(one["text"] in by_id[one["record_id"]] for one in told)
    with pytest.raises(UserError, match="step 3 is outside the mixture"):
        documents_at_step(tmp_path / "model", 3)
    record = tmp_path / "model" / "training.json"
    sound = json.loads(record.read_text())
    record.write_text(json.dumps({**sound, "mixture": {**sound["mixture"], "seed": 1}}))
    with pytest.raises(UserError, match="another mixture than the training's own"):
        documents_at_step(tmp_path / "model", 2)
    record.write_text(json.dumps(sound))
    shutil.rmtree(tmp_path / "tokens")
    tokenize(write_records(tmp_path / "b.jsonl", records[:-1]), tokenizer, out=tmp_path / "tokens")
    with pytest.raises(UserError, match="not the ones that the model was trained on"):
        documents_at_step(tmp_path / "model", 2)
