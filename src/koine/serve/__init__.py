"""Public functions of `koine.serve`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koine.serve.conversation import Conversation as Conversation
    from koine.serve.engine import Completion as Completion
    from koine.serve.engine import Engine as Engine
    from koine.serve.engine import LocalEngine as LocalEngine
    from koine.serve.grammar import Grammar as Grammar
    from koine.serve.remote import RemoteEngine as RemoteEngine
    from koine.serve.sampling import Sampling as Sampling

_WHERE = {
    "Completion": "engine",
    "Conversation": "conversation",
    "Engine": "engine",
    "Grammar": "grammar",
    "LocalEngine": "engine",
    "RemoteEngine": "remote",
    "Sampling": "sampling",
}
__all__ = ["Completion", "Conversation", "Engine", "Grammar", "LocalEngine", "RemoteEngine", "Sampling"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"koine.serve.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'koine.serve' has no attribute '{name}'")
