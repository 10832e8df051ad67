"""Sphinx configuration of the documentation site: `make docs`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
REPOSITORY = "https://github.com/koine-lm/koine/blob/main"
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>\.\./[^)#\s]+)\)")
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


def _link_repository(app: object, name: str, source: list[str]) -> None:
    """Let links to files outside `docs/` lead to the repository; figures stay."""
    page = (DOCS / name).parent

    def replace(match: re.Match[str]) -> str:
        target = (page / match["path"]).resolve()
        if match["image"] or not target.exists() or target.is_relative_to(DOCS):
            return match[0]
        return f"[{match['text']}]({REPOSITORY}/{target.relative_to(ROOT).as_posix()})"

    source[0] = LINK.sub(replace, source[0])


def setup(app: Sphinx) -> None:
    """Connect the hooks of this file."""
    app.connect("source-read", _link_repository)
    app.connect("autodoc-skip-member", _skip_alias)
