"""Model directories that are written one tensor after the other."""

from __future__ import annotations

import errno
import gc
import json
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from koine.errors import UserError
from koine.model import Decoder, ModelConfig, load_model, save_model
from koine.model.formats.checksum import stored_checksum, verify_checksums
from koine.model.formats.directory import save_streamed, to_canonical

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Fresh(Mapping[str, Tensor]):
    """Copies of tensors, which counts the bytes of those that are still alive."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.alive, self.most = tensors, 0, 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name].clone()
        size = tensor.numel() * tensor.itemsize
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor.untyped_storage(), self._freed, size)
        return tensor

    def _freed(self, size: int) -> None:
        self.alive -= size

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.fixture
def model(tiny: ModelConfig) -> Decoder:
    # The heads of a class that `transformers` has.
    return Decoder(replace(tiny, head_dim=8)).eval()


def parts(model: Decoder) -> tuple[dict[str, Tensor], Layout]:
    tensors = {name: one.detach() for name, one in to_canonical(model.state_dict(), model.config).items()}
    return tensors, {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()}


def test_it_is_what_save_model_writes(model: Decoder, tmp_path: Path) -> None:
    save_streamed(*parts(model), model.config, tmp_path / "streamed")
    save_model(model, tmp_path / "saved")
    got, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "saved"))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "streamed").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip


def test_the_same_tensors_give_the_same_bytes_with_a_checksum(model: Decoder, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_streamed(*parts(model), model.config, tmp_path / name)
    first, second = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert stored_checksum(first) is not None
    verify_checksums([first])
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    with pytest.raises(UserError, match="does not match the sha256 that it carries"):
        verify_checksums([first])


def test_large_weights_are_written_in_shards(model: Decoder, tmp_path: Path) -> None:
    """With an index, and a checksum in each; `transformers` opens them."""
    save_streamed(*parts(model), model.config, tmp_path, max_shard_bytes=40_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {tmp_path / name for name in index["weight_map"].values()} == set(shards)
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    for shard in shards:
        assert shard.stat().st_size < 45_000
        assert stored_checksum(shard) is not None
    again = load_model(tmp_path)
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(0, 99, (1, 9))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
        assert torch.allclose(theirs, model.logits(model(tokens)), atol=1e-4)


def test_memory_is_that_of_a_few_tensors(model: Decoder, tmp_path: Path) -> None:
    tensors, layout = parts(model)
    fresh = Fresh(tensors)
    save_streamed(fresh, layout, model.config, tmp_path)
    largest = max(one.numel() * one.itemsize for one in tensors.values())
    # One that is computed, one that is written, one that is hashed.
    assert fresh.most <= 3 * largest
    assert fresh.most < sum(one.numel() * one.itemsize for one in tensors.values()) / 4
    gc.collect()
    assert fresh.alive == 0


def test_a_failure_leaves_the_folder_as_it_was(
    model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, layout = parts(model)

    class Failing(Fresh):
        def __getitem__(self, name: str) -> Tensor:
            if name.startswith("model.layers.2"):
                raise UserError("holds NaN or infinity")
            return super().__getitem__(name)

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    for name in ("old", "new"):
        with pytest.raises(UserError, match="holds NaN"):
            save_streamed(Failing(tensors), layout, model.config, tmp_path / name)
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "new").exists()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match="the disk is full"):
        save_streamed(tensors, layout, model.config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
