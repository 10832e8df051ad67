"""The index of a checkpoint from somebody else cannot run a command, whatever it contains."""

from __future__ import annotations

import collections
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from koine.errors import UserError
from koine.files import sha256_file
from koine.train import LanguageModelling, TrainSettings, train
from koine.train.checkpoint_index import read_index
from koine.train.export import export_checkpoint

from .fakes import fake_order
from .models import small_model

SETTINGS = TrainSettings(dtype="float32", threads=1, learning_rate=1e-2, checkpoint_every=2, evaluate_every=2)


def run(out: Path, shards: Path, steps: int = 6) -> None:
    train(
        small_model(), LanguageModelling(), fake_order(shards, steps=(steps,)), SETTINGS, out=out,
        evaluate=lambda model, done: {"loss": abs(done - 4.0)}, progress=False, device="cpu",
    )  # fmt: skip


@pytest.fixture
def best(tmp_path: Path) -> Path:
    run(tmp_path / "out", tmp_path / "shards")
    return tmp_path / "out" / "checkpoints" / "step-000004"


class _Call:
    """Pickled as a call of `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


META = "torch.distributed.checkpoint.metadata"


def hostile(mark: Path) -> dict[str, bytes]:
    """Indexes that would write the file `mark`, change a class of the process, or exhaust the memory."""
    command = f"touch {mark}"
    whole = Metadata({}, {}, {})
    nested = Metadata({"weights.a": _Call(os.system, command)}, {}, {})
    # A class of the list whose constructor is replaced: BUILD with a state of slots calls `setattr` on the
    # class.
    build = _global(META, "Metadata") + b"(N}" + _text("from_me") + b"K\x01stb."
    function = _global("torch.serialization", "_get_layout") + b"(N}" + _text("from_me") + b"K\x01stb."
    return {
        "a command": pickle.dumps(_Call(os.system, command)),
        "a command inside an index": pickle.dumps(nested),
        "eval": pickle.dumps(_Call(eval, f"__import__('os').system({command!r})")),
        "getattr": pickle.dumps(_Call(getattr, whole, "__class__")),
        "a dotted name": b"\x80\x04" + _short(META) + _short("os.system") + b"\x93" + _short(command) + b"\x85R.",
        "a name inside an allowed module": _global(META, "os") + b".",
        "a gadget of torch": _global("torch.storage", "_load_from_bytes") + b"(" + _text("x") + b"tR.",
        "torch.load by another name": _global("torch.serialization", "load") + b"(" + _text("x") + b"tR.",
        "an old-style call": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "an object of a class": b"(" + _global("os", "system") + _text(command) + b"o.",
        "a class that is changed": build,
        "a function that is changed": function,
        "partial": pickle.dumps(_Call(__import__("functools").partial, os.system, command)),
        "map": pickle.dumps(_Call(map, os.system, [command])),
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent id": b"Pfile\n.",
        "a memo of two thousand million": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "a text of eight exabytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b"x.",
        "a number of a gigabyte": b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"x.",
        "a frame that never ends": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        "nothing": b"",
        "no pickle": b"{}",
        "cut short": pickle.dumps(whole)[:-5],
        "another thing": pickle.dumps({"a": 1}),
        "a container": pickle.dumps(collections.OrderedDict(a=1)),
        "deeply nested": b"]" * 100_000 + b"a" * 99_999 + b".",
    }  # fmt: skip


def _short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


NAMES = sorted(hostile(Path("mark")))


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_index_is_one_line(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / ".metadata").write_bytes(hostile(mark)[name])
    with pytest.raises(UserError, match="its index is not one of a checkpoint"):
        read_index(tmp_path)
    assert not mark.exists()
    assert not hasattr(Metadata, "from_me")


def replace_index(checkpoint: Path, content: bytes) -> None:
    """Update the sha256 in `checkpoint.json`, as somebody who sends a hostile folder would."""
    (checkpoint / ".metadata").write_bytes(content)
    about = json.loads((checkpoint / "checkpoint.json").read_text())
    about["files"][".metadata"] = sha256_file(checkpoint / ".metadata")
    (checkpoint / "checkpoint.json").write_text(json.dumps(about))


def test_export_and_resume_run_nothing(best: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    replace_index(best, pickle.dumps(_Call(os.system, f"touch {mark}")))
    with pytest.raises(UserError, match="its index is not one of a checkpoint"):
        export_checkpoint(best, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (tmp_path / "out" / "training.json").unlink()
    with pytest.raises(UserError, match="its index is not one of a checkpoint"):
        run(tmp_path / "out", tmp_path / "shards")
    assert not mark.exists()


def changed(name: str, folder: Path) -> Metadata:
    """Return a real index with one field changed."""
    index = read_index(folder)
    about = index.state_dict_metadata
    first = "weights.embedding.weight"
    place = next(key for key in index.storage_data if key.fqn == first)
    info = index.storage_data[place]
    tensor = about[first]
    assert isinstance(tensor, TensorStorageMetadata)
    if name == "bytes in place of a tensor":
        # torch would read these by an unpickler without any restriction.
        about[first] = BytesStorageMetadata()
    elif name == "a file outside":
        info.relative_path = "../../../training.json"
    elif name == "an absolute file":
        info.relative_path = "/etc/passwd"
    elif name == "beyond the end of a file":
        info.length = 10**12
    elif name == "a negative place":
        info.offset = -4
    elif name == "an encoded tensor":
        info.transform_descriptors = ["zstd"]
    elif name == "more memory than there is":
        huge = torch.Size([2**40, 2**10])
        about[first] = TensorStorageMetadata(
            TensorProperties(dtype=torch.float32), huge, [ChunkStorageMetadata(torch.Size([0, 0]), huge)]
        )
    elif name == "a part that lies nowhere":
        index.storage_data = {key: one for key, one in index.storage_data.items() if key.fqn != first}
    elif name == "a hole":
        tensor.chunks = []
    elif name == "a key of another kind":
        index.storage_data["key"] = info
    else:
        assert name == "no places"
        index.storage_data = None
    return index


CHANGES = [
    "bytes in place of a tensor", "a file outside", "an absolute file", "beyond the end of a file", "a negative place",
    "an encoded tensor", "more memory than there is", "a part that lies nowhere", "a hole", "a key of another kind",
    "no places",
]  # fmt: skip


def test_an_inconsistent_index_is_one_line(best: Path, tmp_path: Path) -> None:
    for name in CHANGES:
        index = changed(name, best)
        before = (best / ".metadata").read_bytes()
        replace_index(best, pickle.dumps(index))
        with pytest.raises(UserError, match="its index is not one of a checkpoint"):
            export_checkpoint(best, tmp_path / "model")
        replace_index(best, before)
    export_checkpoint(best, tmp_path / "model")


def test_damaged_tensor_bytes_are_one_line(best: Path, tmp_path: Path) -> None:
    """Each tensor is read by torch with `weights_only`; what that refuses ends in one line too."""
    mark = tmp_path / "mark"
    file = best / "__0_0.distcp"
    index = read_index(best)
    content = bytearray(file.read_bytes())
    for info in index.storage_data.values():
        call = pickle.dumps(_Call(os.system, f"touch {mark}"), protocol=2)
        content[info.offset : info.offset + len(call)] = call
    file.write_bytes(content)
    about = json.loads((best / "checkpoint.json").read_text())
    about["files"][file.name] = sha256_file(file)
    (best / "checkpoint.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="its tensors are not those of this training"):
        export_checkpoint(best, tmp_path / "model")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("files", ["model.safetensors"]),
        ("files", {"../../secret": "00"}),
        ("files", {}),
        ("step", -1),
        ("step", "4"),
        ("step", True),
        ("random_state", "####"),
        ("random_state", "AAAA"),
        ("losses", ["1.0"]),
        ("losses", None),
        ("best", [1]),
        ("identity", "x"),
        ("rounding", None),
    ],
)
def test_fields_of_checkpoint_json_are_checked(field: str, value: Any, best: Path, tmp_path: Path) -> None:
    about = json.loads((best / "checkpoint.json").read_text())
    (best / "checkpoint.json").write_text(json.dumps({**about, field: value}))
    (tmp_path / "out" / "training.json").unlink()
    with pytest.raises(UserError, match="damaged checkpoint"):
        run(tmp_path / "out", tmp_path / "shards")


def test_an_index_that_torch_wrote_is_read(best: Path) -> None:
    """Checkpoints of earlier versions have torch's own index, with the folder's path and a random number."""
    from torch.distributed.checkpoint.metadata import StorageMeta

    index = read_index(best)
    index.storage_meta = StorageMeta(checkpoint_id=best, save_id="93606e13-a338-471d-b3bd-5278e872aa62")
    index.version = "1.0.0"
    (best / ".metadata").write_bytes(pickle.dumps(index))
    again = read_index(best)
    assert again.state_dict_metadata == index.state_dict_metadata
    assert again.storage_data == index.storage_data


def test_the_best_checkpoint_is_the_same_bytes_in_every_run(tmp_path: Path) -> None:
    """It holds no path, time or random number: two runs in two folders are equal."""
    for name in ("one", "another place"):
        run(tmp_path / name / "out", tmp_path / "shards")
    first, second = (tmp_path / name / "out" / "checkpoints" for name in ("one", "another place"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert Path("step-000004/.metadata") in files
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
