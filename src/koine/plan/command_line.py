"""The command line of a run as it is recorded: without passwords and keys."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

_CREDENTIALS = re.compile(r"(?<=://)[^/\s?#]*@")
_QUERY = re.compile(r"(?i)((?:^|[?&;\s])[a-z_-]*(?:key|token|secret|password)=)[^&#;\s]+")


def recorded_command(words: Sequence[str] | None = None) -> list[str]:
    """Return the words of a command, with `***` for passwords and keys in addresses.

    The default is the command of this process.
    """
    return [
        _QUERY.sub(r"\1***", _CREDENTIALS.sub("***@", word)) if "://" in word else word
        for word in (sys.argv if words is None else words)
    ]
