"""Bad inputs around opening a model: adapters, encoders, custom code, weights and configurations that do not belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import worlds
from .case import Case

EVALUATE = "evaluate llama --data text.jsonl"
CHAT = "chat llama --once hello"
OWN = "evaluate model --data text.jsonl"
MERGE = "merge linear model branch --weights 0.5,0.5 --out new"
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def saved(kind: str, head: str = "AutoModelForCausalLM", **fields: Any) -> Callable[[Path], None]:
    """A tiny model of `transformers` in `llama`, as `save_pretrained` leaves it, with a tokenizer."""

    def write(folder: Path) -> None:
        import torch
        import transformers

        from koine.model.causal_lm import quiet_transformers
        from koine.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(worlds.built("tokenizer"))
        config = transformers.CONFIG_MAPPING[kind](vocab_size=tokenizer.vocab_size, **SIZES, **fields)
        torch.manual_seed(0)
        with quiet_transformers(transformers):
            getattr(transformers, head).from_config(config).save_pretrained(folder / "llama")
        tokenizer.save(folder / "llama")
        worlds.good_text(folder)

    return write


def llama(*spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    return worlds.both(saved("llama"), *spoil)


def configured(**changes: Any) -> Callable[[Path], None]:
    return worlds.edited_json("llama/config.json", **changes)


def without_tensor(folder: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        del tensors["model.norm.weight"]

    worlds.changed_tensors("llama/model.safetensors", drop)(folder)


def custom_code(folder: Path) -> None:
    """A model type of its own, whose code leaves a file when it runs."""
    configured(
        model_type="fancylm",
        auto_map={"AutoConfig": "configuration_fancy.C", "AutoModelForCausalLM": "modeling_fancy.M"},
    )(folder)
    for name in ("configuration_fancy", "modeling_fancy"):
        (folder / "llama" / f"{name}.py").write_text(f"open({str(folder / 'it-ran')!r}, 'w')\n")


def adapter(name: str, *, beside: bool = False) -> Callable[[Path], None]:
    """A folder as PEFT saves it."""

    def write(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        if not beside:
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir()
        about = {
            "peft_type": "LORA",
            "base_model_name_or_path": "acme/base-7b",
            "r": 8,
            "target_modules": ["q_proj"],
        }
        (folder / name / "adapter_config.json").write_text(json.dumps(about))
        save_file(
            {"base_model.model.lora_A.weight": torch.ones(2, 2)}, folder / name / "adapter_model.safetensors"
        )

    return write


def sharded(weight_map: dict[str, str]) -> Callable[[Path], None]:
    """An index in place of the whole file."""

    def write(folder: Path) -> None:
        (folder / "llama/model.safetensors").rename(folder / "llama/model-1.safetensors")
        (folder / "llama/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def other_tokenizer(folder: Path) -> None:
    """A trained model into whose folder another tokenizer was copied."""
    worlds.edited_json("trained/tokenizer.json", version="1.0", padding=None)(folder)


SAYS_ADAPTER = "is a LORA adapter of acme/base-7b, not a whole model; give it with its base, as BASE+"
SAYS_MERGE = ", or merge it: koine model merge-adapter BASE "
TOGETHER = "config.json and the weights do not belong together"

CASES = (
    Case(
        mistake="a LoRA adapter to evaluate",
        command=OWN,
        prepare=worlds.having("text", then=adapter("model")),
        says=f"model: {SAYS_ADAPTER}model{SAYS_MERGE}model --out MODEL",
    ),
    Case(
        mistake="a LoRA adapter to merge",
        command=MERGE,
        prepare=worlds.having("model", then=adapter("branch")),
        says=f"branch: {SAYS_ADAPTER}branch{SAYS_MERGE}branch --out MODEL",
    ),
    Case(
        mistake="a LoRA adapter to upcycle",
        command="upcycle btx --seed-model model --experts code=branch --out new",
        prepare=worlds.having("model", then=adapter("branch")),
        says=f"branch: {SAYS_ADAPTER}branch{SAYS_MERGE}branch --out MODEL",
    ),
    Case(
        mistake="a LoRA adapter beside whole weights",
        command=CHAT,
        prepare=llama(adapter("llama", beside=True)),
        says="llama: holds a LORA adapter of acme/base-7b beside whole weights, and nothing says whether they are merged; "
        "merge it with peft's merge_and_unload, or remove adapter_config.json if that is done",
    ),
    Case(
        mistake="an encoder to chat with",
        command=CHAT,
        prepare=saved("roberta", "AutoModelForMaskedLM"),
        says="llama: RobertaForCausalLM is not causal (an encoder?): its earlier logits change with later tokens; give a causal language model",
    ),
    Case(
        mistake="a model of encoder and decoder",
        command=EVALUATE,
        prepare=llama(configured(model_type="bart", is_encoder_decoder=True)),
        says="llama/config.json: a 'bart' of encoder and decoder is no causal language model; give a decoder-only model",
    ),
    Case(
        mistake="a model that reads images alone",
        command=EVALUATE,
        prepare=llama(configured(model_type="vit")),
        says="llama/config.json: a 'vit' is no causal language model in transformers …; give a model that writes text",
    ),
    Case(
        mistake="a model with code of its own to chat with",
        command=CHAT,
        prepare=llama(custom_code),
        says="llama: needs Python code that comes with it (configuration_fancy.C, modeling_fancy.M), which is never run; convert it to a class of transformers",
    ),
    Case(
        mistake="a model that names a kernel to download",
        command=EVALUATE,
        prepare=llama(configured(attn_implementation="acme/fast-attention")),
        says="llama/config.json: the field 'attn_implementation' names code to fetch (acme/fast-attention), which is never run; remove the field",
    ),
    Case(
        mistake="a configuration without a model type",
        command=EVALUATE,
        prepare=llama(configured(model_type=None)),
        says="llama/config.json: names no model_type; it must be a name that transformers knows",
    ),
    Case(
        mistake="a configuration whose size is a word",
        command=EVALUATE,
        prepare=llama(configured(hidden_size="sixteen")),
        says="llama/config.json: the field 'hidden_size' is 'sixteen'; it must be an integer",
    ),
    Case(
        mistake="a configuration whose precision is none",
        command=EVALUATE,
        prepare=llama(configured(dtype="float31")),
        says="llama/config.json: the field 'dtype' is 'float31'; it must be float32, bfloat16 or float16",
    ),
    Case(
        mistake="a configuration of a smaller vocabulary than the weights have",
        command=EVALUATE,
        prepare=llama(configured(vocab_size=200)),
        says=f"llama: model.embed_tokens.weight has shape […, 16], config.json says [200, 16]; {TOGETHER}",
    ),
    Case(
        mistake="a configuration of a billion tokens beside weights of a few hundred",
        command=EVALUATE,
        prepare=llama(configured(vocab_size=10**9)),
        says="llama/config.json: the field 'vocab_size' is 1000000000; it must be at most 268435456",
    ),
    Case(
        mistake="NaN among the numbers of a configuration",
        command=EVALUATE,
        prepare=llama(configured(rms_norm_eps=float("nan"))),
        says="llama/config.json: the field 'rms_norm_eps' is nan; it must be a number",
    ),
    Case(
        mistake="a configuration of more layers than the weights have",
        command=EVALUATE,
        prepare=llama(configured(num_hidden_layers=3)),
        says=f"llama: the checkpoint lacks 9 tensors (model.layers.2.…); {TOGETHER}",
    ),
    Case(
        mistake="weights without one tensor",
        command=CHAT,
        prepare=llama(without_tensor),
        says=f"llama: the checkpoint lacks 1 tensors (model.norm.weight); {TOGETHER}",
    ),
    Case(
        mistake="weights of transformers that are cut short",
        command=EVALUATE,
        prepare=llama(worlds.cut("llama/model.safetensors")),
        says="llama/model.safetensors: not a whole safetensors file (…); it is truncated or damaged; copy or build it again",
    ),
    Case(
        mistake="a shard that lies outside the model's folder",
        command=EVALUATE,
        prepare=llama(sharded({"model.norm.weight": "../model-1.safetensors"})),
        says="llama/model.safetensors.index.json: names a file outside its folder, '../model-1.safetensors'; "
        "a model's shards lie beside its index; do not trust this folder",
    ),
    Case(
        mistake="a shard of a model of transformers that is gone",
        command=EVALUATE,
        prepare=llama(sharded({"model.norm.weight": "model-2.safetensors"})),
        says="llama: the shard model-2.safetensors is missing; copy the whole folder again",
    ),
    Case(
        mistake="a model that is quantised for a package that is not here",
        command=EVALUATE,
        prepare=llama(configured(quantization_config={"quant_method": "gptq", "bits": 4})),
        says="llama: transformers cannot open it as a causal LM (…optimum…); check config.json and the weights, or upgrade transformers",
    ),
    Case(
        mistake="an end of text that is no id",
        command=EVALUATE,
        prepare=llama(worlds.written("llama/generation_config.json", '{"eos_token_id": ["</s>"]}')),
        says="llama/generation_config.json: the field 'eos_token_id' is ['</s>']; it must be an id or a list of ids",
    ),
    Case(
        mistake="a flipped byte in the weights of a model",
        command=OWN,
        prepare=worlds.having("text", "model", then=worlds.flip_byte("model/model.safetensors", -4096)),
        says="model/model.safetensors: does not match the sha256 that it carries; it is damaged; copy it again, or build it again",
    ),
    Case(
        mistake="a flipped byte in the weights of a model to merge",
        command=MERGE,
        prepare=worlds.having("model", "branch", then=worlds.flip_byte("branch/model.safetensors", -4096)),
        says="branch/model.safetensors: does not match the sha256 that it carries; it is damaged; copy it again, or build it again",
    ),
    Case(
        mistake="a flipped byte in the weights of an expert",
        command="upcycle btx --seed-model model --experts code=branch --out new",
        prepare=worlds.having("model", "branch", then=worlds.flip_byte("branch/model.safetensors", -4096)),
        says="branch/model.safetensors: does not match the sha256 that it carries; it is damaged; copy it again, or build it again",
    ),
    Case(
        mistake="a trained model with another tokenizer than its own",
        command="evaluate trained --data text.jsonl",
        prepare=worlds.having("text", "trained", then=other_tokenizer),
        says="trained/tokenizer.json: is not the tokenizer that the model was trained with (training.json has its sha256); "
        "put that one back, or move the model to another: koine tokenizer adapt",
    ),
)
