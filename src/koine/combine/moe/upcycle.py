"""Upcycle dense branches of one seed to a mixture of experts: BTX, BAM and Nexus.

| | BTX | BAM | Nexus |
|---|---|---|---|
| routed feed-forward experts | seed and branches | seed and branches | branches |
| shared feed-forward expert | none | none | the seed's, weight 1 |
| attention | average | an expert of each, soft | average |
| averaged models | seed and branches | seed and branches | branches |
| router | linear | linear, one for each kind of expert | a projection of domain embeddings |

(arXiv 2403.07816; arXiv 2408.08274, section 3; arXiv 2408.15901, section 3.) Routers are
initialised at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koine.combine.moe.branches import Branch, check_no_model, open_branches
from koine.combine.moe.planned_tensors import (
    PlannedTensor,
    PlannedTensors,
    averaged,
    copied,
    given,
    widest_dtype,
)
from koine.data.drawn import carry_drawn
from koine.errors import UserError
from koine.fields import Fields
from koine.files import read_json_object, sha256_file, write_json
from koine.model.config import MixtureConfig, ModelConfig
from koine.model.formats.carried_files import carry_files
from koine.model.formats.checksum import stored_checksum
from koine.model.formats.directory import save_streamed
from koine.model.formats.eos_ids import eos_ids
from koine.model.formats.mixture_files import DOMAIN_ENCODER, RECORD
from koine.model.formats.model_card import ModelCard, Parent, write_model_card
from koine.model.formats.stored_tensors import layer_of
from koine.model.formats.tensor_names import split_stored
from koine.model.formats.weight_files import weight_files
from koine.model.moe.loss_weights import BAM, BTX, NEXUS
from koine.model.moe.routers import DomainRouter, LinearRouter

DOMAINS = "mlp.router.domains"
SOURCES = {"btx": "arXiv 2403.07816", "bam": "arXiv 2408.08274", "nexus": "arXiv 2408.15901"}
"""The publication of each method."""

ATTENTION_OUT = ("self_attn.q_proj", "self_attn.o_proj", "self_attn.q_norm")
KEYS_AND_VALUES = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def upcycle_btx(
    seed: Path,
    experts: Mapping[str, Path],
    out: Path,
    *,
    top_k: int | None = None,
    normalise_top_k: bool = False,
    seed_copies: int = 0,
    random_seed: int = 0,
    load_balancing: float = BTX.load_balancing,
    z_loss: float = BTX.z_loss,
) -> ModelConfig:
    """Write a branch-train-mix mixture: feed-forward experts and averaged attention.

    Args:
        seed: the dense model that `experts` branched from.
        experts: a model folder for each name.
        out: the folder to write to.
        top_k: feed-forward experts of each token; None: see `default_top_k`.
        normalise_top_k: divide the gates of a token by their sum (Mixtral). A single gate is then 1.
        seed_copies: further experts initialised from the seed's feed-forward, as in the parameter-matched
            baseline of arXiv 2408.08274. They do not count in the average.
        random_seed: of the routers' weights.
        load_balancing: factor of the load-balancing loss.
        z_loss: factor of the router z-loss.

    Raises:
        UserError: models that do not fit (see `koine.combine.moe.branches.open_branches`), or `out` holds a
            model.
    """
    copies = tuple(f"seed-{number}" for number in range(2, seed_copies + 2))
    mixture = MixtureConfig(
        experts=("seed", *experts, *copies), top_k=top_k or 1, normalise_top_k=normalise_top_k,
        load_balancing=load_balancing, z_loss=z_loss,
    )  # fmt: skip
    return _upcycle(
        "btx", seed, experts, mixture, out, random_seed=random_seed, domains=None, seed_copies=seed_copies,
        choose_top_k=top_k is None,
    )  # fmt: skip


def upcycle_bam(
    seed: Path,
    experts: Mapping[str, Path],
    out: Path,
    *,
    attention: str = "kv-experts",
    attention_top_k: int | None = None,
    top_k: int | None = None,
    normalise_top_k: bool = False,
    random_seed: int = 0,
    load_balancing: float = BAM.load_balancing,
    z_loss: float = BAM.z_loss,
) -> ModelConfig:
    """Write a BAM mixture: feed-forward experts and attention experts.

    Args:
        seed: see `upcycle_btx`, as for the arguments not named here.
        attention: `kv-experts`, each with its own keys and values, or `shared-kv`.
        attention_top_k: attention experts whose gate is kept; None for all.
    """
    if attention == "averaged":
        raise UserError("BAM does not average the attention", hint="give kv-experts or shared-kv, or use btx")
    mixture = MixtureConfig(
        experts=("seed", *experts), top_k=top_k or 1, normalise_top_k=normalise_top_k, attention=attention, attention_top_k=attention_top_k,
        load_balancing=load_balancing, z_loss=z_loss,
    )  # fmt: skip
    return _upcycle(
        "bam", seed, experts, mixture, out, random_seed=random_seed, domains=None, choose_top_k=top_k is None
    )


def upcycle_nexus(
    seed: Path,
    experts: Mapping[str, Path],
    out: Path,
    *,
    domains: Tensor | None,
    top_k: int | None = None,
    normalise_top_k: bool = False,
    random_seed: int = 0,
    load_balancing: float = NEXUS.load_balancing,
    z_loss: float = NEXUS.z_loss,
) -> ModelConfig:
    """Write a Nexus mixture: the seed's feed-forward is shared, the branches' are routed by domain.

    Args:
        seed: see `upcycle_btx`, as for the arguments not named here.
        domains: embeddings `[experts, domain_size]`, in the order of `experts`; None for the paper's
            baseline, a linear router on the same experts.
    """
    if domains is not None and domains.shape[0] != len(experts):
        raise UserError(
            f"{domains.shape[0]} domain embeddings for {len(experts)} experts", hint="give one each"
        )
    mixture = MixtureConfig(
        experts=tuple(experts), top_k=top_k or 1, normalise_top_k=normalise_top_k, shared_expert=True, load_balancing=load_balancing, z_loss=z_loss,
        domain_size=None if domains is None else domains.shape[1],
    )  # fmt: skip
    return _upcycle(
        "nexus", seed, experts, mixture, out, random_seed=random_seed, domains=domains,
        choose_top_k=top_k is None,
    )  # fmt: skip


def _upcycle(
    method: str,
    seed: Path,
    experts: Mapping[str, Path],
    mixture: MixtureConfig,
    out: Path,
    *,
    random_seed: int,
    domains: Tensor | None,
    choose_top_k: bool,
    seed_copies: int = 0,
) -> ModelConfig:
    check_no_model(out)
    if mixture.normalise_top_k and mixture.top_k == 1 and not choose_top_k:
        raise UserError(
            "normalise_top_k is given and top_k is 1: the only gate is always 1, and the router cannot learn",
            hint="give a top_k of 2 or more",
        )
    if not experts:
        raise UserError("no experts are given", hint="give the folder of at least one branch of the seed")
    root, branches = open_branches(seed, experts)
    members = branches if mixture.shared_expert else [root, *branches]
    if choose_top_k:
        mixture = replace(mixture, top_k=default_top_k(root.config, mixture))
    config = replace(root.config, mixture=mixture)
    planned = _planned(root, members, config, seed_copies)
    routers = new_routers(config, random_seed, dtype=planned["model.norm.weight"].dtype)
    for name, router in routers.items():
        is_domains = domains is not None and name.endswith(DOMAINS)
        planned[name] = given(domains.to(router.dtype) if domains is not None and is_domains else router)
    save_planned(planned, config, out, root.path)
    carry_drawn([root.path, *(branch.path for branch in branches)], out)
    carry_files(root.path, out, but=(RECORD, DOMAIN_ENCODER))
    write_record(
        out, method=method, seed=source_of(root.path), experts={b.name: source_of(b.path) for b in members},
        random_seed=random_seed,
    )  # fmt: skip
    write_model_card(out, _mixture_card(method, root, branches, mixture, random_seed))
    return config


def default_top_k(dense: ModelConfig, mixture: MixtureConfig) -> int:
    """Return how many experts a token has where the user gives no number.

    1, or 2 where the gate of a single expert would have no effect: it is normalised, or cancels in a norm after
    the feed-forward (Gemma, OLMo-2). The router would then learn from its losses only.
    """
    single = replace(dense, mixture=replace(mixture, top_k=1))
    has_no_effect = mixture.normalise_top_k or single_gate_cancels(single)
    return 2 if has_no_effect and len(mixture.experts) > 1 else 1


def single_gate_cancels(config: ModelConfig) -> bool:
    """Return whether the gate of a token's only expert cancels in the norm that follows the feed-forward."""
    mixture = config.mixture
    return (
        mixture is not None
        and config.arrangement in ("post_norm", "sandwich")
        and not mixture.shared_expert
        and mixture.top_k == 1
    )


def _mixture_card(
    method: str, root: Branch, branches: Sequence[Branch], mixture: MixtureConfig, random_seed: int
) -> ModelCard:
    names = ", ".join(mixture.experts)
    return ModelCard(
        title=f"Mixture of experts: {names}",
        summary=f"Upcycled from a dense seed model and branches of it by the method `{method}` "
        f"({SOURCES[method]}). The routers are initialised at random and not trained.",
        parents=_parents(root, branches),
        relation="merge",
        parameters={"method": method, **asdict(mixture), "random_seed": random_seed},
        tags=("moe", "upcycling", method),
    )


def _parents(root: Branch, branches: Sequence[Branch]) -> tuple[Parent, ...]:
    return (
        Parent(path=root.path, role="seed"),
        *(Parent(path=branch.path, role=f"expert {branch.name}") for branch in branches),
    )


def average(seed: Path, experts: Mapping[str, Path], out: Path, *, with_seed: bool = True) -> ModelConfig:
    """Write the dense average of the branches, and with `with_seed` of the seed too.

    It is the baseline of arXiv 2408.15901.
    """
    check_no_model(out)
    root, branches = open_branches(seed, experts)
    members = [root, *branches] if with_seed else branches
    planned = {name: averaged(members, name, widest_dtype(name, members)) for name in root.weights}
    save_planned(planned, root.config, out, root.path)
    carry_drawn([root.path, *(branch.path for branch in branches)], out)
    carry_files(root.path, out, but=(RECORD, DOMAIN_ENCODER))
    card = ModelCard(
        title=f"Average of {', '.join(branch.name for branch in members)}",
        summary=f"The mean of the weights of {len(members)} dense models of one seed.",
        parents=_parents(root, branches),
        relation="merge",
        parameters={"method": "average", "with_seed": with_seed},
        tags=("merge", "average"),
    )
    write_model_card(out, card)
    return root.config


def save_planned(planned: Mapping[str, PlannedTensor], config: ModelConfig, out: Path, source: Path) -> None:
    """Write a model's folder, each tensor when it is computed; tokenizer and EOS ids are those of `source`."""
    tensors = PlannedTensors(planned)
    save_streamed(tensors, tensors.layout, config, out, tokenizer=source, eos_ids=eos_ids(source))


def is_expert_tensor(name: str, mixture: MixtureConfig) -> str | None:
    """Return `attention` or `feed-forward` if each expert has its own copy of a tensor, else None.

    name: of a dense model's stored tensor, without `model.layers.N.`.
    """
    part = name.rpartition(".")[0]
    if part in FEED_FORWARD:
        return "feed-forward"
    own = {"averaged": (), "shared-kv": ATTENTION_OUT, "kv-experts": ATTENTION_OUT + KEYS_AND_VALUES}
    return "attention" if part in own[mixture.attention] else None


def expert_name(layer_prefix: str, name: str, number: int) -> str:
    """Return the name of a dense model's tensor in expert `number`.

    `self_attn.q_proj.weight` becomes `self_attn.experts.2.q_proj.weight`.
    """
    module, rest = name.split(".", 1)
    return f"{layer_prefix}{module}.experts.{number}.{rest}"


def _planned(
    root: Branch, members: Sequence[Branch], config: ModelConfig, seed_copies: int
) -> dict[str, PlannedTensor]:
    """Plan all tensors but the routers, layer after layer."""
    assert config.mixture is not None
    out: dict[str, PlannedTensor] = {}
    for name in root.weights:
        prefix, rest = layer_of(name)
        dtype = widest_dtype(name, [root, *members])
        kind = is_expert_tensor(rest, config.mixture) if prefix else None
        if kind is None:
            out[name] = averaged(members, name, dtype)
            continue
        for number, branch in enumerate([*members, *[root] * seed_copies]):
            out[expert_name(prefix, rest, number)] = copied(branch, name, dtype)
        if kind == "feed-forward" and config.mixture.shared_expert:
            out[f"{prefix}mlp.shared_expert.{rest.split('.', 1)[1]}"] = copied(root, name, dtype)
    return out


def new_routers(config: ModelConfig, random_seed: int, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Initialise the routers of every layer; returns their tensors under their stored names."""
    mixture = config.mixture
    assert mixture is not None
    generator_state = torch.get_rng_state()
    torch.manual_seed(random_seed)
    try:
        out: dict[str, Tensor] = {}
        for layer in range(len(config.layers)):
            routers: dict[str, LinearRouter | DomainRouter] = {
                "experts.router": LinearRouter(config.hidden_size, len(mixture.experts))
                if mixture.domain_size is None
                else DomainRouter(config.hidden_size, len(mixture.experts), mixture.domain_size)
            }
            if mixture.attention != "averaged":
                routers["attention_experts.router"] = LinearRouter(config.hidden_size, len(mixture.experts))
            for where, router in routers.items():
                if isinstance(router, LinearRouter):
                    router.reset_parameters(config.initializer_range)
                else:
                    router.reset_parameters()
                for part, tensor in router.state_dict().items():
                    for name, stored in split_stored(
                        f"{where}.{part}", tensor, config, config.layers[layer]
                    ).items():
                        out[f"model.layers.{layer}.{name}"] = stored.to(dtype)
        return out
    finally:
        torch.set_rng_state(generator_state)


def source_of(path: Path) -> dict[str, str]:
    """Return a model's path and the sha256 of its weights: those that the files carry, else of the files."""
    return {
        "path": str(path),
        "sha256": ",".join(stored_checksum(file) or sha256_file(file) for file in weight_files(path)),
    }


def is_source(source: Mapping[str, str], path: Path) -> bool:
    """Return whether a model's weights are those of a record of `source_of`.

    Records of earlier versions have the sha256 of the files, also of those that carry one.
    """
    return source["sha256"] in (
        source_of(path)["sha256"],
        ",".join(sha256_file(file) for file in weight_files(path)),
    )


def write_record(out: Path, **content: object) -> None:
    """Write `mixture.json`."""
    write_json(out / RECORD, content)


def read_record(path: Path) -> dict[str, Any]:
    """Read `mixture.json`; the result is empty if there is none.

    Raises `UserError` if its fields are not those of `write_record`.
    """
    where, hint = path / RECORD, "remove it, or upcycle again"
    if not where.exists():
        return {}
    content = read_json_object(where, hint=hint)
    fields = Fields(content, where, hint_if_broken=hint)
    _check_sources(fields.inner("experts", {}))
    for change in fields.entries("changes", []):
        one = Fields(change, where, hint_if_broken=hint)
        _check_sources(one.inner("added", {}))
        one.text("removed", None)
        # A share of 1 can be added, not taken out: nothing would be left to scale up.
        most = {"high": 1.0} if "added" in change else {"high": 1 - 1e-9}
        one.number("share", 0.5 if "added" in change else None, low=0, **most)
    # A null field counts as absent.
    content = {name: entry for name, entry in content.items() if entry is not None}
    if "changes" in content:
        content["changes"] = [
            {name: entry for name, entry in change.items() if entry is not None}
            for change in content["changes"]
        ]
    return content


def _check_sources(models: Fields) -> None:
    """Check that each model has its path and the sha256 of its weights."""
    for name in models.value:
        source = models.inner(name)
        source.text("path")
        source.text("sha256")
