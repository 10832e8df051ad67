"""A small code domain: functions and classes of the installed Python standard library."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = (
    "abc", "argparse", "base64", "bisect", "calendar", "cmd", "codecs", "colorsys", "configparser",
    "contextlib", "copy", "csv", "dataclasses", "datetime", "difflib", "enum", "fileinput", "fnmatch",
    "fractions", "functools", "getopt", "glob", "gzip", "heapq", "hmac", "html/parser", "inspect", "io",
    "json/decoder", "json/encoder", "keyword", "linecache", "locale", "lzma", "mimetypes", "numbers",
    "operator", "pathlib", "pprint", "queue", "random", "reprlib", "sched", "secrets", "selectors",
    "shlex", "shutil", "statistics", "string", "stringprep", "tempfile", "textwrap", "threading",
    "timeit", "tokenize", "traceback", "types", "typing", "urllib/parse", "uuid", "warnings", "weakref",
    "zipfile",
)  # fmt: skip
LONGEST = 4_000


def code_records(max_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield functions and classes of `MODULES` in order, until `max_bytes`.

    Deterministic for a Python version.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    left = max_bytes
    for module in MODULES:
        path = library / f"{module}.py"
        if not path.exists():
            path = library / module / "__init__.py"
        if not path.exists():
            continue
        source = path.read_text(encoding="utf-8")
        lines = source.split("\n")
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            text = _segment(lines, node)
            size = len(text.encode("utf-8"))
            if size > LONGEST or size < 80:
                continue
            if size > left:
                return
            left -= size
            yield {
                "id": f"python:{module.replace('/', '.')}.{node.name}",
                "text": text,
                "language": "und",
                "domain": "code",
                "source": "python-stdlib",
            }


def _segment(lines: list[str], node: ast.FunctionDef | ast.ClassDef) -> str:
    """Return the source of a node, as `ast.get_source_segment`, which splits the whole file each time."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    *before, last = lines[node.lineno - 1 : node.end_lineno]
    # Columns count bytes; a node of the module's body begins in column 0.
    return "\n".join([*before, last.encode("utf-8")[: node.end_col_offset].decode("utf-8")])
