"""Checksums inside safetensors files: damage is found, and verified files are not read again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from koine.errors import UserError
from koine.model import Decoder, ModelConfig, load_causal_lm, load_model, save_model
from koine.model.formats import checksum
from koine.model.formats.directory import StoredWeights
from tests.model.formats.conftest import llama

transformers = pytest.importorskip("transformers", reason="the classes need the extra [hf]")


def test_every_flipped_byte_is_found(tiny: ModelConfig, tmp_path: Path) -> None:
    save_model(Decoder(tiny), tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        assert set(file.metadata()) == {"format", "sha256"}
    checksum.verify_checksums([path])
    # In the key itself the weights are whole, and carry no checksum.
    said = whole.index(b'"sha256":"') + 10
    places = [
        *range(said, said + 64, 5),
        *range(said + 70, 400, 7),
        *range(len(whole) // 3, len(whole), len(whole) // 23),
        len(whole) - 1,
    ]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            load_model(tmp_path / "m")
    path.write_bytes(whole)
    load_model(tmp_path / "m")


def test_a_verified_file_is_not_read_again(
    tiny: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes, with size and mtime restored, is read again: its ctime differs."""
    save_model(Decoder(tiny), tmp_path / "m")
    path, calls = tmp_path / "m/model.safetensors", []
    digest = checksum._digest
    monkeypatch.setattr(checksum, "_digest", lambda *a: calls.append(a) or digest(*a))
    for _ in range(3):
        StoredWeights(tmp_path / "m")
    assert len(calls) == 1
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="does not match the sha256 that it carries"):
        StoredWeights(tmp_path / "m")
    assert len(calls) == 2


def test_verification_works_without_a_cache_folder(
    tiny: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(Decoder(tiny), tmp_path / "m")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    load_model(tmp_path / "m")
    load_model(tmp_path / "m")


def test_the_cache_of_verified_files_is_bounded(
    tiny: ModelConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksum, "MOST_REMEMBERED", 8)
    save_model(Decoder(tiny), tmp_path / "m")
    for _ in range(20):
        os.utime(tmp_path / "m/model.safetensors")
        load_model(tmp_path / "m")
    assert 1 <= len(list((cache / "koine/whole-weights").iterdir())) <= 8


def test_a_checksum_in_a_file_of_another_library_keeps_tensors_and_metadata(tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    before = load_file(folder / "model.safetensors")
    checksum.write_checksums(folder)
    checksum.verify_checksums([folder / "model.safetensors"])
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    once = (folder / "model.safetensors").read_bytes()
    checksum.write_checksums(folder)
    assert (folder / "model.safetensors").read_bytes() == once
    assert transformers.AutoModelForCausalLM.from_pretrained(folder) is not None


def test_weights_without_a_checksum_open(tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    load_causal_lm(folder)
    checksum.write_checksums(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="does not match the sha256"):
        load_causal_lm(folder)


def test_weights_of_a_library_get_the_permissions_of_other_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").chmod(0o600)
    checksum.write_checksums(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode
