"""Typed access to a GGUF file's metadata; what nobody asked for is found at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from koine.errors import UserError
from koine.fields import short_repr

LARGEST = 2**31 - 1
"""Largest value of a size."""


class Metadata:
    """The metadata of a file, by key, for one architecture."""

    def __init__(self, values: Mapping[str, Any], where: Path) -> None:
        self.values, self.where = values, where
        self._read: set[str] = set()

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return the value of a key, or `default` without one. Raises `UserError` for one of another type."""
        self._read.add(key)
        value = self.values.get(key, default)
        if value is default:
            return default
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in wanted):
            names = " or ".join(one.__name__ for one in wanted)
            raise UserError(
                f"the metadata '{key}' is {short_repr(value)}, no {names}",
                where=self.where,
                hint="the file is damaged, or its converter is of another kind",
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"the metadata '{key}' is {value}", where=self.where, hint="the file is damaged")
        return value

    def text(self, key: str, default: str | None = None) -> Any:
        """Return a text."""
        return self.get(key, str, default)

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a number."""
        return self.get(key, (int, float), default)

    def size(self, key: str, default: int | None = None) -> Any:
        """Return a size from 0 to `LARGEST`."""
        value = self.get(key, int, default)
        if value is not None and not 0 <= value <= LARGEST:
            raise UserError(
                f"the metadata '{key}' is {value:,}", where=self.where, hint="the file is damaged"
            )
        return value

    def texts(self, key: str) -> list[str] | None:
        """Return a list of texts."""
        value = self.get(key, (list, np.ndarray))
        if value is not None and not isinstance(value, list):
            if len(value) == 0:
                return []
            raise UserError(
                f"the metadata '{key}' is a list of numbers", where=self.where, hint="the file is damaged"
            )
        return value

    def numbers(self, key: str) -> Any:
        """Return a numpy array of numbers."""
        value = self.get(key, (list, np.ndarray))
        if isinstance(value, list):
            raise UserError(
                f"the metadata '{key}' is a list of texts", where=self.where, hint="the file is damaged"
            )
        return value

    def unread(self, prefix: str) -> list[str]:
        """Return the keys with this prefix that nobody asked for."""
        return sorted(key for key in self.values if key.startswith(prefix) and key not in self._read)
