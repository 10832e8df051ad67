"""Files of a reward model: those of the causal LM without its head, with `score.weight` `[1, hidden]`.

The format is that of `...ForSequenceClassification` in `transformers` with one label. The class scores a row at
its last token that is not `pad_token_id`. So padding must be a token that no conversation ends with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koine.errors import UserError
from koine.files import read_json, read_json_object, write_json
from koine.model.config import ModelConfig
from koine.model.formats.config_json import stored_names
from koine.model.formats.directory import (
    expected_shapes,
    from_transformers,
    open_weights,
    save_configs,
    save_stored,
    to_transformers,
)
from koine.tokenizer import Tokenizer, load_tokenizer

SCORE = "score.weight"
"""Name of the head's matrix, `[1, hidden]`, in a module and in a file."""
LANGUAGE, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
_OTHER_NAMES = {"Gemma3ForCausalLM": "Gemma3TextForSequenceClassification"}
_SAMPLE = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "4 + 4?"},
    {"role": "assistant", "content": "8"},
]


def is_reward_model(folder: Path) -> bool:
    """Return whether a folder's `config.json` names a class of sequence classification."""
    value = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    names = value.get("architectures") if isinstance(value, dict) else None
    return isinstance(names, list) and any(str(name).endswith(CLASSIFIER) for name in names)


def check_reward_model(folder: Path) -> None:
    """Raise `UserError` for a folder that holds no reward model, or a classifier of several labels."""
    if not is_reward_model(folder):
        raise UserError(
            "holds no reward model: config.json names no class ...ForSequenceClassification",
            where=folder,
            hint="train one: koine align reward",
        )
    labels = read_json_object(folder / "config.json").get("id2label")
    # The library leaves the field out where there are two, its default.
    count = len(labels) if isinstance(labels, dict) else 2
    if count != 1:
        raise UserError(
            f"is a classifier of {count} labels, and a reward model has one",
            where=folder / "config.json",
            hint="give a reward model",
        )


def reward_fields(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a reward model's `config.json`, from that of its causal LM."""
    names = [
        _OTHER_NAMES.get(str(name), str(name).replace(LANGUAGE, CLASSIFIER))
        for name in value.get("architectures") or []
    ]
    return {**value, "architectures": names, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def padding_token(tokenizer: Tokenizer) -> int:
    """Return the id to pad with: the tokenizer's own where no conversation ends with it.

    Else the first special token that the chat template does not write. Raises `UserError` without one.
    """
    if tokenizer.chat_template is None:
        return tokenizer.pad_id
    ids, counted = tokenizer.encode_messages(_SAMPLE)
    end = max(index for index, counts in enumerate(counted) if counts)
    if tokenizer.pad_id != ids[end]:
        return tokenizer.pad_id
    for token_id in tokenizer.special_tokens.values():
        if token_id not in ids:
            return token_id
    raise UserError(
        "conversations end with the padding token, and no special token is left to pad with",
        hint="add a padding token to the tokenizer",
    )


def save_reward_state(
    state: Mapping[str, Tensor],
    score: Tensor,
    config: ModelConfig,
    folder: Path,
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    eos_ids: Collection[int] = (),
) -> None:
    """Write a reward model of our decoder.

    Args:
        state: of the decoder, without its output matrix.
        score: the head, `[1, hidden]`.
        config: of the decoder.
        folder: made if needed.
        tokenizer: a folder whose tokenizer's files are copied.
        dtype: of the tensors; None: their own.
        eos_ids: besides the configuration's.
    """
    tensors = to_transformers({name: tensor.detach().cpu() for name, tensor in state.items()}, config)
    tensors[SCORE] = score.detach().cpu()
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    config = _padded(config, tokenizer)
    save_stored(tensors, config, folder, tokenizer=tokenizer, eos_ids=eos_ids)
    finish_reward_folder(folder)


def save_reward_configs(
    config: ModelConfig, folder: Path, *, tokenizer: Path | None = None, eos_ids: Collection[int] = ()
) -> None:
    """Write the files of a reward model besides its weights, as of float32 weights."""
    save_configs(_padded(config, tokenizer), folder, dtype="float32", tokenizer=tokenizer, eos_ids=eos_ids)
    finish_reward_folder(folder)


def _padded(config: ModelConfig, tokenizer: Path | None) -> ModelConfig:
    if tokenizer is None:
        return config
    return replace(config, pad_token_id=padding_token(load_tokenizer(tokenizer)))


def finish_reward_folder(folder: Path) -> None:
    """Make the configuration that of a reward model, and the tokenizer pad with its padding."""
    path = folder / "config.json"
    write_json(path, reward_fields(read_json_object(path)))
    set_padding(folder)


def set_padding(folder: Path) -> None:
    """Name the padding token in a folder's tokenizer files, where it is not their own."""
    if not (folder / "tokenizer.json").is_file():
        return
    tokenizer = load_tokenizer(folder)
    chosen = padding_token(tokenizer)
    if chosen == tokenizer.pad_id:
        return
    token = next(text for text, token_id in tokenizer.special_tokens.items() if token_id == chosen)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.is_file():
            write_json(path, {**read_json_object(path), "pad_token": token})


def read_reward_state(folder: Path, config: ModelConfig) -> tuple[dict[str, Tensor], Tensor]:
    """Return the state of our decoder without its output matrix, and the head, `[1, hidden]`, as stored.

    Raises `UserError` where a tensor is missing, left over, of another shape or holds NaN, or a file is
    damaged.
    """
    shapes = {**expected_shapes(config), SCORE: (1, config.hidden_size)}
    shapes.pop(stored_names(config).top["head.weight"], None)
    weights = open_weights(folder, config, expected=shapes)
    state = from_transformers(weights, config, head=False)
    score = weights[SCORE]
    for name, tensor in {**state, SCORE: score}.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{name} holds NaN or infinity",
                where=folder,
                hint="this checkpoint is broken; use an earlier one",
            )
    return state, score
