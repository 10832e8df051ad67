"""Export a model directory as one GGUF file for llama.cpp.

Keys, tensor names and what is done to tensors are those of llama.cpp's converter (its `conversion/*.py`).
Which models are exported, and as which architecture: `gguf_architectures`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from koine.errors import KoineWarning, UserError, did_you_mean
from koine.extras import import_extra
from koine.files import atomic_file, check_output_file, disk_errors, read_json
from koine.hub import model_name
from koine.model.attention.rope_frequencies import attention_factor
from koine.model.config import ModelConfig
from koine.model.formats.config_json import decoder_types, read_config, stored_names
from koine.model.formats.directory import open_weights
from koine.model.formats.gguf_architectures import (
    Architecture,
    any_window,
    architecture_of,
    context_of,
    full_layers_phrase,
    standard_windows,
)
from koine.model.formats.gguf_tensors import DTYPES, Dtype, file_tensors, write_tensors
from koine.model.formats.gguf_tokenizer import GgufTokenizer, read_gguf_tokenizer

# The value of `general.file_type` where most tensors have a type.
_FILE_TYPE: Final = {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}


def export_gguf(model: Path, out: Path, *, dtype: Dtype | None = None, overwrite: bool = False) -> None:
    """Write a model directory as a GGUF file, tensor by tensor; the file is complete or absent.

    Args:
        model: the directory.
        out: the file.
        dtype: of the matrices; None: as stored. Norms are always float32. Under `q8_0`, rows that do not
            divide into blocks of 32 are float16.
        overwrite: whether `out` may exist.

    Warns (`KoineWarning`) where only newer versions of llama.cpp read the file correctly, where it tokenizes
    some text differently, and where the file states a shorter context than the model.

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
    kind = dtype or _stored_dtype(weights, config)
    gguf = import_extra("gguf", extra="gguf", purpose="export to GGUF")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    check_output_file(out, overwrite=overwrite)
    for warning in _warnings(config, architecture, tokenizer):
        warnings.warn(KoineWarning(f"{model}: {warning}"), stacklevel=2)
    tensors = file_tensors(gguf, weights, config, architecture, kind)
    with atomic_file(out, overwrite=overwrite) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture.name)
        try:
            _add_keys(writer, config, architecture, kind, name=model_name(model))
            _add_experts(writer, config, architecture)
            _add_rope(writer, gguf, config)
            _add_windows(writer, config, architecture)
            _add_tokenizer(writer, tokenizer)
            write_tensors(writer, gguf, tensors, where=model)
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


def _stored_dtype(weights: Mapping[str, Tensor], config: ModelConfig) -> Dtype:
    norm = stored_names(config).top["norm.weight"]
    stored = str(weights[norm].dtype).removeprefix("torch.")
    return next((known for known in DTYPES if known == stored), "float32")


def _warnings(config: ModelConfig, architecture: Architecture, tokenizer: GgufTokenizer) -> Iterator[str]:
    """Yield what does not work in every version of llama.cpp, for every text or for every length."""
    context = context_of(config, architecture)
    if context < config.max_position_embeddings:
        yield (
            f"llama.cpp's {architecture.name} has no windows. The file states a context of {context} tokens, "
            "the model's window, up to which both compute the same; beyond it llama.cpp gives other answers"
        )
    if (
        any_window(config)
        and architecture.window_every is not None
        and not standard_windows(config, architecture)
    ):
        yield (
            f"not {full_layers_phrase(architecture)}. Recent versions of llama.cpp read such a pattern from "
            "the file (as of llama-cpp-python 0.3.36); older ones assume the usual one, and give wrong "
            "answers without a warning"
        )
    if tokenizer.scripts_with_other_digits:
        scripts = ", ".join(name.capitalize() for name in tokenizer.scripts_with_other_digits)
        yield (
            "llama.cpp splits digits by threes, and in this vocabulary that changes the tokens of numbers in "
            f"the digits of these scripts: {scripts}. The text itself stays the same"
        )
    if tokenizer.fewer_spaces:
        yield (
            "llama.cpp puts a space before every text and after every special token, and this tokenizer in "
            "fewer places: texts that begin with a space, and messages after a special token, may get other "
            "first tokens"
        )


def _add_keys(
    writer: Any, config: ModelConfig, architecture: Architecture, dtype: Dtype, *, name: str
) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPE[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_of(config, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(config.layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    if architecture.free_head_dim:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.norm == "rms_norm":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if architecture.scale == "factor":
        writer.add_logit_scale(config.logit_scale)
    if architecture.scale == "divisor":
        writer.add_logit_scale(1 / config.logit_scale)
        writer.add_embedding_scale(config.embedding_scale)
        writer.add_residual_scale(config.residual_scale)
        writer.add_attention_scale(config.score_scale)
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)


def _add_experts(writer: Any, config: ModelConfig, architecture: Architecture) -> None:
    mixture = config.mixture
    if mixture is None:
        return
    writer.add_expert_count(len(mixture.experts))
    writer.add_expert_used_count(mixture.top_k)
    if architecture.expert_width:
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if mixture.shared_expert:
        writer.add_expert_shared_feed_forward_length(config.dense_size)


def _add_rope(writer: Any, gguf: Any, config: ModelConfig) -> None:
    writer.add_rope_dimension_count(config.rotary_dim or config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    scaling, kinds = config.rope_scaling, gguf.RopeScalingType
    if scaling is None or scaling.kind == "llama3":
        # The factors of `llama3` are a tensor (`gguf_tensors`).
        writer.add_rope_scaling_type(kinds.NONE)
        return
    writer.add_rope_scaling_type(kinds.LINEAR if scaling.kind == "linear" else kinds.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        original = scaling.original_max_position_embeddings or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        # llama.cpp multiplies the vectors by this one and by YaRN's usual factor.
        usual = 0.1 * math.log(scaling.factor) + 1
        own = attention_factor(scaling) / usual
        if not math.isclose(own, 1):
            writer.add_rope_scaling_attn_factors(own)


def _add_windows(writer: Any, config: ModelConfig, architecture: Architecture) -> None:
    windowed = [layer for layer in config.layers if layer.window is not None]
    if architecture.window_every is None or not windowed:
        return
    writer.add_sliding_window(windowed[0].window)
    if not standard_windows(config, architecture):
        writer.add_sliding_window_pattern([layer.window is not None for layer in config.layers])
    if windowed[0].rope_theta is not None:
        writer.add_rope_freq_base_swa(windowed[0].rope_theta)


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
    writer.add_token_types(tokenizer.types)
    if tokenizer.merges is not None:
        writer.add_token_merges(tokenizer.merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_eot_token_id(tokenizer.end_of_turn_id)
    if tokenizer.unknown_id is not None:
        writer.add_unk_token_id(tokenizer.unknown_id)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(tokenizer.add_space_prefix)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
