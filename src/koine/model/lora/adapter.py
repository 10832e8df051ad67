"""Put a LoRA adapter on a model, and write it as a PEFT adapter.

Our decoder has layers of its own (`koine.model.lora.layers`); a class of `transformers` gets those of `peft`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from koine.errors import UserError
from koine.extras import import_extra
from koine.model.causal_lm import CausalLM
from koine.model.decoder import Decoder
from koine.model.formats.carried_files import copy_tokenizer
from koine.model.formats.config_json import stored_names
from koine.model.formats.tensor_names import FUSED
from koine.model.language_model import LanguageModel
from koine.model.lora.config import LoraConfig
from koine.model.lora.files import KEY_PREFIX, write_adapter
from koine.model.lora.layers import LoraLinear, Part
from koine.model.lora.places import adaptable_parts, check_targets, is_target, joins_inputs, to_class_rows

NAME = "default"
"""The name that `peft` gives to an adapter inside a model; its files do not have it."""


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter on a model: its settings, and what its files need.

    config: rank, alpha and so on.
    modules: the class's names of the modules that have an adapter, such as `model.layers.0.mlp.up_proj`.
    transposed: the base stores its matrices `[in, out]`, as GPT-2 does.
    parameters: names of its parameters in the model.
    base: folder of the model that it is for; None where it was never saved.
    to_file: returns the tensors of PEFT's file, by their names there, from all parameters of the adapter.
    """

    config: LoraConfig
    modules: tuple[str, ...]
    transposed: bool
    parameters: tuple[str, ...]
    base: Path | None
    to_file: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

    def save(self, folder: Path, weights: Mapping[str, Tensor], *, tokenizer: Path | None = None) -> None:
        """Write a folder that `peft` opens.

        Args:
            folder: made if needed.
            weights: the adapter's parameters by name; others are ignored.
            tokenizer: a folder whose tokenizer's files are copied.
        """
        tensors = self.to_file({name: weights[name].detach().float().cpu() for name in self.parameters})
        write_adapter(
            folder,
            tensors,
            self.config,
            targets=self.config.target_names or _last_names(self.modules),
            base=self.base,
            transposed=self.transposed,
        )
        copy_tokenizer(tokenizer, folder)


def add_lora(
    model: LanguageModel, config: LoraConfig, *, base: Path | None = None, seed: int = 0
) -> LoraAdapter:
    """Put a LoRA adapter on a model in place; all other weights are frozen. The model computes as before.

    Args:
        model: our decoder, or a `CausalLM` (needs the extra `peft`).
        config: of the adapter.
        base: folder that the model was opened from.
        seed: of the A matrices; B is 0.

    Raises:
        UserError: the rank is 0, the model has an adapter already, a target is the name of no linear layer, or
            `peft` is not installed.
    """
    if not config.rank:
        raise UserError("a LoRA adapter needs a rank", hint="choose a rank of 1 or more, such as 16")
    if getattr(model, "adapter", None) is not None:
        raise UserError("the model has a LoRA adapter already", hint="merge it first")
    if isinstance(model, Decoder):
        adapter = _add_to_decoder(model, config, base, seed)
    elif isinstance(model, CausalLM):
        adapter = _add_with_peft(model, config, base, seed)
    else:
        raise UserError(
            f"a {type(model).__name__} cannot have a LoRA adapter",
            hint="give a model that koine.model.load_causal_lm opened",
        )
    trained = set(adapter.parameters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    model.adapter = adapter
    return adapter


def _last_names(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))


# -- our decoder ---------------------------------------------------------------------------------------------


def _add_to_decoder(model: Decoder, config: LoraConfig, base: Path | None, seed: int) -> LoraAdapter:
    names = stored_names(model.config)
    found: dict[tuple[int, str], list[Part]] = {}
    for index, block in enumerate(model.blocks):
        for child, module in block.named_children():
            if isinstance(module, nn.Linear) and f"{child}.weight" in FUSED:
                found[index, child] = adaptable_parts(f"{child}.weight", model.config, names)
    every = {
        (index, child, part): f"{names.prefix}{index}.{part.name}"
        for (index, child), parts in found.items()
        for part in parts
    }
    check_targets(
        config.target_names,
        every.values(),
        hint="" if model.config.mixture is None else " (not the routers and experts of a mixture)",
    )
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, Part] = {}
    for (index, child), parts in found.items():
        chosen = [part for part in parts if is_target(every[index, child, part], config.target_names)]
        if not chosen:
            continue
        block = model.blocks[index]
        linear = getattr(block, child)
        layer = LoraLinear(
            linear,
            chosen,
            columns=joins_inputs(f"{child}.weight"),
            rank=config.rank,
            scale=config.scale,
            dropout=config.dropout,
        )
        layer.reset_adapter(generator)
        layer.train(linear.training)
        setattr(block, child, layer)
        layers |= {f"blocks.{index}.{child}.lora_{{}}.{part.key}.weight": part for part in chosen}

    def to_file(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, part in layers.items():
            index = name.split(".")[1]
            module = f"{KEY_PREFIX}{names.prefix}{index}.{part.name}"
            b_or = weights[name.format("B")]
            rows = not joins_inputs(f"{name.split('.')[2]}.weight")
            out[f"{module}.lora_A.weight"] = weights[name.format("A")].contiguous()
            out[f"{module}.lora_B.weight"] = (
                to_class_rows(b_or, part, names, model.config) if rows else b_or.contiguous()
            )
        return out

    return LoraAdapter(
        config=config,
        modules=tuple(f"{names.prefix}{name.split('.')[1]}.{part.name}" for name, part in layers.items()),
        transposed=False,
        parameters=tuple(name.format(letter) for name in layers for letter in "AB"),
        base=base,
        to_file=to_file,
    )


# -- classes of transformers ---------------------------------------------------------------------------------


def _add_with_peft(model: CausalLM, config: LoraConfig, base: Path | None, seed: int) -> LoraAdapter:
    peft = import_extra("peft", extra="peft", purpose=f"train an adapter of a {model.architecture}")
    linear = _linear_modules(model.inner)
    check_targets(config.target_names, linear)
    chosen = [name for name in linear if is_target(name, config.target_names)]
    transposed = {type(linear[name]).__name__ == "Conv1D" for name in chosen}
    if len(transposed) != 1:
        raise UserError(
            f"{model.architecture} stores some of these matrices transposed and others not",
            hint="choose --lora-targets of one kind",
        )
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=chosen,
        fan_in_fan_out=transposed == {True},
    )
    peft.inject_adapter_in_model(lora, model.inner, adapter_name=NAME)
    parameters = tuple(
        name for name, _ in model.named_parameters() if f".{NAME}." in name and ".lora_" in name
    )
    generator = torch.Generator().manual_seed(seed)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name in parameters:
            # In float32, whatever the base is stored in: the update of a step is small.
            named[name].data = named[name].data.to(torch.float32)
            if ".lora_A." in name:
                bound = named[name].shape[1] ** -0.5
                drawn = torch.rand(named[name].shape, generator=generator) * (2 * bound) - bound
                named[name].copy_(drawn)
    return LoraAdapter(
        config=config,
        modules=tuple(chosen),
        transposed=transposed == {True},
        parameters=parameters,
        base=base,
        to_file=_peft_names,
    )


def _peft_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by their names in PEFT's file."""
    return {
        KEY_PREFIX + name.removeprefix("inner.").replace(f".{NAME}.", ".", 1): tensor.contiguous()
        for name, tensor in weights.items()
    }


def _linear_modules(inner: Any) -> dict[str, nn.Module]:
    """Return the linear layers of a model of `transformers` by name, without its head."""
    head = inner.get_output_embeddings()
    return {
        name: module
        for name, module in inner.named_modules()
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D") and module is not head
    }


def adapter_of(model: object) -> LoraAdapter | None:
    """Return the adapter on a model; None without one."""
    found = getattr(model, "adapter", None)
    return found if isinstance(found, LoraAdapter) else None


def merged_weights(model: LanguageModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's state without its adapter, which is added to the matrices: `W + scale * B A`.

    state: of the model with its adapter, by its names. Matrices with an adapter become float32.
    """
    out = {
        name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name
    }
    for prefix, module in model.named_modules():
        if isinstance(module, LoraLinear):
            weight = out[f"{prefix}.weight"].float().clone()
            for part in module.parts:
                a_ri, b_or = (state[f"{prefix}.lora_{one}.{part.key}.weight"].float() for one in "AB")
                place = (
                    weight[:, part.start : part.stop] if module.columns else weight[part.start : part.stop]
                )
                place += module.scale * (b_or @ a_ri)
            out[f"{prefix}.weight"] = weight
        elif f"{prefix}.lora_A.{NAME}.weight" in state:
            layer: Any = module
            a_ri, b_or = (state[f"{prefix}.lora_{one}.{NAME}.weight"].float() for one in "AB")
            added_oi = layer.scaling[NAME] * (b_or @ a_ri)
            base = out[f"{prefix}.weight"].float()
            out[f"{prefix}.weight"] = base + (added_oi.t() if layer.fan_in_fan_out else added_oi)
    return out
