"""Check a model folder before and after `transformers` opens it; every fault is an error of one line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from koine.errors import UserError
from koine.files import read_json
from koine.model.formats.checksum import verify_checksums
from koine.model.formats.library_config import parameters_described
from koine.model.formats.weight_files import check_adapter, open_safetensors, stored_bytes, weight_files

MESSAGE_LENGTH = 240
"""Most characters of a library's message that are shown."""

ALLOWED_EXTRA_PARAMETERS = 2**24
"""More parameters than the weight files can hold are allowed up to this number: they cost little memory."""


def one_line(error: BaseException) -> str:
    """Return a library's exception on one line, shortened where it is long; its type where it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError | AttributeError | TypeError | ZeroDivisionError | AssertionError):
        text = f"{type(error).__name__}: {text}" if str(error).strip() else text
    return text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 1] + "…"


@contextmanager
def library_errors(path: Path, what: str, hint: str) -> Iterator[None]:
    """Turn a library's exceptions about a folder into a `UserError` of one line.

    Errors of memory pass unchanged.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a folder can be wrong in more ways than a library has exceptions for
        raise UserError(f"{what} ({one_line(error)})", where=path, hint=hint) from error


def read_model_config(path: Path) -> dict[str, Any]:
    """Read a model folder's config.json.

    Raises `UserError` for a folder that is no model: an adapter, a training checkpoint, no valid config.json.
    """
    check_adapter(path)
    if not (path / "config.json").exists():
        raise UserError("holds no config.json", where=path, hint="give the folder of a model")
    if (path / "checkpoint.json").exists():
        raise UserError(
            "is a checkpoint of a training",
            where=path,
            hint=f"make a model of it: koine model export {path} --format safetensors --out MODEL",
        )
    value = read_json(path / "config.json")
    if not isinstance(value, dict):
        raise UserError(
            "is not a JSON object", where=path / "config.json", hint="it is no model's configuration"
        )
    return value


def check_language_model(value: dict[str, Any], path: Path) -> None:
    """Raise `UserError` for a configuration of a reward model, or of another sequence classifier."""
    names = value.get("architectures")
    names = [str(name) for name in names] if isinstance(names, list) else []
    if names and all(name.endswith("ForSequenceClassification") for name in names):
        raise UserError(
            f"is a reward model ({names[0]}), which scores text and writes none",
            where=path,
            hint="give a language model; `koine align reward --model` takes a reward model too",
        )


def check_tokenizer_hash(path: Path) -> None:
    """Raise `UserError` where a trained model's tokenizer is not the one that `training.json` records."""
    record, tokenizer = path / "training.json", path / "tokenizer.json"
    if not (record.is_file() and tokenizer.is_file()):
        return
    about = read_json(record)
    what = about.get("identity") if isinstance(about, dict) else None
    wanted = what.get("tokenizer") if isinstance(what, dict) else None
    if isinstance(wanted, str) and wanted != hashlib.sha256(tokenizer.read_bytes()).hexdigest():
        raise UserError(
            "is not the tokenizer that the model was trained with (training.json has its sha256)",
            where=tokenizer,
            hint="put that one back, or move the model to another: koine tokenizer adapt",
        )


def checked_weight_files(path: Path) -> list[Path]:
    """Return the weight files that `transformers` chooses, after checking that they are whole."""
    files = weight_files(path, pickled=True)
    for file in files:
        if file.suffix == ".safetensors":
            open_safetensors(file)
    verify_checksums(files)
    return files


def stored_dtype(files: list[Path]) -> torch.dtype | None:
    """Return the dtype of most stored bytes; None for pickled or quantised weights."""
    if not files or files[0].suffix != ".safetensors":
        return None
    found = stored_bytes(files)
    return max(found, key=lambda dtype: found[dtype]) if found else None


def check_model_class(value: dict[str, Any], path: Path, transformers: Any) -> None:
    """Check that a configuration is a causal language model of the installed `transformers`.

    Custom code (`auto_map`, kernels from a hub) is named and never run.

    Raises:
        UserError: the class is unknown or no causal LM, or a field names code or an unknown dtype.
    """
    where = path / "config.json"
    kind = value.get("model_type")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if not isinstance(kind, str):
        raise UserError(
            "names no model_type" if kind is None else f"the field 'model_type' is {kind!r}",
            where=where,
            hint="it must be a name that transformers knows",
        )
    causal_classes = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    causal = kind in known and known[kind] in causal_classes
    own = value.get("auto_map")
    code = own if isinstance(own, dict) else {}
    if code and not causal:
        names = [str(name[0] if isinstance(name, list) else name) for name in code.values() if name]
        raise UserError(
            f"needs Python code that comes with it ({', '.join(sorted(names)[:2])}), which is never run",
            where=path,
            hint="convert it to a class of transformers",
        )
    if kind not in known:
        raise UserError(
            f"the model_type '{kind}' is unknown to transformers {transformers.__version__}",
            where=where,
            hint="check its spelling, or upgrade transformers",
        )
    if not causal:
        raise UserError(
            f"a '{kind}' is no causal language model in transformers {transformers.__version__}",
            where=where,
            hint="give a model that writes text",
        )
    if value.get("is_encoder_decoder") is True:
        raise UserError(
            f"a '{kind}' of encoder and decoder is no causal language model",
            where=where,
            hint="give a decoder-only model",
        )
    check_fields(value, where)


def check_fields(value: dict[str, Any], where: Path) -> None:
    """Raise `UserError` for fields that name code to fetch, or an unknown dtype."""
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(value.get(name) or ""):
            raise UserError(
                f"the field '{name}' names code to fetch ({value[name]}), which is never run",
                where=where,
                hint="remove the field",
            )
    for name in ("dtype", "torch_dtype"):
        given = value.get(name)
        if isinstance(given, dict) or given is None:
            continue
        known_dtype = isinstance(given, str) and isinstance(
            getattr(torch, given.removeprefix("torch."), None), torch.dtype
        )
        if not known_dtype and given != "auto":
            raise UserError(
                f"the field '{name}' is {given!r}",
                where=where,
                hint="it must be float32, bfloat16 or float16",
            )


def check_described_size(path: Path, value: dict[str, Any], files: list[Path]) -> None:
    """Raise `UserError` where config.json describes a far larger model than the weight files hold.

    Checked before memory is allocated for the model.
    """
    with library_errors(path, "is no configuration of a model", "check config.json"):
        described = parameters_described(value, where=path / "config.json")
    # A stored number has a byte at least. In a small model, missing tensors are reported after opening.
    stored = sum(file.stat().st_size for file in files)
    if described is not None and described > max(stored, ALLOWED_EXTRA_PARAMETERS):
        raise UserError(
            f"describes {described:,} numbers, and the weight files have {stored:,} bytes",
            where=path / "config.json",
            hint="config.json and the weights do not belong together",
        )


def check_loaded_keys(path: Path, loaded: dict[str, Any]) -> None:
    """Raise `UserError` where tensors are missing or mismatched, which would be random."""
    hint = "config.json and the weights do not belong together"
    if loaded.get("mismatched_keys"):
        name, *shapes = min(loaded["mismatched_keys"])
        found, wanted = (list(shape) for shape in shapes)
        raise UserError(
            f"{name} has shape {found}, config.json says {wanted}",
            where=path,
            hint=hint,
        )
    missing = sorted(loaded.get("missing_keys") or ())
    if missing:
        raise UserError(
            f"the weights lack {len(missing)} tensors ({', '.join(missing[:3])}), which would be random",
            where=path,
            hint=hint,
        )
