"""Merging across modalities, as Aya Vision does (arXiv 2505.08751): language-model tensors only.

    W = alpha W_multimodal + (1 - alpha) W_text

Vision encoder and connector are those of the multimodal model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from koine.combine.compatibility import tokenizer_differences
from koine.combine.merging.budget import LIBRARIES
from koine.combine.merging.methods import BLOCK, linear
from koine.combine.merging.tensor_names import is_saved_buffer, leave_tied_head
from koine.combine.merging.vocabularies import read_token_ids
from koine.combine.safetensors_stream import Checkpoint, CheckpointWriter
from koine.errors import UserError
from koine.files import atomic_directory, check_inside, write_json
from koine.model.formats.carried_files import carry_files
from koine.model.formats.checksum import seal_folder

ANCESTOR = "give the text model that the other began as"


def text_name(name: str) -> str | None:
    """The text model's name of a multimodal checkpoint's tensor; None for what is not the language model's."""
    for prefix, replacement in (("language_model.", ""), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name if name == "lm_head.weight" else None


@dataclass(frozen=True)
class CrossModalEstimate:
    """What a merge across modalities will take."""

    merged: int
    copied: int
    output_bytes: int
    peak_memory_bytes: int


def merge_cross_modal(
    multimodal: Path,
    text: Path,
    out: Path,
    *,
    alpha: float,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write the multimodal model with its language model merged with `text`'s to `out`; how many tensors were merged and copied.

    alpha: the weight of the MULTIMODAL model.

    Raises `UserError` where the first model has no language model inside, the second is another than that (in its tensors, their shapes or its tokenizer), a
    tensor holds NaN or infinity, or `alpha` is not from 0 to 1.
    """
    check_inside(out, (multimodal, text))
    with _opened(multimodal, text, alpha) as (whole, plain, names):
        with atomic_directory(out, overwrite=overwrite, reads=[multimodal, text]) as folder:
            _write(whole, plain, names, folder, alpha, max_shard_bytes)
        merged = sum(theirs is not None for theirs in names.values())
        return {"merged": merged, "copied": len(names) - merged}


def estimate_cross_modal(multimodal: Path, text: Path, out: Path, *, alpha: float) -> CrossModalEstimate:
    """What `merge_cross_modal` will take; raises as it does, but for what only reading the weights shows."""
    check_inside(out, (multimodal, text))
    with _opened(multimodal, text, alpha) as (whole, _, names):
        merged = sum(theirs is not None for theirs in names.values())
        block = max(
            min(entry.numel, max(BLOCK, entry.row)) * (3 * entry.dtype.itemsize + 4)
            for entry in whole.values()
        )
        size = sum(entry.nbytes for entry in whole.values())
        return CrossModalEstimate(merged, len(names) - merged, size, LIBRARIES + block)


@contextmanager
def _opened(
    multimodal: Path, text: Path, alpha: float
) -> Iterator[tuple[Checkpoint, Checkpoint, dict[str, str | None]]]:
    """Both models, checked to fit, and for each tensor of the first the name that the second has it by, if any."""
    if not 0.0 <= alpha <= 1.0:
        raise UserError(
            f"alpha is {alpha}", hint="it must lie between 0 and 1; it is the multimodal model's weight"
        )
    whole, plain = Checkpoint(multimodal), Checkpoint(text)
    try:
        names = _names(whole, plain)
        _refuse_other_tokenizer(multimodal, text)
        yield whole, plain, names
    finally:
        whole.close()
        plain.close()


def _names(whole: Checkpoint, plain: Checkpoint) -> dict[str, str | None]:
    for one in (whole, plain):
        one.entries = {name: entry for name, entry in one.items() if not is_saved_buffer(name, entry)}
        leave_tied_head(one)
    names = {name: text_name(name) for name in whole}
    if not any(names.values()):
        raise UserError(
            "holds no tensor of a language model inside",
            where=whole.path,
            hint="give the multimodal model first",
        )
    for name, theirs in names.items():
        if theirs is None:
            continue
        if theirs not in plain:
            raise UserError(f"lacks {theirs}", where=plain.path, hint=ANCESTOR)
        if plain[theirs].shape != whole[name].shape:
            raise UserError(
                f"{theirs} has shape {list(plain[theirs].shape)}, and {list(whole[name].shape)} in {whole.path}",
                where=plain.path,
                hint=ANCESTOR,
            )
    taken = set(names.values())
    for theirs in plain:
        if theirs not in taken:
            raise UserError(
                f"has {theirs}, which the language model inside {whole.path} lacks",
                where=plain.path,
                hint=ANCESTOR,
            )
    return names


def _refuse_other_tokenizer(multimodal: Path, text: Path) -> None:
    """A multimodal model has tokens of its own for images; those that both know must have one id, and text must be cut alike."""
    known = [read_token_ids(path) for path in (multimodal, text)]
    if known[0] is None or known[1] is None:
        return
    differing = [part for part in tokenizer_differences(multimodal, text) if part != "added_tokens"]
    if any(known[0].get(token, row) != row for token, row in known[1].items()):
        differing.append("ids")
    if differing:
        raise UserError(
            f"its tokenizer is another than that of {multimodal} (they differ in {', '.join(differing)})",
            where=text / "tokenizer.json",
            hint=ANCESTOR,
        )


def _write(
    whole: Checkpoint,
    plain: Checkpoint,
    names: dict[str, str | None],
    folder: Path,
    alpha: float,
    max_shard_bytes: int,
) -> None:
    carry_files(whole.path, folder)
    if (whole.path / "config.json").exists():
        shutil.copyfile(whole.path / "config.json", folder / "config.json")
    layout = {name: (entry.dtype, entry.shape) for name, entry in whole.items()}
    writer = CheckpointWriter(folder, layout, max_shard_bytes=max_shard_bytes)
    try:
        for name, entry in whole.items():
            theirs = names[name]
            rows = max(1, BLOCK // max(1, entry.row))
            for start in range(0, entry.rows, rows):
                stop = min(entry.rows, start + rows)
                block = whole.read(name, start, stop)
                if theirs is not None:
                    block = linear((block, plain.read(theirs, start, stop)), (alpha, 1.0 - alpha))
                if not block.isfinite().all():
                    raise UserError(
                        f"{name} holds NaN or infinity",
                        where=whole.path,
                        hint="one of the models is broken"
                        if theirs is not None
                        else "this checkpoint is broken",
                    )
                writer.write(name, block, start)
    finally:
        writer.close()
    seal_folder(folder)
    write_json(
        folder / "merge_report.json",
        {"method": "cross-modal", "alpha": alpha, "multimodal": str(whole.path), "text": str(plain.path),
         "merged": sorted(name for name, theirs in names.items() if theirs is not None)},
    )  # fmt: skip
    (folder / "README.md").write_text(
        f"# {whole.path.resolve().name}, merged with the text model {plain.path.resolve().name}\n\n"
        f"The language model's tensors are {alpha:g} of the multimodal model's and {1 - alpha:g} of the text model's; everything else is the multimodal "
        "model's (Dash et al., Aya Vision, 2025, arXiv 2505.08751).\n",
        encoding="utf-8",
    )
