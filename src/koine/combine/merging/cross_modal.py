"""Merge a multimodal model with a text model, as Aya Vision does (arXiv 2505.08751): its language model only.

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
from koine.combine.merging.budget import LIBRARY_BYTES
from koine.combine.merging.methods import BLOCK, linear
from koine.combine.merging.tensor_names import drop_tied_head, is_saved_buffer
from koine.combine.merging.tokenizers import read_token_ids
from koine.errors import UserError
from koine.files import atomic_directory, check_inside, write_json
from koine.model.formats.carried_files import carry_files
from koine.model.formats.checksum import write_checksums
from koine.model.formats.model_card import ModelCard, Parent, write_model_card
from koine.model.formats.safetensors_stream import Checkpoint, CheckpointWriter

ANCESTOR = "give the text model that the other began as"


def text_name(name: str) -> str | None:
    """Return the text model's name of a multimodal checkpoint's tensor; None outside the language model."""
    for prefix, replacement in (("language_model.", ""), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name if name == "lm_head.weight" else None


@dataclass(frozen=True)
class CrossModalEstimate:
    """The memory and time of a cross-modal merge, and the tensors that it merges and copies."""

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
    """Merge the language model inside a multimodal model with a text model; count merged and copied tensors.

    Args:
        multimodal: The folder of the multimodal model. Vision encoder and connector are copied from it.
        text: The folder of the text model that its language model was initialised from.
        out: The folder to write.
        alpha: The weight of the multimodal model.
        max_shard_bytes: Largest file of weights.
        overwrite: Replace what stands at `out`.

    Raises:
        UserError: The first model has no language model inside; the second differs from it in tensors, shapes
            or tokenizer; a tensor holds NaN or infinity; or `alpha` is not from 0 to 1.
    """
    check_inside(out, (multimodal, text))
    with _opened(multimodal, text, alpha) as pair:
        with atomic_directory(out, overwrite=overwrite, reads=[multimodal, text]) as folder:
            _write(pair, folder, alpha, max_shard_bytes)
        return {"merged": pair.merged, "copied": len(pair.names) - pair.merged}


def estimate_cross_modal(multimodal: Path, text: Path, out: Path, *, alpha: float) -> CrossModalEstimate:
    """Estimate `merge_cross_modal`; raise as it does, except for what only the weights show."""
    check_inside(out, (multimodal, text))
    with _opened(multimodal, text, alpha) as pair:
        entries = pair.multimodal.values()
        block = max(
            min(entry.numel, max(BLOCK, entry.row)) * (3 * entry.dtype.itemsize + 4) for entry in entries
        )
        size = sum(entry.nbytes for entry in entries)
        return CrossModalEstimate(pair.merged, len(pair.names) - pair.merged, size, LIBRARY_BYTES + block)


@dataclass(frozen=True)
class _Pair:
    """Both opened models; `names` maps each multimodal tensor to the text model's, or None: it is copied."""

    multimodal: Checkpoint
    text: Checkpoint
    names: dict[str, str | None]

    @property
    def merged(self) -> int:
        """Return how many tensors are merged."""
        return sum(name is not None for name in self.names.values())


@contextmanager
def _opened(multimodal: Path, text: Path, alpha: float) -> Iterator[_Pair]:
    """Open both models and check that they fit."""
    if not 0.0 <= alpha <= 1.0:
        raise UserError(
            f"alpha is {alpha}", hint="it must lie between 0 and 1; it is the multimodal model's weight"
        )
    first, second = Checkpoint(multimodal), Checkpoint(text)
    try:
        names = _match_names(first, second)
        _check_same_tokenizer(multimodal, text)
        yield _Pair(first, second, names)
    finally:
        first.close()
        second.close()


def _match_names(multimodal: Checkpoint, text: Checkpoint) -> dict[str, str | None]:
    """Return the text model's name of each multimodal tensor; raise `UserError` where they do not fit."""
    for checkpoint in (multimodal, text):
        checkpoint.entries = {
            name: entry for name, entry in checkpoint.items() if not is_saved_buffer(name, entry)
        }
        drop_tied_head(checkpoint)
    names = {name: text_name(name) for name in multimodal}
    if not any(names.values()):
        raise UserError(
            "holds no tensor of a language model inside",
            where=multimodal.path,
            hint="give the multimodal model first",
        )
    for name, inner in names.items():
        if inner is None:
            continue
        if inner not in text:
            raise UserError(f"lacks {inner}", where=text.path, hint=ANCESTOR)
        shapes = text[inner].shape, multimodal[name].shape
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{inner} has shape {list(shapes[0])}, and {list(shapes[1])} in {multimodal.path}",
                where=text.path,
                hint=ANCESTOR,
            )
    inner_names = set(names.values())
    for inner in text:
        if inner not in inner_names:
            raise UserError(
                f"has {inner}, which the language model inside {multimodal.path} lacks",
                where=text.path,
                hint=ANCESTOR,
            )
    return names


def _check_same_tokenizer(multimodal: Path, text: Path) -> None:
    """Raise `UserError` where the tokenizers encode text differently.

    The multimodal model may have tokens of its own for images. Tokens that both have must have one id.
    """
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


def _write(pair: _Pair, folder: Path, alpha: float, max_shard_bytes: int) -> None:
    source = pair.multimodal
    carry_files(source.path, folder)
    if (source.path / "config.json").exists():
        shutil.copyfile(source.path / "config.json", folder / "config.json")
    layout = {name: (entry.dtype, entry.shape) for name, entry in source.items()}
    writer = CheckpointWriter(folder, layout, max_shard_bytes=max_shard_bytes)
    try:
        for name in source:
            _write_tensor(pair, name, writer, alpha)
    finally:
        writer.close()
    write_checksums(folder)
    report = {
        "method": "cross-modal",
        "alpha": alpha,
        "multimodal": str(source.path),
        "text": str(pair.text.path),
        "merged": sorted(name for name, inner in pair.names.items() if inner is not None),
    }
    write_json(folder / "merge_report.json", report)
    write_model_card(folder, _card(pair, alpha))


def _card(pair: _Pair, alpha: float) -> ModelCard:
    multimodal, text = pair.multimodal.path, pair.text.path
    return ModelCard(
        title=f"{multimodal.resolve().name}, merged with the text model {text.resolve().name}",
        summary=f"The language model's tensors are {alpha:g} of the multimodal model's and {1 - alpha:g} of the "
        "text model's. Everything else is the multimodal model's (Dash et al., Aya Vision, 2025, "
        "arXiv 2505.08751).",
        parents=(
            Parent(path=multimodal, role=f"multimodal model, weight {alpha:g}"),
            Parent(path=text, role=f"text model, weight {1 - alpha:g}"),
        ),
        relation="merge",
        parameters={"method": "cross-modal", "alpha": alpha},
        tags=("merge", "cross-modal"),
    )


def _write_tensor(pair: _Pair, name: str, writer: CheckpointWriter, alpha: float) -> None:
    """Merge or copy one tensor, some rows at a time."""
    entry, inner = pair.multimodal[name], pair.names[name]
    rows = max(1, BLOCK // max(1, entry.row))
    for start in range(0, entry.rows, rows):
        stop = min(entry.rows, start + rows)
        block = pair.multimodal.read(name, start, stop)
        if inner is not None:
            block = linear((block, pair.text.read(inner, start, stop)), (alpha, 1.0 - alpha))
        if not block.isfinite().all():
            raise UserError(
                f"{name} holds NaN or infinity",
                where=pair.multimodal.path,
                hint="this checkpoint is broken" if inner is None else "one of the models is broken",
            )
        writer.write(name, block, start)
