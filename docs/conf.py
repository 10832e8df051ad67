"""Sphinx configuration of the documentation site: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from koine import __version__  # noqa: E402

project = "Koine"
author = "The Koine authors"
copyright = "The Koine authors, Apache-2.0"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_click",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
# `make docs` shows what the notebooks hold; the tests run them (tests/docs/test_notebooks.py).
nb_execution_mode = "off"

default_role = "code"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

nitpicky = False
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository; `linkcode` below resolves them

html_theme = "furo"
html_title = "Koine"
html_static_path: list[str] = []
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def _skip_alias(
    app: object, what: str, name: str, member: object, skip: bool, options: object
) -> bool | None:
    """Leave out the fields of named tuples that have no docstring of their own."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: object) -> None:
    """Connect the hooks of this file."""
    app.connect("autodoc-skip-member", _skip_alias)  # type: ignore[attr-defined]
