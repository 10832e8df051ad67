"""Records, token shards, mixtures and the data order. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koine.data.batch import Batch, Span
    from koine.data.mixture import LongRows, Mixture, Phase, Source
    from koine.data.order import DataOrder
    from koine.data.records import Record, RecordReader, read_records
    from koine.data.shards import TokenSource
    from koine.data.tokenizing import tokenize

__all__ = [
    "Batch",
    "DataOrder",
    "LongRows",
    "Mixture",
    "Phase",
    "Record",
    "RecordReader",
    "Source",
    "Span",
    "TokenSource",
    "read_records",
    "tokenize",
]

_HOME = {
    "Batch": "batch",
    "Span": "batch",
    "LongRows": "mixture",
    "Mixture": "mixture",
    "Phase": "mixture",
    "Source": "mixture",
    "DataOrder": "order",
    "Record": "records",
    "RecordReader": "records",
    "read_records": "records",
    "TokenSource": "shards",
    "tokenize": "tokenizing",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"koine.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'koine.data' has no attribute '{name}'")
