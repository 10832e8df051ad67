"""Public functions of `koine.tokenizer`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koine.tokenizer.special import SPECIAL_TOKENS as SPECIAL_TOKENS
    from koine.tokenizer.streaming import StreamDecoder as StreamDecoder
    from koine.tokenizer.tokenizer import Tokenizer as Tokenizer
    from koine.tokenizer.tokenizer import load_tokenizer as load_tokenizer
    from koine.tokenizer.training import train_tokenizer as train_tokenizer
    from koine.tokenizer.weights import language_weights as language_weights

_WHERE = {
    "SPECIAL_TOKENS": "special",
    "StreamDecoder": "streaming",
    "Tokenizer": "tokenizer",
    "language_weights": "weights",
    "load_tokenizer": "tokenizer",
    "train_tokenizer": "training",
}
__all__ = [
    "SPECIAL_TOKENS",
    "StreamDecoder",
    "Tokenizer",
    "language_weights",
    "load_tokenizer",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"koine.tokenizer.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'koine.tokenizer' has no attribute '{name}'")
