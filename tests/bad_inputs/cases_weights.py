"""Weight files and what lies beside them: headers, indexes, configurations and sub-folders that are not what
a merge can take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import worlds
from .case import Case

LINEAR = "merge linear model branch --weights 0.5,0.5 --out new"
DAMAGED = "branch/model.safetensors: not a whole safetensors file ({}); it is truncated or damaged; copy or build it again"


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header of the branch's weights; what `change` returns, where it is something, stands in its
    place."""

    def apply(folder: Path) -> None:
        file = folder / "branch" / "model.safetensors"
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        value = json.loads(content[8 : 8 + length])
        text = change(value)
        new = text if isinstance(text, bytes) else json.dumps(value if text is None else text).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])

    return worlds.having("model", "branch", then=apply)


NORM = "model.norm.weight"


def edited(**fields: Any) -> Callable[[Path], None]:
    """Other fields of one tensor."""
    return header(lambda value: value[NORM].update(fields))


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Other bytes of the whole file."""

    def apply(folder: Path) -> None:
        file = folder / "branch" / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return worlds.having("model", "branch", then=apply)


def indexed(weight_map: Any) -> Callable[[Path], None]:
    """An index with this content in place of the branch's whole file."""

    def apply(folder: Path) -> None:
        (folder / "branch" / "model.safetensors").rename(folder / "weights.safetensors")
        (folder / "branch" / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )

    return worlds.having("model", "branch", then=apply)


def in_two_files(folder: Path) -> None:
    """Two shards that both hold the norm."""
    from safetensors.torch import load_file, save_file

    branch = folder / "branch"
    tensors = load_file(branch / "model.safetensors")
    (branch / "model.safetensors").unlink()
    save_file(tensors, branch / "one.safetensors")
    save_file({NORM: tensors[NORM]}, branch / "two.safetensors")
    shards = dict.fromkeys(tensors, "one.safetensors") | {"more": "two.safetensors"}
    (branch / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def without_a_named_tensor(folder: Path) -> None:
    """One shard, and an index that names a tensor more than it holds."""
    from safetensors.torch import load_file

    branch = folder / "branch"
    shards = dict.fromkeys([*load_file(branch / "model.safetensors"), "more"], "one.safetensors")
    (branch / "model.safetensors").rename(branch / "one.safetensors")
    (branch / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def sentence_module(name: str, content: str) -> Callable[[Path], None]:
    """A module of a sentence model in both folders, the branch's file of it with another content."""

    def apply(folder: Path) -> None:
        for model in ("model", "branch"):
            worlds.written(
                f"{model}/modules.json", '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]'
            )(folder)
            worlds.written(f"{model}/1_Pooling/config.json", '{"pooling_mode": "mean"}')(folder)
            worlds.written(f"{model}/2_Dense/pytorch_model.bin", "weights")(folder)
        worlds.written(f"branch/{name}", content)(folder)

    return worlds.having("model", "branch", then=apply)


def llamas(**fields: Any) -> Callable[[Path], None]:
    """Both folders as Llamas, whose configuration transformers reads; the branch's with other fields."""

    def apply(folder: Path) -> None:
        for model, more in (("model", {}), ("branch", fields)):
            value = json.loads((folder / model / "config.json").read_text())
            kept = {
                name: value[name]
                for name in ("vocab_size", "hidden_size", "num_attention_heads", "tie_word_embeddings")
            }
            (folder / model / "config.json").write_text(json.dumps({"model_type": "llama", **kept, **more}))

    return worlds.having("model", "branch", then=apply)


CASES = (
    Case(
        mistake="weights of no bytes at all",
        command=LINEAR,
        prepare=with_bytes(lambda content: b""),
        says=DAMAGED.format("it has no header"),
    ),
    Case(
        mistake="weights that are an HTML page",
        command=LINEAR,
        prepare=with_bytes(lambda content: b"<!DOCTYPE html><html>Not found</html>"),
        says=DAMAGED.format("its header is longer than itself"),
    ),
    Case(
        mistake="weights with bytes left over",
        command=LINEAR,
        prepare=with_bytes(lambda content: content + b"more"),
        says=DAMAGED.format("its tensors end at byte … and the file at …"),
    ),
    Case(
        mistake="a header that is a list",
        command=LINEAR,
        prepare=header(lambda value: []),
        says=DAMAGED.format("its header is no JSON object"),
    ),
    Case(
        mistake="a header that is no UTF-8",
        command=LINEAR,
        prepare=header(lambda value: b'{"\xff": 1}'),
        says=DAMAGED.format("its header is no JSON: …"),
    ),
    Case(
        mistake="a header with a hundred thousand brackets",
        command=LINEAR,
        prepare=header(lambda value: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        says=DAMAGED.format("its header is …"),
    ),
    Case(
        mistake="a header with a number of 5,000 digits",
        command=LINEAR,
        prepare=header(lambda value: b'{"a":' + b"9" * 5_000 + b"}"),
        says=DAMAGED.format("its header is no JSON: 99999999999999999999 is out of range"),
    ),
    Case(
        mistake="metadata that are no texts",
        command=LINEAR,
        prepare=header(lambda value: value.update(__metadata__={"step": 3})),
        says=DAMAGED.format("__metadata__ holds more than texts"),
    ),
    Case(
        mistake="a tensor without a shape",
        command=LINEAR,
        prepare=header(lambda value: value[NORM].pop("shape") and None),
        says=DAMAGED.format(f"{NORM} has no dtype, shape and data_offsets, once each"),
    ),
    Case(
        mistake="a tensor that is a number",
        command=LINEAR,
        prepare=header(lambda value: value.update({NORM: 3})),
        says=DAMAGED.format(f"{NORM} is no description of a tensor"),
    ),
    Case(
        mistake="a negative offset",
        command=LINEAR,
        prepare=edited(data_offsets=[-8, 4]),
        says=DAMAGED.format(f"{NORM} has the data_offsets [-8, 4]"),
    ),
    Case(
        mistake="offsets that overlap those of another tensor",
        command=LINEAR,
        prepare=header(lambda value: value[NORM].update(data_offsets=[0, value[NORM]["data_offsets"][1] - value[NORM]["data_offsets"][0]])),
        says=DAMAGED.format("… does not begin where the tensor before it ends"),
    ),
    Case(
        mistake="a hole where a tensor was",
        command=LINEAR,
        prepare=header(lambda value: value.pop("model.layers.0.mlp.up_proj.weight") and None),
        says=DAMAGED.format("… does not begin where the tensor before it ends"),
    ),
    Case(
        mistake="a shape of more entries than there are bytes",
        command=LINEAR,
        prepare=edited(shape=[2**40]),
        says=DAMAGED.format(f"{NORM} has … bytes, and its shape needs 4,398,046,511,104"),
    ),
    Case(
        mistake="a shape of fractions",
        command=LINEAR,
        prepare=edited(shape=[1.5]),
        says=DAMAGED.format(f"{NORM} has the shape [1.5]"),
    ),
    Case(
        mistake="a dtype that does not exist",
        command=LINEAR,
        prepare=edited(dtype="F31"),
        says=DAMAGED.format(f"{NORM} is of an unknown dtype, F31"),
    ),
    Case(
        mistake="a dtype that only a quantiser computes in",
        command=LINEAR,
        prepare=header(lambda value: value[NORM].update(dtype="F8_E4M3", shape=[value[NORM]["shape"][0] * 4])),
        says=f"branch/model.safetensors: {NORM} is of dtype F8_E4M3; these are merged: …",
    ),
    Case(
        mistake="a folder in place of the weights",
        command=LINEAR,
        prepare=worlds.having(
            "model", "branch", then=worlds.both(worlds.removed("branch/model.safetensors"), worlds.written("branch/model.safetensors/x", ""))
        ),
        says="branch: holds no model.safetensors…; weights in another format must be converted first",
    ),
    Case(
        mistake="an index that names a file elsewhere",
        command=LINEAR,
        prepare=indexed({NORM: "../weights.safetensors"}),
        says="branch/model.safetensors.index.json: names a file outside its folder, '../weights.safetensors'; a model's shards lie beside its index; do not trust this folder",
    ),
    Case(
        mistake="an index that names a file of the system",
        command=LINEAR,
        prepare=indexed({NORM: "/etc/hostname"}),
        says="branch/model.safetensors.index.json: names a file outside its folder, '/etc/hostname'; a model's shards lie beside its index; do not trust this folder",
    ),
    Case(
        mistake="an index with numbers for files",
        command=LINEAR,
        prepare=indexed({NORM: 1}),
        says="branch/model.safetensors.index.json: holds no weight_map; the file is damaged; copy the folder again",
    ),
    Case(
        mistake="a tensor in two shards",
        command=LINEAR,
        prepare=worlds.having("model", "branch", then=in_two_files),
        says=f"branch: {NORM} stands in two files; the folder holds the shards of two models",
    ),
    Case(
        mistake="an index that names a tensor which no shard holds",
        command=LINEAR,
        prepare=worlds.having("model", "branch", then=without_a_named_tensor),
        says="branch/model.safetensors.index.json: names more, which no shard holds; copy the whole folder again",
    ),
    Case(
        mistake="a configuration of another function, by a field that its class declares",
        command=LINEAR,
        prepare=llamas(rms_norm_eps=1e-3),
        says="branch/config.json: rms_norm_eps is 0.001, and 1e-06 in model; the same weights compute something else then: models of one configuration can be merged",
    ),
    Case(
        mistake="a configuration whose class refuses a field",
        command=LINEAR,
        prepare=llamas(hidden_size="wide"),
        says="branch/config.json: is no configuration of a llama (…hidden_size…); correct this field",
    ),
    Case(
        mistake="sentence models that pool otherwise",
        command=LINEAR,
        prepare=sentence_module("1_Pooling/config.json", '{"pooling_mode": "cls"}'),
        says="branch/1_Pooling/config.json: pooling_mode is cls, and mean in model; sentence models of the same modules can be merged",
    ),
    Case(
        mistake="sentence models with other modules",
        command=LINEAR,
        prepare=sentence_module("modules.json", '[{"path": ""}, {"path": "1_Pooling"}]'),
        says="branch/modules.json: has the modules 1_Pooling, and model 1_Pooling, 2_Dense; sentence models of the same modules can be merged",
    ),
    Case(
        mistake="a sentence model's module that lies elsewhere",
        command=LINEAR,
        prepare=sentence_module("modules.json", '[{"path": "../model/1_Pooling"}]'),
        says="branch/modules.json: names a folder outside its own, '../model/1_Pooling'; do not trust this folder",
    ),
    Case(
        mistake="modules whose pickled weights differ",
        command=LINEAR,
        prepare=sentence_module("2_Dense/pytorch_model.bin", "other weights"),
        says="branch/2_Dense/pytorch_model.bin: is another than that of model, and no safetensors file; save the models again with a newer version of sentence-transformers",
    ),
    Case(
        mistake="a tokenizer whose ids are texts",
        command=LINEAR + " --tokenizer first",
        prepare=worlds.having(
            "model", "branch", then=worlds.written("branch/tokenizer.json", '{"model": {"vocab": {"a": "0"}}}')
        ),
        says="branch/tokenizer.json: holds no vocabulary; it is damaged or of an unknown kind",
    ),
)  # fmt: skip
