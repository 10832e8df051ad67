"""Plan the import of a model folder: pickled weights or safetensors, names and configuration as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from koine.errors import UserError
from koine.files import read_json
from koine.model.formats.carried_files import carry_files
from koine.model.formats.importing.pickled import load_pickled
from koine.model.formats.importing.plan import ImportedTensor, ImportPlan
from koine.model.formats.importing.sources import FolderSource
from koine.model.formats.library_config import library_config, skeleton
from koine.model.formats.model_card import ModelCard, Parent
from koine.model.formats.opening import check_model_class, read_model_config
from koine.model.formats.safetensors_stream import NAMES, Checkpoint
from koine.model.formats.weight_files import INDEX, SINGLE, weight_files

HEAD: Final = "lm_head.weight"
_EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_NOT_WEIGHTS: Final = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias")
"""Endings of buffers that old files hold and no class loads."""


class _Weights:
    """Stored tensors by name, read by rows."""

    def __init__(self, folder: Path) -> None:
        files = weight_files(folder, pickled=True)
        self.kind = "safetensors" if files[0].suffix == ".safetensors" else "pickled"
        self.close: Callable[[], None] = lambda: None
        if self.kind == "safetensors":
            checkpoint = Checkpoint(folder)
            if len(files) > 1 or files[0].name != SINGLE:
                _check_shards(folder, files, set(checkpoint))
            self.layout = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.items()}
            self.read: Callable[[str, int, int], Tensor] = checkpoint.read
            self.close = checkpoint.close
        else:
            tensors = load_pickled(folder, files)
            self.layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            self.read = lambda name, start, stop: (
                tensors[name][start:stop] if tensors[name].dim() else tensors[name]
            )
        for name, (dtype, _) in self.layout.items():
            if dtype not in NAMES:
                raise UserError(
                    f"{name} is of {dtype}",
                    where=folder,
                    hint=f"these are imported: {', '.join(NAMES.values())}",
                )


def _check_shards(folder: Path, files: list[Path], found: set[str]) -> None:
    """Raise `UserError` where shards hold or are more than the index of safetensors names."""
    index = folder / INDEX
    if not index.is_file():
        return
    more = sorted(found - read_json(index)["weight_map"].keys())
    if more:
        raise UserError(
            f"does not name {more[0]}, which a shard holds", where=index, hint="copy the whole folder again"
        )
    beside = {path for path in folder.glob("model-*-of-*.safetensors") if path.is_file()} - set(files)
    if beside:
        raise UserError(
            f"does not name the shard {min(beside).name}",
            where=index,
            hint="remove it, or copy the folder again",
        )


def plan_folder(source: FolderSource, dtype: torch.dtype | None) -> ImportPlan:
    """Plan the import of a folder.

    dtype: of all floating-point tensors; None: as stored.

    Raises `UserError` for code in the configuration or the weights, damaged or missing files, tensors that
    the class needs and the folder lacks, and tied weights that differ.
    """
    folder = source.path
    config = read_model_config(folder)
    _check_class(config, folder)
    weights = _Weights(folder)
    try:
        layout = {name: one for name, one in weights.layout.items() if not name.endswith(_NOT_WEIGHTS)}
        tied = _drop_tied_head(layout, config, weights, folder)
        _check_names(layout, config, folder, tied=tied)
    except BaseException:
        weights.close()
        raise

    def tensor(name: str) -> ImportedTensor:
        stored, shape = layout[name]
        wanted = dtype if dtype is not None and stored.is_floating_point else stored
        return ImportedTensor(
            name=name, shape=shape, dtype=wanted, read=lambda start, stop: weights.read(name, start, stop)
        )

    def carry(out: Path) -> None:
        carry_files(folder, out, warn=False)

    content = dict(config)
    if dtype is not None:
        content.pop("torch_dtype", None)
        content["dtype"] = str(dtype).removeprefix("torch.")
    content.pop("transformers_weights", None)
    counts: dict[str, dict[str, int]] = {}
    for kind, shape in layout.values():
        one = counts.setdefault(NAMES[kind], {"tensors": 0, "bytes": 0})
        one["tensors"] += 1
        one["bytes"] += torch.Size(shape).numel() * kind.itemsize
    architectures = config.get("architectures")
    return ImportPlan(
        source=source.name,
        where=folder,
        config=content,
        tensors=tuple(tensor(name) for name in layout),
        texts={},
        carry=carry,
        card=ModelCard(
            title=folder.resolve().name if source.name == str(folder) else source.name,
            summary=f"The weights of `{source.name}` ({weights.kind}), written as safetensors.",
            parents=(Parent(path=folder, role="source"),),
            parameters={"source": source.name, "dtype": content.get("dtype")},
        ),
        facts={
            "architecture": config.get("model_type"),
            "class": architectures[0] if isinstance(architectures, list) and architectures else None,
            "quantisation": counts,
            "vocabulary": {"model": None, "tokens": None, "rows": config.get("vocab_size")},
            "chat_template": (folder / "chat_template.jinja").is_file(),
        },
        reads=(folder,),
        close=weights.close,
    )


def _check_class(config: dict[str, Any], folder: Path) -> None:
    """Raise `UserError` for a model that needs code of its own, or that `transformers` does not know."""
    from koine.extras import import_extra

    transformers = import_extra("transformers", extra="hf", purpose="check a model's configuration")
    if isinstance(config.get("auto_map"), dict) and config["auto_map"]:
        # The class that the weights were written for, where `transformers` has one too.
        known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
        if config.get("model_type") not in known:
            check_model_class(config, folder, transformers)
    check_model_class(config, folder, transformers)


def _drop_tied_head(
    layout: dict[str, Any], config: Mapping[str, Any], weights: _Weights, folder: Path
) -> bool:
    """Leave out a head that is the embedding stored again; return whether the model is tied.

    Raises `UserError` where the configuration ties the two and the stored ones differ.
    """
    parsed = library_config(config, where=folder / "config.json")
    tied = bool(getattr(parsed, "tie_word_embeddings", config.get("tie_word_embeddings", False)))
    embedding = next((name for name in layout if name.endswith(_EMBEDDINGS)), None)
    if not tied or HEAD not in layout or embedding is None:
        return tied
    same = layout[HEAD] == layout[embedding]
    rows = layout[HEAD][1][0]
    for start in range(0, rows if same else 0, 4096):
        stop = min(rows, start + 4096)
        same = same and torch.equal(weights.read(HEAD, start, stop), weights.read(embedding, start, stop))
    if not same:
        raise UserError(
            f"{HEAD} is not {embedding}, and config.json ties them",
            where=folder,
            hint="set tie_word_embeddings to false, if the head was trained apart",
        )
    del layout[HEAD]
    return tied


def _check_names(layout: Mapping[str, Any], config: Mapping[str, Any], folder: Path, *, tied: bool) -> None:
    """Raise `UserError` for tensors that the class needs and the folder lacks, or has in another shape.

    Experts are left out: `transformers` stacks them when it loads, so the names of its class are others.
    """
    expected = skeleton(config, where=folder / "config.json")
    if expected is None:
        return
    prefix = f"{expected.prefix}."
    stored = {name.removeprefix(prefix): shape for name, (_, shape) in layout.items()}
    missing = []
    for name, shape in expected.shapes.items():
        found = stored.get(name.removeprefix(prefix))
        if found is None:
            if "expert" not in name and not (tied and name in expected.vocabulary):
                missing.append(name)
        elif found != shape:
            raise UserError(
                f"{name} has shape {list(found)}, config.json says {list(shape)}",
                where=folder,
                hint="config.json and the weights do not belong together",
            )
    if missing:
        raise UserError(
            f"the weights lack {len(missing)} tensors ({', '.join(missing[:3])})",
            where=folder,
            hint="config.json and the weights do not belong together",
        )
