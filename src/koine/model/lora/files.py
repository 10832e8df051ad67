"""The files of a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koine.errors import UserError
from koine.fields import Fields, short_repr
from koine.files import disk_errors, read_json_object, write_json
from koine.hub import hub_id
from koine.model.formats.checksum import KEY, NO_CHECKSUM, verify_checksums, write_checksum
from koine.model.formats.safetensors_header import read_header
from koine.model.formats.safetensors_writer import save_tensors
from koine.model.formats.tensor_digest import folder_digest
from koine.model.formats.weight_files import ADAPTER_CONFIG, open_safetensors
from koine.model.lora.config import LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
"""Prefix of `peft` before the names of the base's modules."""
BASE_DIGEST = "base_sha256"
"""Metadata of the weights' file: `folder_digest` of the base. `peft` ignores it."""

UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config",
    "megatron_config", "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
"""Fields of `adapter_config.json` that add something else than `B A`."""
PLAIN_INITS = ("gaussian", "orthogonal", "eva")
"""Initialisations of `peft` that leave the base's weights as they are."""

_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")


@dataclass(frozen=True)
class StoredAdapter:
    """A PEFT adapter in a folder, whose tensors are read on access.

    modules: by the base's name of a module, the scale of its `B A`.
    transposed: the base stores its matrices `[in, out]`.
    base_digest: of the base's weights, where Koine recorded it.
    base_name: the base as the file names it.
    """

    path: Path
    modules: Mapping[str, float]
    transposed: bool
    base_digest: str | None
    base_name: str | None
    _shapes: Mapping[str, tuple[int, ...]]
    _file: Any

    def shape(self, module: str) -> tuple[int, int, int]:
        """Return the rank, the inputs and the outputs of a module's adapter."""
        a, b = (self._shapes[f"{KEY_PREFIX}{module}.lora_{letter}.weight"] for letter in "AB")
        return a[0], a[1], b[0]

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """Return A `[rank, in]` and B `[out, rank]` in float32. Raises `UserError` where they hold NaN."""
        pair = []
        for letter in "AB":
            name = f"{KEY_PREFIX}{module}.lora_{letter}.weight"
            tensor = self._file.get_tensor(name).float()
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{name} holds NaN or infinity", where=self.path, hint="this adapter is broken"
                )
            pair.append(tensor)
        return pair[0], pair[1]


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    *,
    targets: Sequence[str],
    base: Path | None,
    transposed: bool,
) -> None:
    """Write the configuration and the weights, with their checksum and the digest of the base's."""
    folder.mkdir(parents=True, exist_ok=True)
    where = None if base is None else hub_id(base)
    name, revision = where or (None if base is None else str(base.resolve()), None)
    digest = None if base is None else folder_digest(base)
    content = {
        "base_model_name_or_path": name,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "peft_type": "LORA",
        "r": config.rank,
        "revision": revision,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": config.rslora,
    }
    metadata = {"format": "pt", KEY: NO_CHECKSUM, **({} if digest is None else {BASE_DIGEST: digest})}
    with disk_errors(folder):
        save_tensors(dict(sorted(tensors.items())), folder / ADAPTER_WEIGHTS, metadata=metadata)
        write_checksum(folder / ADAPTER_WEIGHTS)
        write_json(folder / ADAPTER_CONFIG, content)


def copy_adapter(source: Path, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Copy the two files of an adapter, its tensors in another dtype where one is given."""
    adapter = read_adapter(source)
    shutil.copyfile(source / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    if dtype is None:
        shutil.copyfile(source / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
        return
    tensors = {
        f"{KEY_PREFIX}{module}.lora_{letter}.weight": tensor.to(dtype)
        for module in adapter.modules
        for letter, tensor in zip("AB", adapter.pair(module), strict=True)
    }
    digest = {} if adapter.base_digest is None else {BASE_DIGEST: adapter.base_digest}
    save_tensors(
        dict(sorted(tensors.items())),
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt", KEY: NO_CHECKSUM, **digest},
    )
    write_checksum(folder / ADAPTER_WEIGHTS)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_adapter(folder: Path) -> StoredAdapter:
    """Open a LoRA adapter; its tensors are read later.

    Raises `UserError` where files are missing or damaged, where it is of another kind than LoRA, or where it
    has what we do not merge (DoRA, biases, whole modules): each is named.
    """
    where = folder / ADAPTER_CONFIG
    if not where.is_file():
        raise UserError(f"holds no {ADAPTER_CONFIG}", where=folder, hint="give the folder of a PEFT adapter")
    fields = Fields(read_json_object(where), where, hint_if_broken="it is no adapter of peft")
    _check_supported(fields)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        other = (
            "; adapter_model.bin must be converted first" if (folder / "adapter_model.bin").is_file() else ""
        )
        raise UserError(
            f"holds no {ADAPTER_WEIGHTS}{other}", where=folder, hint="copy the whole folder again"
        )
    file = open_safetensors(weights)
    shapes = {name: entry.shape for name, entry in read_header(weights).items()}
    verify_checksums([weights])
    base = fields.text("base_model_name_or_path", None)
    return StoredAdapter(
        path=folder,
        modules={module: _scale(module, fields, shapes) for module in _modules(shapes, weights)},
        transposed=fields.boolean("fan_in_fan_out", False) is True,
        base_digest=(file.metadata() or {}).get(BASE_DIGEST),
        base_name=base or None,
        _shapes=shapes,
        _file=file,
    )


def _check_supported(fields: Fields) -> None:
    kind = fields.text("peft_type")
    if kind != "LORA":
        raise UserError(
            f"is an adapter of the type {short_repr(kind)}", where=fields.where, hint="only LORA is merged"
        )
    for name in UNSUPPORTED:
        if fields.value.get(name):
            raise _unsupported(name, fields)
    if fields.value.get("bias", "none") != "none":
        raise _unsupported("bias", fields)
    init = fields.value.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        # PiSSA, OLoRA, CorDA, LoftQ: B A is added to what they left of the base.
        raise _unsupported("init_lora_weights", fields)


def _unsupported(name: str, fields: Fields) -> UserError:
    return UserError(
        f"the field '{name}' is {short_repr(fields.value[name])}, which Koine does not merge",
        where=fields.where,
        hint="merge it with peft: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload()",
    )


def _modules(shapes: Mapping[str, tuple[int, ...]], where: Path) -> list[str]:
    """Return the modules that have A and B; raise `UserError` for anything else in the file."""
    found: dict[str, set[str]] = {}
    for name in shapes:
        match = _TENSOR.fullmatch(name.removeprefix(KEY_PREFIX))
        if match is None or not name.startswith(KEY_PREFIX) or len(shapes[name]) != 2:
            raise UserError(
                f"{short_repr(name)} is no A or B of a linear layer", where=where, hint="only LoRA is merged"
            )
        found.setdefault(match["module"], set()).add(match["letter"])
    for module, letters in found.items():
        a, b = (shapes.get(f"{KEY_PREFIX}{module}.lora_{letter}.weight") for letter in "AB")
        if len(letters) != 2 or a is None or b is None:
            raise UserError(
                f"{module} has only lora_{letters.pop()}", where=where, hint="it is damaged; copy it again"
            )
        if a[0] != b[1]:
            raise UserError(
                f"A of {module} has rank {a[0]}, and B {b[1]}",
                where=where,
                hint="it is damaged; copy it again",
            )
    if not found:
        raise UserError("holds no adapter of any layer", where=where, hint="it is damaged; copy it again")
    return sorted(found)


def _scale(module: str, fields: Fields, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Return alpha over the rank of a module, or over its root; patterns are matched as in `peft`."""
    alpha = fields.number("lora_alpha", 8, low=0)
    patterns = fields.inner("alpha_pattern", None)
    for pattern in {} if patterns is None else patterns.value:
        if _matches(pattern, module, fields):
            alpha = patterns.number(pattern, low=0)
            break
    rank = shapes[f"{KEY_PREFIX}{module}.lora_A.weight"][0]
    return float(alpha) / (rank**0.5 if fields.boolean("use_rslora", False) else rank)


def _matches(pattern: str, module: str, fields: Fields) -> bool:
    """Return whether a key of `alpha_pattern` names a module."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        raise UserError(
            f"alpha_pattern has the key {short_repr(pattern)}",
            where=fields.where,
            hint="it must be a regular expression",
        ) from None
