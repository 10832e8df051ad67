"""Commands outside a run: each leaves a record and, beside a model, a card; `koine lineage` reads the chain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard, ModelCardData

from koine.cli.main import cli
from koine.errors import UserError

TRAIN = "--steps 2 --sequence-length 32 --batch-size 2 --learning-rate 1e-3 --warmup-steps 1 --device cpu"


def koine(words: str) -> str:
    done = CliRunner().invoke(cli, words.split(), prog_name="koine", catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of every command that makes one."""
    folder = tmp_path_factory.mktemp("lineage")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        koine(
            "data sample --languages de,en --documents-per-language 20 --questions-per-language 20 --code-bytes 0 --out world"
        )
        koine(
            "tokenizer train --data world/documents --vocab-size 400 --sample-bytes 5000 --english-share 0.5 --max-repeats 20 --out tokenizer"
        )
        koine(
            "tokenizer train --data world/documents --vocab-size 420 --sample-bytes 5000 --english-share 0.5 --max-repeats 20 --out other-tokenizer"
        )
        koine("data tokenize world/documents --tokenizer tokenizer --out tokens")
        koine("data tokenize world/questions/train --tokenizer tokenizer --out chats")
        koine(f"train pretrain --data tokens --tokenizer tokenizer --preset koine-0.5m {TRAIN} --out base")
        shutil.copytree("base", "foreign")
        Path("foreign/artifact.json").unlink()
        koine(f"train pretrain --data tokens --model base {TRAIN} --seed 1 --out one")
        koine(f"train sft --data chats --model foreign {TRAIN} --sequence-length 128 --seed 2 --out two")
        koine("merge linear one two --out soup")
        koine("upcycle btx --seed-model base --experts one --out mixture")
        koine("extend mixture --expert two --reset-router --out extended")
        koine("extend extended --remove two --out smaller")
        koine("tokenizer adapt base --tokenizer other-tokenizer --out moved")
        checkpoint = (
            next(Path("one/checkpoints").iterdir(), None) if Path("one/checkpoints").is_dir() else None
        )
        assert checkpoint is None, "without an evaluation no checkpoint is kept"
    return folder


MODELS: dict[str, tuple[str, str | list[str] | None, str | None, str]] = {
    "base": ("koine train pretrain", None, None, "transformers"),
    "one": ("koine train pretrain", "base", "finetune", "transformers"),
    "two": ("koine train sft", "foreign", "finetune", "transformers"),
    "soup": ("koine merge linear", ["one", "two"], "merge", "transformers"),
    "mixture": ("koine upcycle btx", ["base", "one"], "merge", "koine"),
    "extended": ("koine extend", ["mixture", "two"], "merge", "koine"),
    "smaller": ("koine extend", "extended", "finetune", "koine"),
    "moved": ("koine tokenizer adapt", "base", "finetune", "transformers"),
}


@pytest.mark.parametrize("name", MODELS)
def test_record_and_card_of_each_command(place: Path, name: str) -> None:
    step, parents, relation, library = MODELS[name]
    record = json.loads((place / name / "artifact.json").read_text())
    assert record["step"] == step
    assert "model.safetensors" in record["files"]
    assert "README.md" in record["files"]
    listed = [parent["name"] for parent in record["parents"]]
    assert set([parents] if isinstance(parents, str) else parents or []) <= set(listed)
    card = ModelCard.load(place / name / "README.md")
    fields = card.data.to_dict()
    ModelCardData(ignore_metadata_errors=False, **fields)
    base = fields.get("base_model")
    names = [Path(one).name for one in ([base] if isinstance(base, str) else base or [])]
    assert names == ([parents] if isinstance(parents, str) else parents or [])
    assert fields.get("base_model_relation") == relation
    assert fields["library_name"] == library
    assert fields["language"] == ["de", "en"]
    assert fields["pipeline_tag"] == "text-generation"
    assert "license" not in fields
    assert "licence is declared" in card.text


@pytest.mark.parametrize("name", ["world", "tokenizer", "tokens"])
def test_what_models_are_made_from_has_a_record(place: Path, name: str) -> None:
    assert json.loads((place / name / "artifact.json").read_text())["files"]


def test_the_whole_chain_of_a_merge(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lines = koine("lineage soup").splitlines()
    named = [" ".join(line.strip("│├└─ ").split("  ")[0].split()) for line in lines]
    assert named[:3] == ["soup", "one", "base"]
    assert {"two", "foreign", "tokens", "chats", "tokenizer", "world"} <= set(named)
    assert "loss=" in lines[1]
    assert koine("lineage soup --verify").endswith("verified: every file matches its record\n")
    tree: dict[str, Any] = json.loads(koine("lineage soup --json"))
    assert [parent["name"] for parent in tree["parents"]] == ["one", "two"]
    assert tree["parameters"]["weights"] is None


def test_verification_finds_a_changed_parent(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    # The copy's records lead to the copy only where the original is gone.
    record = json.loads(Path("soup/artifact.json").read_text())
    for parent in record["parents"]:
        parent["path"] = str(Path(parent["path"].replace(str(place), str(tmp_path / "copy"))))
    Path("soup/artifact.json").write_text(json.dumps(record))
    with Path("one/model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="'model.safetensors' is not what was built") as caught:
        koine("lineage soup --verify")
    assert caught.value.hint == "remove the folder, and run the plan or command again that made it"


def test_a_training_without_an_end_has_no_lineage_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        koine("lineage model")
    wanted = "model: holds no artifact.json; its training is not finished; run the same command again"
    assert str(caught.value) == wanted


def test_an_exported_checkpoint_says_where_it_comes_from(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    probe = "--evaluate-every 1 --evaluate-data world/documents-heldout --evaluate-limit 1"
    koine(f"train pretrain --data tokens --model base {TRAIN} --seed 3 {probe} --out three")
    [checkpoint] = Path("three/checkpoints").iterdir()
    koine(f"model export {checkpoint} --format safetensors --out exported")
    record = json.loads(Path("exported/artifact.json").read_text())
    assert [(one["name"], one["inside"]) for one in record["parents"]] == [
        ("three", checkpoint.as_posix()[6:])
    ]
    card = ModelCard.load("exported/README.md")
    assert card.data.base_model == "base"
    assert "`bits_per_byte`" in card.text


def test_a_complete_training_that_lost_its_record_gets_it_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    again = f"train pretrain --data tokens --model base {TRAIN} --seed 1 --out one"
    before = Path("one/artifact.json").read_bytes()
    koine(again)
    assert Path("one/artifact.json").read_bytes() == before
    Path("one/artifact.json").unlink()
    koine(again)
    assert json.loads(Path("one/artifact.json").read_text())["files"] == json.loads(before)["files"]
    Path("one/artifact.json").write_bytes(before)
