"""Import a model: find the source, plan, and write a complete model directory or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from koine.files import atomic_directory
from koine.model.formats.importing.folder import plan_folder
from koine.model.formats.importing.gguf_model import check_dtype, plan_gguf
from koine.model.formats.importing.plan import MAX_SHARD_BYTES, ImportPlan
from koine.model.formats.importing.sources import GgufSource, find_source


@contextmanager
def planned_import(source: str | Path, *, dtype: torch.dtype | None = None) -> Iterator[ImportPlan]:
    """Open a source and plan its import; the files are closed after the context.

    Args:
        source: a GGUF file; a folder with `pytorch_model.bin` or safetensors; `OWNER/NAME[@REVISION]` on the
            hub, with `:FILE.gguf` for one file of it; `package:NAME`, an installed package.
        dtype: float32, bfloat16 or float16, of all weights; None: float32 of quantised weights, else as
            stored.

    Raises:
        UserError: there is no such source, it is damaged, or it cannot be imported.
    """
    check_dtype(dtype)
    found = find_source(source)
    plan = plan_gguf(found, dtype) if isinstance(found, GgufSource) else plan_folder(found, dtype)
    try:
        yield plan
    finally:
        plan.close()


def import_model(
    source: str | Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write a source as a model directory that `transformers` opens; return what was written.

    Tensors are read and written in pieces of about 32 MB. The folder is complete or absent.

    Args:
        source: as in `planned_import`.
        out: the folder.
        dtype: as in `planned_import`.
        overwrite: whether `out` may hold something.
        max_shard_bytes: largest file of weights.

    Raises:
        UserError: as `planned_import`; `out` exists; the weights hold NaN; the disk is full.
    """
    with (
        planned_import(source, dtype=dtype) as plan,
        atomic_directory(Path(out), overwrite=overwrite, reads=plan.reads) as folder,
    ):
        plan.write(folder, max_shard_bytes=max_shard_bytes)
        return plan.describe()
