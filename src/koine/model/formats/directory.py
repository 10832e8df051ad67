"""Load and save model directories: `config.json` and `model.safetensors`, as `transformers` opens them.

A block's fused projections are split when saved and joined when loaded (`tensor_names`).
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from koine.errors import UserError
from koine.files import disk_errors, write_json
from koine.hub import model_folder
from koine.model.config import ModelConfig
from koine.model.decoder import Decoder
from koine.model.families.family import OWN_NAMES, TensorNames
from koine.model.families.reading import null_or
from koine.model.formats.checksum import (
    KEY,
    NO_CHECKSUM,
    RunningChecksum,
    verify_checksums,
    write_checksum,
)
from koine.model.formats.config_json import read_config, stored_names, to_json
from koine.model.formats.eos_ids import eos_ids
from koine.model.formats.fused_experts import TensorSlice, split_experts
from koine.model.formats.opening import check_tokenizer_hash
from koine.model.formats.safetensors_header import read_header
from koine.model.formats.safetensors_stream import DTYPES, CheckpointWriter
from koine.model.formats.safetensors_writer import save_tensors
from koine.model.formats.stored_tensors import (
    CanonicalTensors,
    class_name,
    class_tensors,
    read_stored,
)
from koine.model.formats.tensor_names import join_stored, split_stored
from koine.model.formats.weight_files import stored_bytes, weight_files, widest
from koine.model.meta_device import meta_device

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
MAX_SHARD_BYTES = 5_000_000_000
"""Largest weight file of a model that is written in pieces; the default of `transformers`."""


def to_transformers(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert our state dict to the names and shapes of the class that the model is saved as.

    A model that no class computes has names of our own.
    """
    written = class_tensors(to_canonical(state, config), stored_names(config), config)
    return {name: tensor.contiguous() for name, tensor in written}


def to_canonical(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert our state dict to our stored names: a tensor for each projection, heads in our order."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            parts = split_stored(rest, tensor, config, config.layers[int(index)])
            out |= {f"{OWN_NAMES.prefix}{index}.{part}": one for part, one in parts.items()}
        else:
            out[OWN_NAMES.top[name]] = tensor
    return out


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return our stored name and the shape of every tensor, without allocating it."""
    return dict(_canonical_shapes(config))


@functools.lru_cache(maxsize=8)
def _canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with meta_device():
        state = Decoder(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in to_canonical(state, config).items()}


def from_transformers(
    state: Mapping[str, Tensor], config: ModelConfig, *, head: bool = True
) -> dict[str, Tensor]:
    """Build our state dict from the saved tensors. Raises `KeyError` with the name of a missing one.

    head: whether the output matrix is wanted too; a reward model has none.
    """
    with meta_device():
        wanted = Decoder(config).state_dict().keys()
    names = stored_names(config)
    return {name: _one(state, name, config, names) for name in wanted if head or name != "head.weight"}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a saved model, without allocating it."""
    return dict(_expected_shapes(config, config.model_type))


@functools.lru_cache(maxsize=8)
def _expected_shapes(config: ModelConfig, kind: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes for a model that was read as `kind`, a field that equal configurations may differ in."""
    names = stored_names(replace(config, model_type=kind))
    with torch.device("meta"):
        ours = {name: torch.empty(shape) for name, shape in canonical_shapes(config).items()}
    return {name: tuple(tensor.shape) for name, tensor in class_tensors(ours, names, config)}


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files, each read on access.

    Fused experts (`koine.model.formats.fused_experts`) are split, so that each expert has tensors of its own.

    Args:
        path: the model's folder.
        names: of its class.
    """

    def __init__(self, path: Path, names: TensorNames = OWN_NAMES) -> None:
        self.files = weight_files(path)
        self._slices: dict[str, TensorSlice] = {}
        for shard in self.files:
            for name, entry in read_header(shard).items():
                if entry.dtype not in DTYPES:
                    raise UserError(
                        f"{name} is of dtype {entry.dtype}",
                        where=shard,
                        hint=f"Koine's own decoder reads {', '.join(DTYPES)}",
                    )
                whole = TensorSlice(shard, DTYPES[entry.dtype], entry.shape, entry.begin)
                self._slices |= split_experts(name, whole, names)
        verify_checksums(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the file's header."""
        return self._slices[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, from the file's header."""
        return self._slices[name].dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._slices[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)


def open_canonical(path: Path, config: ModelConfig) -> CanonicalTensors:
    """Open the tensors of a model directory under our stored names, whatever its class; see `open_weights`."""
    weights, names = open_weights(path, config), stored_names(config)
    layout = {
        name: (weights.dtype(class_name(name, names)), shape)
        for name, shape in canonical_shapes(config).items()
    }
    return CanonicalTensors(weights, layout, names, config)


def open_weights(
    path: Path, config: ModelConfig, *, expected: Mapping[str, tuple[int, ...]] | None = None
) -> StoredWeights:
    """Open the tensors of a model directory under their saved names; none is loaded yet.

    expected: names and shapes; None: those of the causal LM that `config` describes.

    Raises `UserError` where a file is missing or damaged, or a tensor is missing, left over or of another
    shape than `config` describes.
    """
    check_tokenizer_hash(path)
    weights = StoredWeights(path, stored_names(config))
    if expected is None:
        expected = expected_shapes(config)
    missing = sorted(expected.keys() - weights.keys())
    # A tied checkpoint may hold the head a second time, and old ones their rotary tables.
    extra = sorted(
        name
        for name in weights.keys() - expected.keys()
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")
    )
    if missing or extra:
        names = ", ".join((missing or extra)[:3])
        what = (
            f"lacks {len(missing)} tensors ({names})"
            if missing
            else f"has {len(extra)} unknown tensors ({names})"
        )
        raise UserError(
            f"the checkpoint {what}", where=path, hint="config.json and the weights do not belong together"
        )
    for name, shape in expected.items():
        if weights.shape(name) != shape:
            raise UserError(
                f"{name} has shape {list(weights.shape(name))}, config.json says {list(shape)}",
                where=path,
                hint="config.json and the weights do not belong together",
            )
    return weights


def load_model(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Decoder:
    """Load a Cohere, Cohere2 or Koine model directory.

    Args:
        path: the directory, or `OWNER/NAME` of the hub.
        dtype: of the weights; None: the widest stored one.
        device: where they are loaded.

    Raises:
        UserError: a file is missing, damaged or does not match its checksum; a tensor is missing, left over,
            of another shape or holds NaN; the tokenizer is not the one that the model was trained with.
    """
    path = model_folder(path)
    config = read_config(path)
    weights = open_weights(path, config)
    with meta_device():
        model = Decoder(config)
    model.eos_ids = eos_ids(path)
    dtype = dtype or widest(stored_bytes(weights.files))
    names = stored_names(config)
    state = {}
    for name, shape in ((name, tensor.shape) for name, tensor in model.state_dict().items()):
        state[name] = torch.empty(shape, dtype=dtype, device=device)
        state[name].copy_(_one(weights, name, config, names))
        if not torch.isfinite(state[name]).all():
            raise UserError(
                f"{name} holds NaN or infinity",
                where=path,
                hint="this checkpoint is broken; use an earlier one",
            )
    model.load_state_dict(state, assign=True)
    return model.eval()


def _one(weights: Mapping[str, Tensor], name: str, config: ModelConfig, names: TensorNames) -> Tensor:
    """Build one of our tensors from the saved ones; loading then needs memory for one more tensor only."""
    if not name.startswith("blocks."):
        return weights[names.top[name]]
    _, index, rest = name.split(".", 2)

    def stored(theirs: str) -> Tensor:
        return weights[f"{names.prefix}{index}.{theirs}"]

    def canonical(ours: str) -> Tensor:
        return read_stored(ours, stored, names, config)

    return join_stored(rest, canonical, config, config.layers[int(index)])


def _write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a complete safetensors file, or none. Raises `OSError` where the system refuses."""
    from safetensors import SafetensorError

    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_tensors(tensors, temporary, metadata={"format": "pt", KEY: NO_CHECKSUM})
        write_checksum(temporary)
        temporary.replace(path)
    except SafetensorError as error:
        # The library wraps the system's error into text of its own.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_state(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    path: Path,
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    eos_ids: Collection[int] = (),
) -> None:
    """Write a model directory from a state dict of ours (see `save_model`).

    eos_ids: besides the configuration's.
    """
    tensors = to_transformers({name: tensor.detach().cpu() for name, tensor in state.items()}, config)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_stored(tensors, config, path, tokenizer=tokenizer, eos_ids=eos_ids)


def save_stored(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    path: Path,
    *,
    tokenizer: Path | None = None,
    eos_ids: Collection[int] = (),
) -> None:
    """Write a model directory from tensors under their saved names (see `save_model`)."""
    path = Path(path)
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        kind = str(tensors[stored_names(config).top["norm.weight"]].dtype).removeprefix("torch.")
        # Sorted names: the same weights give the same bytes.
        _write_weights(dict(sorted(tensors.items())), path / "model.safetensors")
        save_configs(config, path, dtype=kind, tokenizer=tokenizer, eos_ids=eos_ids)


def save_streamed(
    tensors: Mapping[str, Tensor],
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    config: ModelConfig,
    path: Path,
    *,
    tokenizer: Path | None = None,
    eos_ids: Collection[int] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model directory from tensors under our stored names, one after the other (see `save_model`).

    Memory is needed for one tensor, or the parts of a fused one. After an error, `path` is as before.

    Args:
        tensors: each is looked up once, and written before the next.
        layout: dtype and shape of each, in the order in which they are looked up.
        config: of the model.
        path: the folder to write to.
        tokenizer: a folder with tokenizer files to copy.
        eos_ids: besides the configuration's.
        max_shard_bytes: largest file; with more there are several and an index.
    """
    names = stored_names(config)
    meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}
    written = {name: (one.dtype, tuple(one.shape)) for name, one in class_tensors(meta, names, config)}
    existed = path.exists()
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        work = path / f".weights.{os.getpid()}.partial"
        try:
            work.mkdir()
            _write_in_order(class_tensors(tensors, names, config), written, work, max_shard_bytes)
            for file in sorted(work.iterdir()):
                file.replace(path / file.name)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            if not existed:
                path.rmdir()
            raise
        work.rmdir()
        kind = str(layout[OWN_NAMES.top["norm.weight"]][0]).removeprefix("torch.")
        save_configs(config, path, dtype=kind, tokenizer=tokenizer, eos_ids=eos_ids)


def _write_in_order(
    tensors: Iterable[tuple[str, Tensor]],
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Write tensors, which come in the order of `layout`, to weight files with their checksums."""
    writer = CheckpointWriter(folder, layout, max_shard_bytes=max_shard_bytes)
    checksum: RunningChecksum | None = None
    try:
        for name, tensor in tensors:
            file = writer.entries[name].file
            if checksum is None or checksum.path != file:
                if checksum is not None:
                    checksum.write()
                checksum = RunningChecksum(file)
            tensor = tensor.contiguous()
            writer.write(name, tensor)
            if tensor.numel():
                checksum.add(memoryview(tensor.view(-1).view(torch.uint8).numpy().data))
    finally:
        writer.close()
    if checksum is not None:
        checksum.write()


def save_configs(
    config: ModelConfig,
    path: Path,
    *,
    dtype: str,
    tokenizer: Path | None = None,
    eos_ids: Collection[int] = (),
) -> None:
    """Write a model directory without its weights: the configurations and the tokenizer's files.

    eos_ids: besides the configuration's own.
    """
    others = sorted(set(eos_ids) - {config.eos_token_id})
    write_json(path / "config.json", to_json(config, dtype=dtype))
    write_json(
        path / "generation_config.json",
        {
            "bos_token_id": null_or(config.bos_token_id),
            "eos_token_id": [config.eos_token_id, *others] if others else null_or(config.eos_token_id),
            "pad_token_id": null_or(config.pad_token_id),
        },
    )
    if tokenizer is not None:
        for name in TOKENIZER_FILES:
            source, target = Path(tokenizer) / name, path / name
            # A model may be saved into its tokenizer's folder.
            if source.exists() and not (target.exists() and source.samefile(target)):
                shutil.copyfile(source, target)


def save_model(
    model: Decoder, path: Path, *, tokenizer: Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write `config.json`, `model.safetensors` and the files of a tokenizer directory into `path`.

    `path` may be the tokenizer's directory. Each file is complete or absent; for a complete folder or none,
    write into `koine.files.atomic_directory`. The classes that `transformers` has (see
    `config_json.model_type`) open without our code. Raises `UserError` for a full disk or a folder that
    cannot be written.
    """
    save_state(
        model.state_dict(), model.config, path, tokenizer=tokenizer, dtype=dtype, eos_ids=model.eos_ids
    )
