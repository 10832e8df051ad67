"""Export a model directory as one GGUF file for llama.cpp.

Dense hybrids are `cohere2`; models of full layers with RoPE are `command-r`. llama.cpp runs its own code for
an architecture, so what it would compute differently is rejected here. Both architectures rotate interleaved
pairs as we do (`LLAMA_ROPE_TYPE_NORM`), so no weights are permuted. Keys and tensor names are those of
llama.cpp's converter (its `conversion/command_r.py`).
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from koine.errors import KoineWarning, UserError, did_you_mean
from koine.extras import import_extra
from koine.files import atomic_file, check_output_file, disk_errors, read_json
from koine.hub import model_name
from koine.model.config import LayerSpec, ModelConfig, hybrid_layers
from koine.model.formats.config_json import decoder_types, model_type, read_config
from koine.model.formats.directory import expected_shapes, open_weights
from koine.model.formats.gguf_tokenizer import GgufTokenizer, read_gguf_tokenizer

Dtype = Literal["float32", "float16", "bfloat16", "q8_0"]
DTYPES: Final[tuple[Dtype, ...]] = ("float32", "float16", "bfloat16", "q8_0")
# Names of ggml's tensor types, and the value of `general.file_type` where most tensors have it.
_TENSOR_TYPE: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPE: Final = {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}
_Q8_BLOCK: Final = 32
_FLOAT16_MAX: Final = 65_504.0
# llama.cpp's command-r has QK-norm from this number of layers on (Command R+), and none below.
_COMMAND_R_QK_NORM_LAYERS: Final = 64


def export_gguf(model: Path, out: Path, *, dtype: Dtype | None = None, overwrite: bool = False) -> None:
    """Write a model directory as a GGUF file, tensor by tensor; the file is complete or absent.

    Args:
        model: the directory.
        out: the file.
        dtype: of the matrices; None: as stored. Norms are always float32. Under `q8_0`, rows that do not
            divide into blocks of 32 are float16.
        overwrite: whether `out` may exist.

    Warns (`KoineWarning`) where only newer versions of llama.cpp read the file correctly, or where it
    tokenizes some text differently.

    Raises:
        UserError: before anything is written, where llama.cpp has no equal of the model or its tokenizer,
            `out` exists, or the extra `gguf` is missing; and where a tensor holds NaN, infinity or values
            beyond float16.
    """
    model, out = Path(model), Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'", hint=did_you_mean(dtype, DTYPES))
    config = _read_config(model)
    architecture = architecture_of(config, where=model / "config.json")
    weights = open_weights(model, config)
    tokenizer = read_gguf_tokenizer(model, rows=config.vocab_size)
    kind = dtype or _stored_dtype(weights)
    gguf = import_extra("gguf", extra="gguf", purpose="export to GGUF")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    check_output_file(out, overwrite=overwrite)
    for warning in _warnings(config, tokenizer):
        warnings.warn(KoineWarning(f"{model}: {warning}"), stacklevel=2)
    with atomic_file(out, overwrite=overwrite) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            _add_keys(writer, config, kind, name=model_name(model))
            writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
            _add_tokenizer(writer, tokenizer)
            _write_tensors(writer, gguf, weights, config, kind, where=model)
        finally:
            writer.close()


def _read_config(model: Path) -> ModelConfig:
    where = model / "config.json"
    content = read_json(where) if where.exists() else None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind is not None and kind not in decoder_types():
        raise UserError(
            f"a model of type '{kind}' is not exported",
            where=where,
            hint="convert_hf_to_gguf.py of llama.cpp takes the classes of others",
        )
    return read_config(model)


def _stored_dtype(weights: Mapping[str, Tensor]) -> Dtype:
    stored = str(weights["model.norm.weight"].dtype).removeprefix("torch.")
    return next((known for known in DTYPES if known == stored), "float32")


def _warnings(config: ModelConfig, tokenizer: GgufTokenizer) -> Iterator[str]:
    """Yield what does not work in every version of llama.cpp or for every text."""
    if any(layer.window for layer in config.layers) and config.layers != standard_hybrid(config):
        yield (
            "not exactly every fourth layer is full. Recent versions of llama.cpp read such a pattern from "
            "the file (as of llama-cpp-python 0.3.36); older ones assume every fourth, and give wrong "
            "answers without a warning"
        )
    if tokenizer.scripts_with_other_digits:
        scripts = ", ".join(name.capitalize() for name in tokenizer.scripts_with_other_digits)
        yield (
            "llama.cpp splits digits by threes, and in this vocabulary that changes the tokens of numbers in "
            f"the digits of these scripts: {scripts}. The text itself stays the same"
        )


def architecture_of(config: ModelConfig, *, where: Path) -> Literal["cohere2", "command-r"]:
    """Return the architecture of llama.cpp that is exactly this model. Raises `UserError` without one."""

    def refuse(what: str, hint: str) -> UserError:
        return UserError(f"llama.cpp has no architecture for this model: {what}", where=where, hint=hint)

    if config.mixture is not None:
        raise refuse("it is a mixture of experts", "export the dense models that it was made of")
    kind = model_type(config)
    if kind == "koine":
        raise refuse(
            _why_not_cohere2(config.layers),
            "its cohere2 has windowed layers with RoPE (one window for all), full ones without positions, "
            "and no QK-norm",
        )
    if not config.tie_embeddings:
        raise refuse("its output matrix is not the embedding", "it reads tied models of this kind only")
    if config.attention_size != config.hidden_size:
        raise refuse(
            f"{config.num_heads} heads of {config.head_dim} are not the hidden size {config.hidden_size}",
            "it derives the one from the other",
        )
    if kind == "cohere2":
        if all(layer.window is None for layer in config.layers):
            raise refuse("no layer has a window", "its cohere2 has windowed and full layers")
        return "cohere2"
    normed = config.layers[0].qk_norm is not None
    if normed != (len(config.layers) >= _COMMAND_R_QK_NORM_LAYERS):
        raise refuse(
            f"{len(config.layers)} layers {'with' if normed else 'without'} QK-norm",
            f"its command-r has QK-norm from {_COMMAND_R_QK_NORM_LAYERS} layers on and only there",
        )
    return "command-r"


def standard_hybrid(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """Return layers of the count and window of `config`, every fourth one full.

    llama.cpp's cohere2 assumes them where the file has no pattern.
    """
    window = max(layer.window or 0 for layer in config.layers)
    return hybrid_layers(len(config.layers), window=window)


def _why_not_cohere2(layers: tuple[LayerSpec, ...]) -> str:
    """Return what distinguishes a list of layers from Cohere2."""
    windows = sorted({layer.window for layer in layers if layer.window is not None})
    if len(windows) > 1:
        return f"its windows differ ({', '.join(map(str, windows))})"
    for index, layer in enumerate(layers):
        if layer.qk_norm:
            return f"layer {index} has QK-norm"
        if layer.window is not None and not layer.rope:
            return f"layer {index} has a window and no RoPE"
    full = next(index for index, layer in enumerate(layers) if layer.window is None and layer.rope)
    return f"layer {full} is full with RoPE beside layers that are not"


def _add_keys(writer: Any, config: ModelConfig, dtype: Dtype, *, name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPE[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(config.layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    windows = [layer.window for layer in config.layers if layer.window is not None]
    if windows:
        writer.add_sliding_window(windows[0])
        if config.layers != standard_hybrid(config):
            writer.add_sliding_window_pattern([layer.window is not None for layer in config.layers])


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_eot_token_id(tokenizer.end_of_turn_id)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _write_tensors(
    writer: Any, gguf: Any, weights: Mapping[str, Tensor], config: ModelConfig, dtype: Dtype, *, where: Path
) -> None:
    shapes = expected_shapes(config)
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[writer.arch]
    names = gguf.get_tensor_name_map(architecture, len(config.layers))
    types = {
        name: gguf.GGMLQuantizationType[_tensor_type(name, shape, dtype)] for name, shape in shapes.items()
    }
    for name, shape in shapes.items():
        block, size = gguf.GGML_QUANT_SIZES[types[name]]
        writer.add_tensor_info(
            names.get_name(name, try_suffixes=(".weight",)),
            shape,
            np.dtype(np.float32),
            int(np.prod(shape)) // block * size,
            raw_dtype=types[name],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in shapes:
        values = weights[name].to(torch.float32).numpy()
        _check_range(values, types[name].name, name, where)
        quantized = gguf.quantize(values, types[name])
        try:
            writer.write_tensor_data(quantized)
        except OSError as error:
            if error.errno is not None:
                raise
            # On a full disk numpy reports the bytes written, and no error number.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


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


def _tensor_type(name: str, shape: tuple[int, ...], dtype: Dtype) -> str:
    """Return ggml's type of a tensor. Norms stay float32: llama.cpp multiplies by them in float32."""
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return "F32"
    if dtype == "q8_0" and shape[-1] % _Q8_BLOCK:
        return "F16"
    return _TENSOR_TYPE[dtype]
