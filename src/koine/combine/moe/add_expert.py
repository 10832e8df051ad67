"""Add an expert to a mixture, or remove one, without starting again (arXiv 2408.15901, section 3).

    phi = (1 - lambda) phi_mixture + lambda phi_new,   lambda = 1 / (n + 1)

for all weights that belong to no expert. A Nexus router scores the new expert by its domain's embedding. A
linear router cannot, and is reset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koine.combine.compatibility import MIN_RELATED_COSINE
from koine.combine.moe.branches import (
    Branch,
    check_no_model,
    check_other_shapes,
    check_other_tokenizer,
    open_branch,
)
from koine.combine.moe.domain_embeddings import domain_embedding, load_encoder
from koine.combine.moe.planned_tensors import PlannedTensor, copied, given
from koine.combine.moe.upcycle import (
    DOMAINS,
    expert_name,
    is_expert_tensor,
    is_source,
    new_routers,
    read_record,
    save_planned,
    source_of,
    write_record,
)
from koine.data.drawn import carry_drawn
from koine.errors import UserError, did_you_mean
from koine.model.config import MixtureConfig, ModelConfig
from koine.model.formats.carried_files import carry_files
from koine.model.formats.config_json import read_config
from koine.model.formats.directory import open_canonical
from koine.model.formats.model_card import ModelCard, Parent, write_model_card
from koine.model.formats.stored_tensors import CanonicalTensors, layer_of

_EXPERT = re.compile(r"^(model\.layers\.\d+\.(?:mlp|self_attn)\.experts\.)(\d+)(\..*)$")


def open_mixture(path: Path) -> tuple[ModelConfig, MixtureConfig, CanonicalTensors]:
    """Return a mixture's configuration, and its tensors by our stored names. Raises `UserError` if the model is dense."""
    config = read_config(path)
    if config.mixture is None:
        raise UserError("is a dense model", where=path, hint="give a mixture: see `koine upcycle`")
    return config, config.mixture, open_canonical(path, config)


def add_expert(
    model: Path,
    expert: Path,
    out: Path,
    *,
    name: str,
    texts: list[str] | None,
    share: float | None = None,
    reset_router: bool = False,
    random_seed: int = 0,
) -> ModelConfig:
    """Write `model` with the dense model `expert` as one more expert to `out`.

    Args:
        model: the mixture.
        expert: a branch of the seed that the mixture was made from.
        out: the folder to write to.
        name: of the new expert.
        texts: documents of its domain, for a Nexus router.
        share: lambda, the weight of the new model in the averages; by default `1 / (n + 1)`.
        reset_router: initialise all routers again, as linear ones need; a Nexus router does not.
        random_seed: of those routers.

    Raises:
        UserError: shapes, tokenizer or ancestor differ, the name is taken, or texts are missing.
    """
    check_no_model(out)
    config, mixture, weights = open_mixture(model)
    if name in mixture.experts:
        raise UserError(f"has an expert '{name}' already", where=model, hint="choose another name")
    branch = open_branch(expert, name)
    check_other_shapes(config, branch.config, expert, than=model)
    check_other_tokenizer(model, expert)
    _check_other_ancestor(model, weights, mixture, branch)
    _check_router(model, mixture, texts, reset_router=reset_router)
    part = 1.0 / (len(mixture.experts) + 1) if share is None else share
    if not 0.0 <= part <= 1.0:
        raise UserError(f"the new model's share is {part}", hint="it must lie between 0 and 1")
    tensors = _tensors_with(weights, mixture, branch, part)
    if mixture.domain_size is not None:
        row = domain_embedding(load_encoder(model), texts or [])
        for stored in [stored for stored in weights if stored.endswith(DOMAINS)]:
            domains = weights[stored]
            tensors[stored] = given(torch.cat((domains, row.to(domains.dtype)[None])))
    grown = replace(config, mixture=replace(mixture, experts=(*mixture.experts, name)))
    if reset_router:
        routers = new_routers(grown, random_seed, dtype=weights.dtype("model.norm.weight"))
        tensors |= {
            stored: given(router) for stored, router in routers.items() if not stored.endswith(DOMAINS)
        }
    _save(tensors, grown, model, out, added={name: source_of(expert)}, share=part)
    _write_card(
        out,
        f"The expert `{name}` was added to a mixture. Its model has the share {part:g} of the averages.",
        (Parent(path=model, role="mixture"), Parent(path=expert, role=f"expert {name}")),
        {"added": name, "share": part, "reset_router": reset_router, "random_seed": random_seed},
        grown,
    )
    carry_drawn([model, expert], out)
    return grown


def _check_router(
    model: Path, mixture: MixtureConfig, texts: list[str] | None, *, reset_router: bool
) -> None:
    """Raise `UserError` if the router of `model` cannot score a new expert."""
    if mixture.domain_size is not None and not texts:
        raise UserError(
            "its router knows experts by their domains, and no text is given",
            where=model,
            hint="give text of the new expert's domain",
        )
    if mixture.domain_size is None and not reset_router:
        raise UserError(
            "its router is linear and cannot score an expert that it has not seen",
            where=model,
            hint="add --reset-router and fine-tune the mixture, or upcycle by nexus",
        )


def _tensors_with(
    weights: CanonicalTensors, mixture: MixtureConfig, branch: Branch, part: float
) -> dict[str, PlannedTensor]:
    """Plan the stored tensors with `branch` as the last expert, and in the averages by `part`."""
    tensors: dict[str, PlannedTensor] = {}
    for stored in weights:
        _, rest = layer_of(stored)
        if _EXPERT.match(stored) or "shared_expert" in rest or _is_router(rest):
            tensors[stored] = _kept(weights, stored)
        elif stored in branch.weights:
            tensors[stored] = _interpolated(weights, branch, stored, part)
    dtype = weights.dtype("model.norm.weight")
    for stored in branch.weights:
        prefix, rest = layer_of(stored)
        if prefix and is_expert_tensor(rest, mixture):
            name = expert_name(prefix, rest, len(mixture.experts))
            tensors[name] = copied(branch, stored, dtype)
    return tensors


def _kept(weights: CanonicalTensors, stored: str) -> PlannedTensor:
    """Plan a copy of the mixture's tensor."""
    return PlannedTensor(weights.dtype(stored), weights.shape(stored), lambda: weights[stored])


def _interpolated(weights: CanonicalTensors, branch: Branch, stored: str, share: float) -> PlannedTensor:
    """Plan the average of the mixture's tensor and the branch's."""
    return PlannedTensor(
        weights.dtype(stored),
        weights.shape(stored),
        lambda: interpolate(weights[stored], branch.tensor(stored), share),
    )


def remove_expert(model: Path, name: str, out: Path, *, dense: Path | None = None) -> ModelConfig:
    """Write `model` without expert `name` to `out`.

    Args:
        model: the mixture.
        name: of the expert.
        out: the folder to write to.
        dense: the model that the expert came from. Its weight in the averages, which follows from
            `mixture.json`, is taken out again. That is exact for a mixture that was not trained since.
            Without it the averages stay.

    Raises:
        UserError: an unknown name, the last expert, a `top_k` larger than the remaining experts, or a dense
            model with other weights than `mixture.json` records.
    """
    check_no_model(out)
    config, mixture, weights = open_mixture(model)
    if name not in mixture.experts:
        raise UserError(f"has no expert '{name}'", where=model, hint=did_you_mean(name, mixture.experts))
    count = len(mixture.experts)
    if count == 1 or mixture.top_k > count - 1:
        raise UserError(
            f"has {count} experts and sends each token to {mixture.top_k}",
            where=model,
            hint="keep this expert",
        )
    limit = mixture.attention_top_k
    shrunk = replace(
        config,
        mixture=replace(
            mixture,
            experts=tuple(one for one in mixture.experts if one != name),
            attention_top_k=None if limit is None else min(limit, count - 1),
        ),
    )
    branch, part = None, None
    if dense is not None:
        branch = open_branch(dense, name)
        check_other_shapes(config, branch.config, branch.path, than=model)
        part = _recorded_part(model, name, branch, count)
    tensors = _tensors_without(weights, mixture.experts.index(name), branch, part)
    _save(tensors, shrunk, model, out, removed=name, **({} if part is None else {"share": part}))
    taken_out = () if dense is None else (Parent(path=dense, role=f"taken out of the averages: {name}"),)
    _write_card(
        out,
        f"The expert `{name}` was removed from a mixture. "
        + (
            "Its model's part of the averages was taken out too."
            if taken_out
            else "The averages are as before."
        ),
        (Parent(path=model, role="mixture"), *taken_out),
        {"removed": name},
        shrunk,
    )
    carry_drawn([model], out)
    return shrunk


def _write_card(
    out: Path, summary: str, parents: tuple[Parent, ...], parameters: dict[str, Any], config: ModelConfig
) -> None:
    assert config.mixture is not None
    card = ModelCard(
        title=f"Mixture of experts: {', '.join(config.mixture.experts)}",
        summary=f"{summary} Nothing was trained since.",
        parents=parents,
        relation="merge" if len(parents) > 1 else "finetune",
        parameters=parameters,
        tags=("moe",),
    )
    write_model_card(out, card)


def _recorded_part(model: Path, name: str, branch: Branch, count: int) -> float:
    """Return the weight of expert `name` in the averages of `model`, by its record.

    Raises `UserError` if `branch` is not the model that it was made of, or is all that the averages hold.
    """
    record = read_record(model)
    _check_other_source(record, name, branch.path, model)
    part = averaged_parts(record).get(name, 1.0 / count)
    if part >= 1.0:
        raise UserError(
            f"expert '{name}' is all that its averages hold",
            where=model,
            hint="without its part nothing would be left: leave --expert out, the averages then stay",
        )
    return part


def _tensors_without(
    weights: CanonicalTensors, removed: int, branch: Branch | None, part: float | None
) -> dict[str, PlannedTensor]:
    """Plan the stored tensors without expert number `removed`, and its model's part of the averages."""
    tensors: dict[str, PlannedTensor] = {}
    for stored in weights:
        _, rest = layer_of(stored)
        found = _EXPERT.match(stored)
        if found:
            number = int(found[2])
            if number != removed:
                tensors[f"{found[1]}{number - (number > removed)}{found[3]}"] = _kept(weights, stored)
        elif rest in (DOMAINS, "mlp.router.weight", "self_attn.router.weight"):
            rows = weights[stored]
            tensors[stored] = given(torch.cat((rows[:removed], rows[removed + 1 :])))
        elif branch is not None and part is not None and stored in branch.weights and not _is_router(rest):
            # The inverse of `interpolate` with this part.
            tensors[stored] = _interpolated(weights, branch, stored, -part / (1.0 - part))
        else:
            tensors[stored] = _kept(weights, stored)
    return tensors


def averaged_parts(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the weight of each model in a mixture's averages, by the content of `mixture.json`.

    Weights are equal at first. A model that is added with a share scales the others down, and one that is
    taken out scales them up again. They sum to 1, with those that were removed and left in the averages.
    """
    names = list(record.get("experts", {}))
    parts = {name: 1.0 / len(names) for name in names}
    for change in record.get("changes", []):
        share = change.get("share")
        if "added" in change:
            parts = {name: part * (1.0 - share) for name, part in parts.items()}
            parts |= dict.fromkeys(change["added"], share)
        elif "removed" in change:
            part = parts.pop(change["removed"], 0.0)
            if share is not None:
                parts = {name: one / (1.0 - share) for name, one in parts.items()}
            else:
                # The expert is removed and its weight in the averages stays, under a name that no expert has.
                parts[""] = parts.get("", 0.0) + part
    return parts


def _check_other_source(record: Mapping[str, Any], name: str, dense: Path, model: Path) -> None:
    """Raise `UserError` if `dense` has other weights than expert `name` was made of.

    A mixture without a record is not checked.
    """
    sources = dict(record.get("experts", {}))
    for change in record.get("changes", []):
        sources |= change.get("added", {})
    source = sources.get(name)
    if source is not None and not is_source(source, dense):
        raise UserError(
            f"is not the model that expert '{name}' of {model} was made of "
            "(the sha256 of its weights is another)",
            where=dense,
            hint=f"give that one: it was {source['path']}",
        )


def interpolate(old: Tensor, new: Tensor, share: float) -> Tensor:
    """Return `(1 - share) * old + share * new` in the dtype of `old`, computed in float32 or float64."""
    upcast = torch.promote_types(old.dtype, torch.float32)
    return torch.lerp(old.to(upcast), new.to(upcast), share).to(old.dtype)


def _is_router(rest: str) -> bool:
    return ".router." in rest


def _check_other_ancestor(
    model: Path, weights: CanonicalTensors, mixture: MixtureConfig, branch: Branch
) -> None:
    """Raise `UserError` if the new expert is unrelated to every feed-forward expert of the mixture.

    See `koine.combine.moe.branches.check_other_ancestor`.
    """
    layer = f"model.layers.{len(branch.config.layers) // 2}."
    new = branch.tensor(f"{layer}mlp.down_proj.weight").flatten().double()
    places = [f"{layer}mlp.experts.{index}." for index in range(len(mixture.experts))]
    if mixture.shared_expert:
        places.append(f"{layer}mlp.shared_expert.")
    cosine = max(
        float(torch.cosine_similarity(new, weights[f"{place}down_proj.weight"].flatten().double(), dim=0))
        for place in places
    )
    if cosine < MIN_RELATED_COSINE:
        raise UserError(
            f"has no common ancestor with {model} (the cosine of their matrices is {cosine:.2f})",
            where=branch.path,
            hint="give a branch of the seed that the mixture was made from",
        )


def _save(
    tensors: Mapping[str, PlannedTensor], config: ModelConfig, model: Path, out: Path, **change: object
) -> None:
    save_planned(tensors, config, out, model)
    carry_files(model, out)
    record = read_record(model)
    history = record.get("changes")
    changes = [*(history if isinstance(history, list) else []), {"from": source_of(model), **change}]
    write_record(out, **{**record, "changes": changes})
