"""Read JSON files; report what Python cannot read or write again as `UserError`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from koine.errors import UserError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises `ValueError` with a short message for everything that Python cannot read or write again.
    """
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            # A file name that is not UTF-8 is written with surrogates, and read back as the same name.
            json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a string holds half of a surrogate pair") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        # Python reads no integer of more than 4,300 digits: the time grows with the square of their number.
        raise ValueError("an integer has thousands of digits") from None
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file; raise `UserError` for a missing, unreadable or malformed one."""
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError("no such file", where=path) from None
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror or error})",
            where=path,
            hint="check the file and its permissions",
        ) from None
    except ValueError as error:
        raise UserError(
            f"not valid JSON ({error})", where=path, hint="the file is damaged or truncated; write it again"
        ) from error


def read_json_object(
    path: Path, *, hint: str = "the file is damaged or truncated; write it again"
) -> dict[str, Any]:
    """Read a JSON file that holds an object; raise `UserError` for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", where=path, hint=hint)
    return value
