"""A model's folder is read as transformers reads it, in the precision that was asked for, and nothing wrong in it is silent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from koine.errors import KoineWarning, UserError
from koine.model import CausalLM, Decoder, ModelConfig, load_causal_lm, load_model, save_model
from koine.model.causal_lm import load_as_stored
from koine.model.formats import checksum
from koine.model.formats.directory import StoredWeights
from koine.model.formats.eos_ids import eos_ids
from koine.model.formats.weight_files import weight_files, widest_dtype

transformers = pytest.importorskip("transformers", reason="the classes need the extra [hf]")

LLAMA: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def llama(folder: Path, seed: int = 0, **named: Any) -> Path:
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **named))
    model.save_pretrained(folder)
    return folder


def ids() -> torch.Tensor:
    return torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(2))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.logits(model(ids()))
    return out


# Which file


@pytest.mark.parametrize("beside", ["index", "pickled", "variant"])
def test_the_file_that_transformers_reads_is_read(beside: str, tmp_path: Path) -> None:
    """A whole safetensors file and something else lie side by side, with other weights."""
    folder, other = llama(tmp_path / "model"), llama(tmp_path / "other", seed=1)
    if beside == "index":
        shutil.copy(other / "model.safetensors", folder / "model-00001-of-00001.safetensors")
        names = dict.fromkeys(load_file(other / "model.safetensors"), "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": names})
        )
    elif beside == "pickled":
        torch.save(load_file(other / "model.safetensors"), folder / "pytorch_model.bin")
    else:
        shutil.copy(other / "model.safetensors", folder / "model.fp16.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert (logits(load_causal_lm(folder)) - theirs(ids()).logits).abs().max() <= 1e-5
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_our_decoder_and_merging_read_the_same_file(tiny: ModelConfig, tmp_path: Path) -> None:
    from koine.combine.safetensors_stream import Checkpoint

    model = Decoder(tiny)
    save_model(model, tmp_path / "model")
    shard = tmp_path / "model" / "model-00001-of-00001.safetensors"
    stored = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in stored.items()}, shard)
    index = {"weight_map": dict.fromkeys(stored, shard.name)}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = load_model(tmp_path / "model")
    assert torch.equal(opened.norm.weight, model.norm.weight)
    checkpoint = Checkpoint(tmp_path / "model")
    assert torch.equal(checkpoint.read("model.norm.weight"), stored["model.norm.weight"])
    checkpoint.close()


def test_pickled_weights_alone(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    expected = logits(load_causal_lm(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits(load_causal_lm(folder)), expected)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors", ""]
)
def test_shards_outside_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="names a file outside its folder"):
        weight_files(tmp_path)


# Precision


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "falcon_h1", "gemma3_text"])
def test_float32_is_float32(kind: str, tmp_path: Path) -> None:
    """Weights stored in bfloat16, a few in float32, config.json says bfloat16: everything is computed in float32."""
    fields = LLAMA | {"head_dim": 8, "num_key_value_heads": 2}
    own = {"gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2}, "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    }}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**fields, **own.get(kind, {}))
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    stored = load_file(tmp_path / "m/model.safetensors")
    mixed = {name: t.float() if "norm" in name else t for name, t in stored.items()}
    for name in mixed:
        if "norm" in name:
            mixed[name] = mixed[name] + 1e-3 * torch.randn_like(mixed[name])
    save_file(mixed, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    ours = load_causal_lm(tmp_path / "m", dtype=torch.float32)
    assert isinstance(ours, CausalLM)
    assert {p.dtype for p in (*ours.parameters(), *ours.buffers()) if p.is_floating_point()} == {
        torch.float32
    }
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    if kind != "gpt_oss":  # whose experts have no float64
        exact = exact.double()
    with torch.no_grad():
        expected = exact(ids(), use_cache=False).logits
    got = logits(ours)
    assert got.dtype == torch.float32
    # bfloat16 would be off by 1e-3 and more.
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
    ours.inner.save_pretrained(tmp_path / "again")
    assert {t.dtype for t in load_file(tmp_path / "again/model.safetensors").values()} == {torch.float32}


def test_stored_weights_are_not_rounded_where_they_are_written_again(tmp_path: Path) -> None:
    """config.json says bfloat16, the file holds float32: what trains or rewrites a model takes the file's word."""
    folder = llama(tmp_path / "m")
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(value | {"dtype": "bfloat16"}))
    assert widest_dtype(folder) == torch.float32
    opened = load_as_stored(folder)
    assert isinstance(opened, CausalLM)
    stored = load_file(folder / "model.safetensors")
    state = opened.inner.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_our_decoder_opens_the_widest_dtype_of_mixed_storage(tiny: ModelConfig, tmp_path: Path) -> None:
    model = Decoder(tiny)
    save_model(model, tmp_path / "m")
    stored = load_file(tmp_path / "m/model.safetensors")
    mixed = {name: t.bfloat16() if name == "model.norm.weight" else t for name, t in stored.items()}
    save_file(mixed, tmp_path / "m/model.safetensors")
    opened = load_model(tmp_path / "m")
    assert torch.equal(opened.embedding.weight, model.embedding.weight)
    assert load_model(tmp_path / "m", dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16


# What does not belong together


def test_tensors_that_nothing_reads_are_said(tmp_path: Path) -> None:
    """Fewer layers in config.json than in the weights: transformers is silent, the scores are of half a model."""
    folder = llama(tmp_path / "m")
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(value | {"num_hidden_layers": 1}))
    with pytest.warns(
        KoineWarning, match=r"9 tensors of the weights belong to no part of the model.*layers\.1\."
    ):
        load_causal_lm(folder)


def test_nan_in_the_weights_of_another_class(tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    stored["model.norm.weight"][3] = float("nan")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN"):
        load_causal_lm(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 5}, {"num_attention_heads": 0}, {"hidden_size": -4}, {"hidden_size": None}, {"rms_norm_eps": "x"},
        {"rope_parameters": []}, {"rope_parameters": {"rope_type": "none of these"}}, {"hidden_act": "sulu"}, {"num_hidden_layers": 1.5},
        {"torch_dtype": 7, "dtype": None}, {"vocab_size": 10**9}, {"model_type": ["llama"]}, {"layer_types": 3}, {"auto_map": 3, "model_type": "x"},
        {"quantization_config": {"quant_method": "awq"}}, {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, {"quantization_config": {"quant_method": "nothing"}},
        {"quantization_config": 3}, {"tie_word_embeddings": "maybe"}, {"max_position_embeddings": "long"}, {"head_dim": 7},
        {"transformers_weights": "../x.safetensors"}, {"architectures": 7}, {"pad_token_id": "x"},
    ],
)  # fmt: skip
def test_every_odd_configuration_is_one_line_or_a_model(change: dict[str, Any], tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(value | change))
    said, model = "", None
    try:
        model = load_causal_lm(folder)
    except UserError as error:
        said = str(error)
    if model is None:
        assert str(folder) in said
        assert len(said) < 600
    else:
        assert torch.isfinite(logits(model)).all()


# Ends


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 5]}, {"eos_token_id": 2}, {2, 3, 5}),
        ({"eos_token_id": 4}, {}, {4}),
        (None, {"text_config": {"eos_token_id": [6]}}, {6}),
        ({"eos_token_id": None}, {"eos_token_id": -1}, set()),
    ],
)
def test_eos_ids(generation: Any, config: Any, expected: set[int], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_ids(tmp_path) == expected


def test_ends_of_our_decoder_are_opened_and_saved(tiny: ModelConfig, tmp_path: Path) -> None:
    save_model(Decoder(tiny), tmp_path / "m")
    path = tmp_path / "m/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [98, 7]}))
    opened = load_model(tmp_path / "m")
    assert opened.eos_ids == {98, 7}
    save_model(opened, tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text())["eos_token_id"] == [98, 7]


# Checksums


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


def test_a_file_is_read_for_its_checksum_once(
    tiny: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes with size and time put back is read again: its inode's own time tells."""
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


def test_nothing_is_remembered_where_nothing_can_be_written(
    tiny: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(Decoder(tiny), tmp_path / "m")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    load_model(tmp_path / "m")
    load_model(tmp_path / "m")


def test_memory_of_checked_files_does_not_grow_for_ever(
    tiny: ModelConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksum, "REMEMBERED", 8)
    save_model(Decoder(tiny), tmp_path / "m")
    for _ in range(20):
        os.utime(tmp_path / "m/model.safetensors")
        load_model(tmp_path / "m")
    assert 1 <= len(list((cache / "koine/whole-weights").iterdir())) <= 8


def test_sealing_a_file_of_another_library_keeps_its_tensors_and_metadata(tmp_path: Path) -> None:
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


def test_weights_without_a_checksum_are_as_good(tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    load_causal_lm(folder)
    checksum.write_checksums(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="does not match the sha256"):
        load_causal_lm(folder)
