"""What lies beside the weights of a mixture and belongs to it: a folder that is made from a mixture's is not whole without."""

from __future__ import annotations

import shutil
from pathlib import Path

RECORD = "mixture.json"
"""What a mixture was made of, and how it was changed since."""

DOMAIN_ENCODER = "domain_encoder"
"""The folder of the encoder by which a Nexus router knows domains."""


def carry_mixture_files(model: Path, out: Path) -> None:
    """Copy a mixture's own files into a folder that was made from it; of a dense model there are none."""
    if (model / RECORD).is_file():
        shutil.copyfile(model / RECORD, out / RECORD)
    if (model / DOMAIN_ENCODER).is_dir():
        shutil.copytree(model / DOMAIN_ENCODER, out / DOMAIN_ENCODER, dirs_exist_ok=True)
