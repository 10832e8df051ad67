"""Whether this machine can run the sandbox: tests that need it are skipped, with the reason, where it cannot."""

from __future__ import annotations

import pytest

from koine.align.sandbox import Sandbox
from koine.errors import UserError


def reason_without_sandbox() -> str | None:
    try:
        Sandbox().check()
    except UserError as error:
        return str(error)
    return None


_REASON = reason_without_sandbox()
needs_sandbox = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
