"""Bad inputs around LoRA adapters: of another base, of another kind, damaged; settings that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import worlds
from .case import ANYTHING, Case

GIVEN = "evaluate model+adapter --data text.jsonl"
MERGE = "model merge-adapter model adapter --out new"
TRAIN = "train sft --model model --data tokens --steps 2 --batch-size 2 --sequence-length 32 --out new"
PRETRAIN = TRAIN.replace("sft", "pretrain")
CONFIG = "adapter/adapter_config.json"
WEIGHTS = "adapter/adapter_model.safetensors"
BASE = "base_model.model.model.layers.0.self_attn.q_proj"
WITH_PEFT = "merge it with peft: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload()"


def adapter_with(**fields: Any) -> Callable[[Path], None]:
    """A model and an adapter with other fields in its configuration."""
    return worlds.having("text", "model", "adapter", then=worlds.edited_json(CONFIG, **fields))


def adapter_whose(path: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    """A model and an adapter, with the tensors of one of them changed."""
    return worlds.having("text", "model", "adapter", then=worlds.changed_tensors(path, change))


def lacking_b(tensors: Any) -> None:
    del tensors[f"{BASE}.lora_B.weight"]


def with_bias(tensors: Any) -> None:
    tensors["base_model.model.lm_head.weight"] = tensors[f"{BASE}.lora_A.weight"].clone()


def renamed_module(tensors: Any) -> None:
    for letter in "AB":
        tensors[f"{BASE}.lora_{letter}.weight".replace("q_proj", "query")] = tensors.pop(
            f"{BASE}.lora_{letter}.weight"
        )


def narrower(tensors: Any) -> None:
    tensors[f"{BASE}.lora_A.weight"] = tensors[f"{BASE}.lora_A.weight"][:, :3].contiguous()


CASES = (
    Case(
        mistake="an adapter with another base than its own",
        command=GIVEN,
        prepare=adapter_whose(
            "model/model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(1.5)
        ),
        says="adapter: is an adapter of another base than model: the sha256 of the base's weights "
        f"differs; its base is {ANYTHING}",
    ),
    Case(
        mistake="an adapter of modules that the base does not have",
        command=MERGE,
        prepare=adapter_whose(WEIGHTS, renamed_module),
        says=f"adapter: changes model.layers.0.self_attn.query, which model does not have; its base is {ANYTHING}",
    ),
    Case(
        mistake="an adapter of other shapes than the base's",
        command=MERGE,
        prepare=adapter_whose(WEIGHTS, narrower),
        says="adapter: changes model.layers.0.self_attn.q_proj of shape [64, 3], and model has one of [64, 64]; "
        f"its base is {ANYTHING}",
    ),
    Case(
        mistake="an adapter without its weights",
        command=GIVEN,
        prepare=worlds.having("text", "model", "adapter", then=worlds.removed(WEIGHTS)),
        says="adapter: holds no adapter_model.safetensors; copy the whole folder again",
    ),
    Case(
        mistake="an adapter whose weights are cut short",
        command=MERGE,
        prepare=worlds.having("model", "adapter", then=worlds.cut(WEIGHTS)),
        says=f"adapter/adapter_model.safetensors: not a whole safetensors file ({ANYTHING}); it is truncated or damaged; "
        "copy or build it again",
    ),
    Case(
        mistake="an adapter that lacks a matrix",
        command=MERGE,
        prepare=adapter_whose(WEIGHTS, lacking_b),
        says="adapter/adapter_model.safetensors: model.layers.0.self_attn.q_proj has only lora_A; it is damaged; copy it again",
    ),
    Case(
        mistake="an adapter that holds a whole head",
        command=MERGE,
        prepare=adapter_whose(WEIGHTS, with_bias),
        says="adapter/adapter_model.safetensors: 'base_model.model.lm_head.weight' is no A or B of a linear layer; only "
        "LoRA is merged",
    ),
    Case(
        mistake="an adapter that holds NaN",
        command=MERGE,
        prepare=adapter_whose(WEIGHTS, lambda tensors: tensors[f"{BASE}.lora_A.weight"].fill_(float("nan"))),
        says=f"adapter: {BASE}.lora_A.weight holds NaN or infinity; this adapter is broken",
    ),
    Case(
        mistake="an adapter of another kind than LoRA",
        command=MERGE,
        prepare=adapter_with(peft_type="IA3"),
        says="adapter/adapter_config.json: is an adapter of the type 'IA3'; only LORA is merged",
    ),
    Case(
        mistake="an adapter with DoRA",
        command=MERGE,
        prepare=adapter_with(use_dora=True),
        says=f"adapter/adapter_config.json: the field 'use_dora' is True, which Koine does not merge; {WITH_PEFT}",
    ),
    Case(
        mistake="an adapter with biases",
        command=MERGE,
        prepare=adapter_with(bias="lora_only"),
        says=f"adapter/adapter_config.json: the field 'bias' is 'lora_only', which Koine does not merge; {WITH_PEFT}",
    ),
    Case(
        mistake="an adapter with whole modules",
        command=MERGE,
        prepare=adapter_with(modules_to_save=["lm_head"]),
        says="adapter/adapter_config.json: the field 'modules_to_save' is ['lm_head'], which Koine does not merge; "
        f"{WITH_PEFT}",
    ),
    Case(
        mistake="an adapter that was begun with PiSSA, which changes the base",
        command=MERGE,
        prepare=adapter_with(init_lora_weights="pissa"),
        says=f"adapter/adapter_config.json: the field 'init_lora_weights' is 'pissa', which Koine does not merge; {WITH_PEFT}",
    ),
    Case(
        mistake="an alpha that is no number",
        command=MERGE,
        prepare=adapter_with(lora_alpha="16"),
        says="adapter/adapter_config.json: the field 'lora_alpha' is '16'; it must be a number",
    ),
    Case(
        mistake="a base with nothing after the plus",
        command="evaluate model+ --data text.jsonl",
        prepare=worlds.having("text", "model"),
        says="model+: names no adapter after the +; give BASE+ADAPTER, two folders joined by +",
    ),
    Case(
        mistake="a base with an adapter that is not there",
        command="merge linear model model+adaptr --out new",
        prepare=worlds.having("model", "adapter"),
        says="adaptr: no such adapter; give BASE+ADAPTER, two folders joined by +",
    ),
    Case(
        mistake="two models joined by a plus",
        command="evaluate model+branch --data text.jsonl",
        prepare=worlds.having("text", "model", "branch"),
        says="branch: holds no adapter_config.json; give the folder of a PEFT adapter",
    ),
    Case(
        mistake="a LoRA target with a typo",
        command=PRETRAIN + " --lora-rank 4 --lora-targets q_prj",
        prepare=worlds.having("model", "tokens"),
        says="no linear layer that can have a LoRA adapter is called 'q_prj'; possible are: down_proj, gate_proj, k_proj, "
        "o_proj, q_proj, up_proj, v_proj",
    ),
    Case(
        mistake="a LoRA adapter of a new model",
        command=PRETRAIN.replace("--model model", "--preset koine-0.5m --tokenizer tokenizer")
        + " --lora-rank 4",
        prepare=worlds.having("tokenizer", "tokens"),
        says="--lora-rank with --preset: an adapter needs a trained base; give --model",
    ),
    Case(
        mistake="LoRA's alpha without a rank",
        command=PRETRAIN + " --lora-alpha 16",
        prepare=worlds.having("model", "tokens"),
        says="the alpha of a LoRA adapter is given, and no rank; give the rank too (--lora-rank)",
    ),
    Case(
        mistake="rsLoRA without an alpha",
        command=PRETRAIN + " --lora-rank 64 --lora-rslora",
        prepare=worlds.having("model", "tokens"),
        says="rsLoRA has no default alpha; give --lora-alpha; the scale is alpha / sqrt(rank)",
    ),
    Case(
        mistake="a LoRA adapter on a base with an adapter",
        command=PRETRAIN.replace("--model model", "--model model+adapter") + " --lora-rank 4",
        prepare=worlds.having("model", "adapter", "tokens"),
        says="--lora-rank on model+adapter: the base of an adapter must be one folder; merge them first: koine model "
        "merge-adapter model adapter --out MODEL",
    ),
)
