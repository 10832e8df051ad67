"""Write the tensors of a model directory into a GGUF file, as llama.cpp's converter lays them out.

The names come from the tensor-name maps of the `gguf` library. Beyond names: rows of q and k are interleaved
where llama.cpp rotates neighbours, 1 is added to norms that multiply by `1 + weight`, the experts of a layer
are stacked, and the frequencies of Llama 3 become a tensor.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from koine.errors import UserError
from koine.model.attention.rope_frequencies import frequencies_of, rope_of
from koine.model.config import LayerSpec, ModelConfig
from koine.model.formats.config_json import stored_names
from koine.model.formats.directory import expected_shapes
from koine.model.formats.gguf_architectures import Architecture
from koine.model.formats.rotary_layout import is_rotated, pairs_from_halves

Dtype = Literal["float32", "float16", "bfloat16", "q8_0"]
DTYPES: Final[tuple[Dtype, ...]] = ("float32", "float16", "bfloat16", "q8_0")
# Names of ggml's tensor types.
_TENSOR_TYPE: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_Q8_BLOCK: Final = 32
_FLOAT16_MAX: Final = 65_504.0
_EXPERT: Final = re.compile(r"\.experts\.\d+\.")
_HEAD: Final = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """One tensor of the file.

    name: in the file. source: in the model directory, for messages. shape: of the tensor.
    kind: ggml's type. read: returns its float32 values.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Tensor]


def write_tensors(writer: Any, gguf: Any, tensors: list[FileTensor], *, where: Path) -> None:
    """Write the header and the tensors, each read when it is written.

    Raises `UserError` for a tensor that holds NaN, infinity or values beyond float16.
    """
    for one in tensors:
        kind = gguf.GGMLQuantizationType[one.kind]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(one.shape)) // block * size
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in tensors:
        values = one.read().contiguous().numpy()
        _check_range(values, one.kind, one.source, where)
        try:
            writer.write_tensor_data(gguf.quantize(values, gguf.GGMLQuantizationType[one.kind]))
        except OSError as error:
            if error.errno is not None:
                raise
            # On a full disk numpy reports the bytes written, and no error number.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def file_tensors(
    gguf: Any, weights: Mapping[str, Tensor], config: ModelConfig, architecture: Architecture, dtype: Dtype
) -> list[FileTensor]:
    """Return the tensors of the file in its order; none is read yet."""
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    names = gguf.get_tensor_name_map(number, len(config.layers))
    return [
        FileTensor(
            name=_file_name(source, names),
            source=parts[0],
            shape=shape,
            kind=_tensor_type(source, shape, dtype),
            read=read,
        )
        for source, parts, shape, read in _sources(weights, config, architecture)
    ]


_Source = tuple[str, list[str], tuple[int, ...], Callable[[], Tensor]]
"""A tensor's name with the number of an expert left out, the stored ones, its shape, and a function."""


def _sources(
    weights: Mapping[str, Tensor], config: ModelConfig, architecture: Architecture
) -> Iterator[_Source]:
    groups: dict[str, list[str]] = {}
    shapes = expected_shapes(config)
    for name in shapes:
        groups.setdefault(_EXPERT.sub(".experts.", name), []).append(name)
    for source, parts in groups.items():
        shape = shapes[parts[0]]
        if source != parts[0]:
            shape = (len(parts), *shape)
        elif source.endswith("shared_expert_gate.weight"):
            shape = shape[1:]

        def read(source: str = source, parts: list[str] = parts, shape: tuple[int, ...] = shape) -> Tensor:
            tensors = [_file_layout(source, weights[name].float(), config, architecture) for name in parts]
            return (tensors[0] if len(tensors) == 1 else torch.stack(tensors)).view(shape)

        yield source, parts, shape, read
    top = stored_names(config).top
    if architecture.output == "own" and config.tie_embeddings:
        embedding = top["embedding.weight"]
        yield _HEAD, [embedding], shapes[embedding], lambda: weights[embedding].float()
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        yield "rope_freqs.weight", ["rope_freqs"], (config.head_dim // 2,), lambda: _llama3_factors(config)


def _file_layout(source: str, tensor: Tensor, config: ModelConfig, architecture: Architecture) -> Tensor:
    module = source.rpartition(".")[0]
    if architecture.pairs and stored_names(config).halves and is_rotated(module):
        tensor = pairs_from_halves(tensor, config, norm=module.endswith("_norm"))
    if config.norm_unit_offset and source.endswith("norm.weight"):
        tensor = tensor + 1
    return tensor


def _llama3_factors(config: ModelConfig) -> Tensor:
    """Return the numbers by which llama.cpp divides the frequencies of RoPE, `[head_dim / 2]`."""
    scaled = rope_of(config, LayerSpec())
    plain = rope_of(config, LayerSpec(rope_theta=config.rope_theta))
    device = torch.device("cpu")
    return frequencies_of(plain, device) / frequencies_of(scaled, device)


def _file_name(source: str, names: Any) -> str:
    if source == "rope_freqs.weight":
        return source
    name: str | None = names.get_name(source, try_suffixes=(".weight", ".bias"))
    assert name is not None, source
    return name


def _tensor_type(source: str, shape: tuple[int, ...], dtype: Dtype) -> str:
    """Return ggml's type of a tensor. Norms and routers stay float32: llama.cpp computes them in float32."""
    if len(shape) == 1 or source.endswith(
        ("_norm.weight", ".mlp.gate.weight", ".block_sparse_moe.gate.weight")
    ):
        return "F32"
    if dtype == "q8_0" and shape[-1] % _Q8_BLOCK:
        return "F16"
    return _TENSOR_TYPE[dtype]


def _check_range(values: Any, kind: str, name: str, where: Path) -> None:
    """Raise `UserError` for NaN, infinity, and values beyond float16 or the scale of a q8_0 block."""
    largest = max(-float(values.min()), float(values.max()))
    if not np.isfinite(largest):
        raise UserError(
            f"{name} holds NaN or infinity", where=where, hint="this checkpoint is broken; use an earlier one"
        )
    # A block of q8_0 holds multiples of its scale, up to 127.
    limit = {"F16": _FLOAT16_MAX, "Q8_0": 127 * _FLOAT16_MAX}.get(kind)
    if limit is not None and largest > limit:
        raise UserError(
            f"{name} holds {largest:.3g}, which float16 cannot",
            where=where,
            hint="export with --dtype bfloat16 or float32",
        )
