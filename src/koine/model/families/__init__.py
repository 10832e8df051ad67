"""The decoders of today, dense and with experts, one small module each: fields of `config.json` and names of tensors, both ways.

A module of this package that defines `FAMILY` is a family; nothing else names it. `Decoder` computes all of
them: a family says which `ModelConfig` a `config.json` is, and what its tensors are called.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from koine.model.families.family import Family


@functools.cache
def families() -> dict[str, Family]:
    """Return the families by `model_type`, sorted."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if family is not None:
            found[family.model_type] = family
    return dict(sorted(found.items()))
