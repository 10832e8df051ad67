"""The contract of engines needs no torch: a remote engine opens on a machine without a model, quickly."""

from __future__ import annotations

import subprocess
import sys


def test_a_remote_engine_opens_without_torch() -> None:
    code = (
        "import sys; from koine.generate import RemoteEngine, Sampling, Budget; print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
