"""Modules of an experiment by their files: every experiment has a plan.py and most a plots.py of its own, so that names alone do not tell them apart."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(file: Path) -> ModuleType:
    """The module `file`, under a name that no other experiment has; what it imports of its folder is found."""
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    name = f"{file.parent.name}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
