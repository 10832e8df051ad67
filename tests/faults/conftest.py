"""The complete fault injection runs only on request."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "faults" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("faults"):
                item.add_marker(
                    pytest.mark.skip(reason="up to 30 minutes: `make faults`, or pytest -m faults")
                )
