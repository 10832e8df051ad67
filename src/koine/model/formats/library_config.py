"""Ask the installed `transformers` for the class of a `config.json`, its fields, and the model's tensors.

The model is built on the meta device: no weights are loaded and no code of a model's folder runs. Without the
extra `[hf]` the answers are None.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from koine.errors import UserError, first_line

VOCABULARY_FIELD = "vocab_size"
"""Fields of a configuration with names that begin so are numbers of embedding rows."""


def library_config(value: Mapping[str, Any], *, where: Path) -> Any | None:
    """Build the configuration of `transformers` with this content.

    None where the library is not installed or does not know the `model_type`. Raises `UserError` where the
    class rejects a field.
    """
    kind = value.get("model_type")
    if not isinstance(kind, str):
        return None
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING
    except ImportError:
        return None
    if kind not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[kind].from_dict(_with_numbers(dict(value)))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        text = " ".join(str(error).split()) or first_line(error)
        raise UserError(
            f"is no configuration of a {kind} ({text[:200]})", where=where, hint="correct this field"
        ) from None


def _with_numbers(value: Any) -> Any:
    """Convert the library's spelling of infinity and NaN, `{"__float__": "Infinity"}`, in a copy."""
    if isinstance(value, list):
        return [_with_numbers(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {name: _with_numbers(one) for name, one in value.items()}


def declared_fields(config: Any) -> dict[str, Any]:
    """Return the fields that a configuration's class declares; nested configurations as dictionaries."""
    names = [field.name for field in dataclasses.fields(config)]
    names += [
        name for name in inspect.signature(type(config).__init__).parameters if name not in ("self", "kwargs")
    ]
    # The library reads it for every model, declared by its class or not.
    names.append("tie_word_embeddings")
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(config, name, None)
        found[name] = declared_fields(value) if _is_config(value) else value
    return found


def _is_config(value: Any) -> bool:
    return hasattr(value, "model_type") and dataclasses.is_dataclass(value)


@dataclass(frozen=True)
class Skeleton:
    """The tensors of a model of `transformers`, without their bytes.

    shapes: of each tensor by name.
    vocabulary: of each tensor that grows with the vocabulary, the dimension that grows.
    ignored: patterns of names that the class expects in old files and does not load.
    prefix: of the tensors of the base model below the head.
    """

    shapes: Mapping[str, tuple[int, ...]]
    vocabulary: Mapping[str, int]
    ignored: tuple[str, ...]
    prefix: str


def skeleton(value: Mapping[str, Any], *, where: Path) -> Skeleton | None:
    """Build the model of a `config.json` on the meta device, and again with one token more.

    The tensors that change their shape have a row per token; their names do not matter. None where the
    library cannot build it.
    """
    config = library_config(value, where=where)
    if config is None:
        return None
    for one, build in _ways_to_build(config):
        before = _built(build, one)
        if before is None:
            continue
        shapes = _shapes(before)
        vocabulary: dict[str, int] = {}
        for holder, name in _vocabulary_fields(one):
            vocabulary |= _growing(build, one, shapes, holder, name)
        if vocabulary:
            ignored = tuple(getattr(before, "_keys_to_ignore_on_load_unexpected", None) or ())
            return Skeleton(shapes, vocabulary, ignored, str(getattr(before, "base_model_prefix", "")))
    return None


def parameters_described(value: Mapping[str, Any], *, where: Path) -> int | None:
    """Count the parameters of the causal LM of a `config.json`, shared ones once.

    None where the library cannot build it.
    """
    import transformers

    config = library_config(value, where=where)
    if config is None:
        return None
    model = _built(transformers.AutoModelForCausalLM.from_config, config)
    return None if model is None else sum(parameter.numel() for parameter in model.parameters())


def _ways_to_build(config: Any) -> Iterator[tuple[Any, Any]]:
    """Yield configurations, each with a class to build: the class of the file first, then the usual ones."""
    import transformers

    for name in getattr(config, "architectures", None) or []:
        named = getattr(transformers, str(name), None)
        if inspect.isclass(named) and issubclass(named, transformers.PreTrainedModel):
            yield config, named
    causal, pairs = transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM
    automatic = (
        *((pairs, causal) if getattr(config, "is_encoder_decoder", False) else (causal, pairs)),
        transformers.AutoModelForMaskedLM, transformers.AutoModelForImageTextToText, transformers.AutoModel,
    )  # fmt: skip
    # The text model alone, where another modality needs a package that is missing.
    text = config.get_text_config()
    for one in (config,) if text is config else (config, text):
        for known in automatic:
            if type(one) in known._model_mapping:
                yield one, known.from_config


def _built(build: Any, config: Any) -> Any | None:
    """Build a model on the meta device; None where the configuration or a missing package prevents it."""
    try:
        with torch.device("meta"):
            return build(copy.deepcopy(config))
    except (
        ImportError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError,
        ArithmeticError, AssertionError,
    ):  # fmt: skip
        return None


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _vocabulary_fields(config: Any) -> list[tuple[str, str]]:
    """Return the fields with numbers of tokens.

    `("", name)` at the top, `("text", name)` in the text model's configuration.
    """
    found = []
    for holder in ("", "text"):
        one = _held(config, holder)
        if holder and one is config:
            continue
        for name in [*declared_fields(one), *getattr(one, "attribute_map", {})]:
            if name.startswith(VOCABULARY_FIELD) and isinstance(getattr(one, name, None), int):
                found.append((holder, name))
    return found


def _held(config: Any, holder: str) -> Any:
    return config.get_text_config() if holder else config


def _growing(
    build: Any, config: Any, shapes: Mapping[str, tuple[int, ...]], holder: str, name: str
) -> dict[str, int]:
    """Return the tensors that grow with a field, and the dimension that does.

    Where token counts are rounded up, one more may change nothing, and 1,024 more do.
    """
    for more in (1, 1024):
        larger = copy.deepcopy(config)
        setattr(_held(larger, holder), name, getattr(_held(larger, holder), name) + more)
        model = _built(build, larger)
        if model is None:
            continue
        found = {}
        for tensor, shape in _shapes(model).items():
            sizes = zip(shape, shapes.get(tensor, shape), strict=True)
            changed = [axis for axis, (larger_size, size) in enumerate(sizes) if larger_size != size]
            if changed:
                found[tensor] = changed[0]
        if found:
            return found
    return {}
