"""A family: how its `config.json` is read and written, and what its tensors are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from koine.fields import Fields
from koine.model.config import ModelConfig

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

LLAMA_NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
"""The names of the two norms in most pre-norm classes."""


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """The names of a class for the modules of a layer, where that differs from our stored names.

    layer: by our name, the class's; `N` stands for the number of an expert.
    fused: by the class's name, our modules whose rows it holds one after another.
    top: by our name of a tensor outside the layers, the class's.
    prefix: of the layers.
    halves: RoPE rotates halves (`koine.model.formats.rotary_layout`).
    """

    layer: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    top: Mapping[str, str] = field(
        default_factory=lambda: {
            "embedding.weight": "model.embed_tokens.weight",
            "norm.weight": "model.norm.weight",
            "norm.bias": "model.norm.bias",
            "head.weight": "lm_head.weight",
        }
    )
    prefix: str = "model.layers."
    halves: bool = True

    def stored(self, module: str) -> str:
        """Return the class's name of one of our modules of a layer, such as `mlp.experts.2.up_proj`."""
        number = _NUMBER.search(module)
        general = module if number is None else _NUMBER.sub("N", module, count=1)
        name = self.layer.get(general, general)
        return name if number is None else name.replace(".N.", f".{number[0]}.", 1)

    def fused_place(self, module: str) -> tuple[str, tuple[str, ...]] | None:
        """Return the fused module that holds one of ours, and all that it holds; None for a module alone."""
        return next(((name, parts) for name, parts in self.fused.items() if module in parts), None)


OWN_NAMES = TensorNames(halves=False)
"""The names in folders whose `model_type` is `koine`."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of `transformers` that our decoder computes.

    model_type, architecture: of its `config.json`.
    read: builds the configuration of the fields. Raises `UnsupportedModelError` for what our decoder lacks.
    write: returns the fields that say what the configuration says. It may ignore what the class lacks: a
        configuration that does not come back from `read` is not saved as this class.
    names: of its tensors.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    names: TensorNames
