"""Merge a LoRA adapter into its base: `W + scale * B A`, tensor by tensor, in the layout of the files.

Commands take `BASE+ADAPTER` where they take a model: the two are merged into a temporary folder, which is
removed when the process ends.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from koine.data.drawn import carry_drawn
from koine.errors import KoineWarning, UserError
from koine.files import atomic_directory, disk_errors, read_json_object, write_json
from koine.files.stand_ins import register_stand_in
from koine.hub import MODEL, TOKENIZER, hub_id, model_folder
from koine.model.formats.carried_files import carry_files, copy_tokenizer
from koine.model.formats.checksum import write_checksums
from koine.model.formats.model_card import ModelCard, Parent, write_model_card
from koine.model.formats.safetensors_stream import Checkpoint, CheckpointWriter
from koine.model.formats.tensor_digest import joined_digest, tensor_digest
from koine.model.lora.files import StoredAdapter, is_adapter, read_adapter

SEPARATOR = "+"
MAX_SHARD_BYTES = 5 * 10**9
_MERGED: dict[tuple[Path, Path], Path] = {}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def merge_adapter(
    base: Path, adapter: Path, out: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> None:
    """Write the model that a base and its LoRA adapter are, as a folder of the base's class.

    `W + scale * B A` is computed in float32 and rounded once. Memory: a few tensors.

    Args:
        base: folder of the model, or `OWNER/NAME` of the hub.
        adapter: folder of a PEFT adapter, written by `koine train --lora-rank` or by `peft`.
        out: folder to write.
        dtype: of the matrices; None: as the base stores them.
        overwrite: replace what `out` holds.

    Raises:
        UserError: the adapter is of another base (names, shapes, sha256), of another kind than LoRA, or damaged.
            Nothing half-written is then left.
    """
    base, adapter = model_folder(base), Path(adapter)
    with atomic_directory(out, overwrite=overwrite, reads=[base, adapter]) as folder:
        _write_merged(base, adapter, folder, dtype)


def split_adapter(text: str | Path) -> tuple[str, str] | None:
    """Return base and adapter of `BASE+ADAPTER`; None for anything else, such as a folder of that name.

    The last `+` whose right side is an adapter's folder separates them; the base may be `BASE+ADAPTER` again.
    """
    given = str(text)
    if SEPARATOR not in given or Path(given).exists():
        return None
    cuts = [index for index, character in enumerate(given) if character == SEPARATOR]
    for cut in reversed(cuts):
        left, right = given[:cut], given[cut + 1 :]
        if left and right and is_adapter(Path(right)):
            return left, right
    left, right = given[: cuts[-1]], given[cuts[-1] + 1 :]
    if left and right and Path(right).is_dir():
        # It holds no adapter: `read_adapter` says so.
        return left, right
    if left and (Path(left).is_dir() or is_adapter(Path(left))):
        raise UserError(
            "no such adapter" if right else "names no adapter after the +",
            where=right or given,
            hint="give BASE+ADAPTER, two folders joined by +",
        )
    return None


def resolve_model(text: str | Path, files: Sequence[str] = MODEL) -> Path:
    """Return the folder of a model: a path, the snapshot of a name on the hub, or the merge of `BASE+ADAPTER`.

    Args:
        text: as the user gave it.
        files: patterns of the files that are needed, as in `koine.hub`. Without weights nothing is merged:
            the adapter's folder is returned where it has a tokenizer, else the base's.
    """
    parts = split_adapter(text)
    if parts is None:
        return model_folder(text, files)
    base, adapter = resolve_model(parts[0], files), Path(parts[1])
    if files is not MODEL:
        has_tokenizer = files is TOKENIZER and (adapter / "tokenizer.json").is_file()
        return adapter if has_tokenizer else base
    key = base.resolve(), adapter.resolve()
    if key not in _MERGED:
        _MERGED[key] = _merge_for_this_process(base, adapter)
    return _MERGED[key]


def _merge_for_this_process(base: Path, adapter: Path) -> Path:
    """Merge into a temporary folder, which is removed when the process ends."""
    place = Path(_temporary().name)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    free = shutil.disk_usage(place).free
    if size > free:
        raise UserError(
            f"merging base and adapter takes {size / 2**30:.1f} GiB of disk, and {free / 2**30:.1f} GiB are free",
            where=place,
            hint="set TMPDIR to a folder on a larger disk, or merge once: koine model merge-adapter",
        )
    # Numbered, because two adapters may have one name; the last part is what cards and experts are called.
    folder = (
        place / str(len(list(place.iterdir()))) / f"{base.resolve().name}{SEPARATOR}{adapter.resolve().name}"
    )
    folder.mkdir(parents=True)
    try:
        with disk_errors(folder):
            _write_merged(base, adapter, folder, None)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    register_stand_in(folder, (base, adapter))
    return folder


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Make a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="koine-")


def _write_merged(base: Path, adapter: Path, folder: Path, dtype: torch.dtype | None) -> None:
    stored = read_adapter(adapter)
    checkpoint = Checkpoint(base)
    try:
        modules = _match(stored, checkpoint)
        dtypes = {name: _dtype(entry.dtype, dtype) for name, entry in checkpoint.items()}
        layout = {name: (dtypes[name], entry.shape) for name, entry in checkpoint.items()}
        writer = CheckpointWriter(folder, layout, max_shard_bytes=MAX_SHARD_BYTES)
        digests = []
        try:
            for name, entry in checkpoint.items():
                tensor = checkpoint.read(name)
                if stored.base_digest is not None:
                    digests.append((name, entry.shape, tensor_digest(tensor)))
                if name in modules:
                    tensor = _merged(tensor, stored, modules[name], name)
                writer.write(name, tensor.to(dtypes[name]))
        finally:
            writer.close()
    finally:
        checkpoint.close()
    if stored.base_digest is not None and joined_digest(digests) != stored.base_digest:
        raise UserError(
            f"is an adapter of another base than {base}: the sha256 of the base's weights differs",
            where=adapter,
            hint=_base_hint(stored),
        )
    _write_other_files(base, adapter, folder, dtype)


def _match(stored: StoredAdapter, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the adapter's modules by the name of the tensor that each changes.

    Raises `UserError` where the base lacks one, or has it with another shape; warns of a base of another name.
    """
    found: dict[str, str] = {}
    for module in stored.modules:
        # Some files leave out the class's prefix, as GPT-2's `transformer.`.
        names = [f"{module}.weight", f"{module.partition('.')[2]}.weight"]
        name = next((one for one in names if one in checkpoint), None)
        if name is None:
            raise UserError(
                f"changes {module}, which {checkpoint.path} does not have",
                where=stored.path,
                hint=_base_hint(stored),
            )
        entry = checkpoint[name]
        _, inputs, outputs = stored.shape(module)
        wanted = (inputs, outputs) if stored.transposed else (outputs, inputs)
        if entry.shape != wanted:
            raise UserError(
                f"changes {module} of shape {list(wanted)}, and {checkpoint.path} has one of {list(entry.shape)}",
                where=stored.path,
                hint=_base_hint(stored),
            )
        if entry.dtype not in FLOATS:
            raise UserError(
                f"{name} is of dtype {str(entry.dtype).removeprefix('torch.')}",
                where=checkpoint.path,
                hint="an adapter is merged into weights of floating point, not into quantised ones",
            )
        found[name] = module
    named = stored.base_name
    names_given = (checkpoint.path.resolve().name, (hub_id(checkpoint.path) or ("",))[0])
    if (
        stored.base_digest is None
        and named
        and named not in names_given
        and Path(named).name not in names_given
    ):
        warnings.warn(
            f"{stored.path} says that its base is {named}, and it is merged into {checkpoint.path}",
            KoineWarning,
            stacklevel=4,
        )
    return found


def _base_hint(stored: StoredAdapter) -> str:
    return f"its base is {stored.base_name}" if stored.base_name else "give the model that it was trained on"


def _dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return stored if wanted is None or not stored.is_floating_point else wanted


def _merged(weight: Tensor, stored: StoredAdapter, module: str, name: str) -> Tensor:
    """Return `W + scale * B A` in float32, or in float64 for such a base."""
    a_ri, b_or = stored.pair(module)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    a_ri, b_or = a_ri.to(wide.dtype), b_or.to(wide.dtype)
    left, right = (a_ri.t(), b_or.t()) if stored.transposed else (b_or, a_ri)
    out = torch.addmm(wide, left, right, alpha=stored.modules[module])
    if not torch.isfinite(out).all():
        raise UserError(
            f"{name} is NaN or infinity after merging",
            where=stored.path,
            hint="check the base and lora_alpha",
        )
    return out


def _write_other_files(base: Path, adapter: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Write what a model's folder holds beside the weights; the adapter's tokenizer, where it has one."""
    carry_files(base, folder, warn=False)
    carry_drawn((base, adapter), folder)
    copy_tokenizer(adapter, folder)
    if (base / "config.json").is_file():
        config = read_json_object(base / "config.json")
        if dtype is not None:
            config["dtype"] = str(dtype).removeprefix("torch.")
            config.pop("torch_dtype", None)
        write_json(folder / "config.json", config)
    write_model_card(folder, _card(base, adapter))
    write_checksums(folder)


def _card(base: Path, adapter: Path) -> ModelCard:
    content: Mapping[str, object] = read_json_object(adapter / "adapter_config.json")
    keys = ("r", "lora_alpha", "use_rslora", "target_modules")
    return ModelCard(
        title=f"{base.absolute().name} with the adapter {adapter.absolute().name}",
        summary="A LoRA adapter (arXiv 2106.09685), merged into the weights of its base.",
        parents=(Parent(path=base, role="base"), Parent(path=adapter, role="adapter")),
        relation="finetune",
        parameters={key: content[key] for key in keys if key in content},
        tags=("lora",),
    )
