"""Identity of a training: settings, data, model, first weights, objective. Equal identity, equal result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from koine.data.inspect_step import without_paths
from koine.data.mixture_json import with_current_names
from koine.errors import UserError
from koine.files import sha256_file
from koine.model.formats.tensor_digest import tensor_digest, tensors_digest
from koine.model.language_model import LanguageModel
from koine.train.settings import RESULT, TrainSettings

if TYPE_CHECKING:
    from koine.data.batch import StepBatches
    from koine.train.objectives import Objective

SHA256 = "sha256:"
"""Prefix of a digest over all bytes; those recorded before version 0.1.0 have none."""
_OBJECTIVES_BEFORE = {
    "language_modelling": "LanguageModelling",
    "supervised_fine_tuning": "SupervisedFineTuning",
}
"""Objectives as they were recorded before version 0.1.0: the name of a function."""
_CALLS = {
    "objective": "__call__(model, batch)",
    "stop rule": "__call__(evaluations)",
    "evaluation": "__call__(model, steps_done)",
}


def training_identity(
    model: LanguageModel,
    objective: Objective,
    data: StepBatches,
    settings: TrainSettings,
    tokenizer: Path | None,
) -> dict[str, Any]:
    """Return all that determines the result up to rounding, as JSON values to compare field by field."""
    sources = {
        source.name: sha256_file(Path(source.path) / "manifest.json")
        for phase in data.mixture.phases
        for source in phase.all_sources
    }
    value = {
        "objective": objective_identity(objective),
        "settings": settings.fields_that_change(RESULT),
        "mixture": without_paths(data.mixture.to_json()),
        "sources": sources,
        "model": model.describe(),
        **_weights_identity(model),
        "tokenizer": None if tokenizer is None else sha256_file(Path(tokenizer) / "tokenizer.json"),
    }
    return json.loads(json.dumps(value, default=str))  # type: ignore[no-any-return]


def _weights_identity(model: LanguageModel) -> dict[str, Any]:
    """Return the digest of the first weights; with an adapter its settings, and the base's digest apart."""
    adapter = getattr(model, "adapter", None)
    if adapter is None:
        return {"first_weights": weights_digest(model)}
    trained = set(adapter.parameters)
    state = model.state_dict()
    own = {name: tensor for name, tensor in state.items() if name in trained}
    base = {name: tensor for name, tensor in state.items() if name not in trained}
    return {
        "first_weights": SHA256 + tensors_digest(own),
        "adapter": {**adapter.config.to_json(), "modules": list(adapter.modules)},
        "base_weights": SHA256 + tensors_digest(base),
    }


def weights_digest(model: LanguageModel | nn.Module) -> str:
    """Return a sha256 over the name, the shape and all bytes of every weight and buffer.

    Floats narrower than float32 are widened to it first: equal values have an equal digest.
    """
    return SHA256 + tensors_digest(model.state_dict())


def objective_identity(objective: Objective | Any, *, what: str = "objective") -> dict[str, Any]:
    """Return an objective's class and its `identity()`, JSON values.

    Raises `UserError` for an objective without `identity`, and for one whose `identity` leaves out a field. A
    plain function is refused: what it captures or is bound to cannot be compared with a later run.

    what: what it is, for the messages: a stop rule and an evaluation have identities too.
    """
    name = getattr(objective, "__qualname__", type(objective).__qualname__)
    identity = getattr(objective, "identity", None)
    if identity is None or isinstance(objective, type):
        raise UserError(
            f"the {what} {name} has no identity()",
            hint=f"make it a frozen dataclass with {_CALLS[what]} and identity(), "
            "as koine.train.LanguageModelling is, and pass an instance",
        )
    value = identity()
    try:
        value = json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the identity of the {what} {name} cannot be written as JSON ({error})",
            hint="use koine.train.arguments_identity(self)",
        ) from None
    fields = getattr(objective, "__dataclass_fields__", {}).values()
    missing = [field.name for field in fields if field.compare and field.name not in value]
    if missing:
        raise UserError(
            f"the identity of the {what} {name} leaves out {', '.join(missing)}",
            hint="use koine.train.arguments_identity(self), or declare the field with compare=False",
        )
    return {"class": name, **value}


def arguments_identity(objective: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON values, for `Objective.identity`.

    A model is its configuration and the sha256 of its weights; a tensor, a file or a folder is its sha256.
    Fields declared with `compare=False` are left out. Raises `UserError` for a value of any other type.
    """
    return {
        field.name: _argument_json(
            getattr(objective, field.name), f"{type(objective).__qualname__}.{field.name}"
        )
        for field in dataclasses.fields(objective)
        if field.compare
    }


def _argument_json(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, nn.Module):
        describe: Any = getattr(value, "describe", None)
        config = str(value) if describe is None else describe()
        return {"config": json.loads(json.dumps(config, default=str)), "weights": weights_digest(value)}
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "values": SHA256 + tensor_digest(value)}
    if isinstance(value, Path):
        return SHA256 + _path_digest(value)
    if isinstance(value, Mapping):
        return {str(key): _argument_json(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_argument_json(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return arguments_identity(value)
    raise UserError(
        f"{name} is a {type(value).__name__}, of which no identity is known",
        hint="write identity() by hand, or declare the field with compare=False",
    )


def _path_digest(path: Path) -> str:
    if not path.is_dir():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {sha256_file(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_same_training(
    recorded: dict[str, Any], identity: dict[str, Any], model: LanguageModel, where: Path
) -> None:
    """Raise `UserError` with every field in which a folder's training differs from the one asked for.

    Args:
        recorded: identity of the folder's training, of this version or the one before.
        identity: identity of the training asked for.
        model: its model, with the first weights.
        where: the folder, for the message.
    """
    bases = recorded.get("base_weights"), identity.get("base_weights")
    if None not in bases and bases[0] != bases[1]:
        raise UserError(
            f"holds an adapter of another base (sha256 {str(bases[0])[7:19]}..., and that of the model given "
            f"is {str(bases[1])[7:19]}...)",
            where=where,
            hint="give the model that it was trained on, or choose another --out",
        )
    lines = differences(_with_current_fields(recorded, identity, model), identity)
    if lines:
        raise UserError(
            "this folder holds a training with other settings: " + "; ".join(lines),
            where=where,
            hint="run the same command again to resume, or choose another --out",
        )


def _with_current_fields(
    recorded: dict[str, Any], identity: dict[str, Any], model: LanguageModel
) -> dict[str, Any]:
    """Return a recorded identity with fields from before version 0.1.0 in today's form if they agree."""
    current = {**recorded, "mixture": with_current_names(recorded.get("mixture"))}
    objective = recorded.get("objective") or identity["objective"]
    if (
        isinstance(objective, str)
        and _OBJECTIVES_BEFORE.get(objective, objective) == identity["objective"]["class"]
    ):
        objective = identity["objective"]
    current["objective"] = objective
    weights = recorded.get("first_weights")
    if isinstance(weights, str) and not weights.startswith(SHA256) and weights == _sampled_digest(model):
        current["first_weights"] = identity["first_weights"]
    return current


def _sampled_digest(model: LanguageModel) -> str:
    """Return the digest recorded before version 0.1.0: names, shapes, some 4,096 values of each tensor."""
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 4096)].to(torch.float32).cpu()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `field: before -> now` for every leaf that differs."""
    lines: list[str] = []
    for key in sorted(before.keys() | now.keys(), key=str):
        old, new = before.get(key), now.get(key)
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            old, new = dict(enumerate(old)), dict(enumerate(new))
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines
