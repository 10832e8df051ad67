"""Commands with `--out`: what appears meanwhile stays, no result is lost, and nothing is left over.

`test_streams.py` has pipes, devices and standard output.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from koine.cli.main import cli, expand_home, main
from koine.errors import UserError
from koine.files import atomic_file, claim, outputs
from tests.bad_inputs import worlds

# Of texts that are too few for the weights of their languages.
pytestmark = pytest.mark.filterwarnings("ignore::koine.errors.KoineWarning")

FOLDERS = {
    "data sample": "data sample --languages de --documents-per-language 5 --questions-per-language 5 --code-bytes 0 --out new",
    "data tokenize": "data tokenize text.jsonl --tokenizer tokenizer --out new",
    "tokenizer train": "tokenizer train --data text.jsonl --vocab-size 300 --min-frequency 2 --out new",
    "tokenizer extend": "tokenizer extend tokenizer --data text.jsonl --tokens 3 --out new",
    "tokenizer adapt": "tokenizer adapt model --tokenizer tokenizer --out new",
    "upcycle btx": "upcycle btx --seed-model model --experts branch --out new",
    "upcycle bam": "upcycle bam --seed-model model --experts branch --out new",
    "upcycle nexus": "upcycle nexus --seed-model model --experts branch --router linear --out new",
    "extend": "extend mixture --expert third=branch --reset-router --out new",
    "merge": "merge linear model branch --weights 0.5,0.5 --out new",
    "model export": "model export checkpoint --format safetensors --out new",
    "model import": "model import gguf/model.gguf --out new",
}
FILES = {
    "evaluate": "evaluate model --data text.jsonl --out new",
    "merge search": "merge search model branch --data text.jsonl --limit 2 --parts 1 --rounds 0 --out new",
    "tokenizer measure": "tokenizer measure tokenizer --data text.jsonl --out new",
    "tokenizer report": "tokenizer measure tokenizer --data text.jsonl --report new",
    "gguf": "model export exportable --format gguf --out new",
    "report": "report run --out new",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the commands read."""
    import shutil

    from tests.plan.sample_run import write_sample_run

    worlds.having("tokenizer", "text", "model", "branch", "mixture", "exportable", "gguf")(tmp_path)
    write_sample_run(tmp_path / "run")
    shutil.copytree(worlds.built("halfway") / "checkpoints" / "step-000001", tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> None:
    cli.main(shlex.split(command), standalone_mode=False)


def left(place: Path) -> list[str]:
    """Hidden names: locks, half-written things, work."""
    return sorted(path.name for path in place.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("command", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_appears_is_kept_and_overwrite_replaces_it(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = outputs.fsync_tree

    def appear(folder: Path) -> None:
        sync(folder)
        (place / "new").mkdir()
        (place / "new/mine").write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "fsync_tree", appear)
        with pytest.raises(UserError, match="new: appeared or changed while this ran"):
            run(command)
    assert [path.name for path in (place / "new").iterdir()] == ["mine"]
    with pytest.raises(UserError, match="new: exists already"):
        run(command)
    assert left(place) == []
    run(command + " --overwrite")
    assert not (place / "new/mine").exists()
    assert len(list((place / "new").iterdir())) > 0
    assert left(place) == []


@pytest.mark.parametrize("command", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_another_command_writes_is_not_begun(command: str, place: Path) -> None:
    with claim(place / "new"), pytest.raises(UserError, match="new: another process is writing it"):
        run(command)
    assert left(place) == []


@pytest.mark.parametrize("command", FOLDERS.values(), ids=FOLDERS)
def test_a_link_stays_and_what_it_leads_to_is_written(command: str, place: Path) -> None:
    (place / "disk").mkdir()
    (place / "new").symlink_to("disk/there")
    run(command)
    assert (place / "new").is_symlink()
    assert len(list((place / "disk/there").iterdir())) > 0
    assert left(place) == left(place / "disk") == []


@pytest.mark.parametrize("command", FILES.values(), ids=FILES)
def test_files_are_replaced_with_overwrite_alone(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_file(place / "new") as file:
        with pytest.raises(UserError, match="new: another process is writing it"):
            run(command)
        file.write_text("theirs")
    with pytest.raises(UserError, match="new: exists already; add --overwrite"):
        run(command)
    assert (place / "new").read_text() == "theirs"
    run(command + " --overwrite")
    assert (place / "new").stat().st_size > 20
    (place / "new").unlink()
    name = outputs._name_file

    def appear(*arguments: object) -> None:
        (place / "new").write_text("theirs")
        name(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(outputs, "_name_file", appear)
    with pytest.raises(UserError, match="new: appeared or changed"):
        run(command)
    assert (place / "new").read_text() == "theirs"
    assert left(place) == []


@pytest.mark.parametrize("command", ["upcycle btx", "merge", "data tokenize", "tokenizer train"])
def test_what_a_killed_command_left_is_removed_by_the_next(command: str, place: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from koine.files import outputs\n"
        "outputs.fsync_tree = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from koine.cli.main import main\n"
        "main()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, *shlex.split(FOLDERS[command])],
        cwd=place, capture_output=True, check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL
    assert left(place) != []
    run(FOLDERS[command])
    assert left(place) == []
    assert list((place / "new").glob("**/.*")) == []


def test_an_input_is_never_overwritten(place: Path) -> None:
    for command, said in (
        ("data tokenize text.jsonl --tokenizer tokenizer --out .", "current folder"),
        ("merge linear model branch --weights 0.5,0.5 --out model", "is read by this command"),
        ("upcycle btx --seed-model model --experts branch --out branch", "is read by this command"),
        ("evaluate model --data text.jsonl --out text.jsonl", "is read by this command"),
    ):
        with pytest.raises(UserError, match=said):
            run(command + " --overwrite")


@pytest.mark.parametrize("command", ["train pretrain --preset koine-0.5m", "train pretrain --model model"])
def test_a_training_over_a_model_is_refused(command: str, place: Path) -> None:
    import shutil

    shutil.copytree(worlds.built("tokens"), place / "tokens")
    rest = " --tokenizer tokenizer --data tokens --steps 1 --batch-size 2 --sequence-length 32 --out "
    before = {path: path.read_bytes() for path in (place / "model").iterdir()}
    (place / "link").symlink_to("model")
    for out in ("model", "link", "branch"):
        with pytest.raises(
            UserError, match="is the model that the training starts from|holds a model already"
        ):
            run(command + rest + out)
    assert {path: path.read_bytes() for path in (place / "model").iterdir()} == before


def test_home_is_expand_home_where_the_shell_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for word, meant in (
        ("~/m", "/home/me/m"),
        ("--out=~/m", "--out=/home/me/m"),
        ("law=~", "law=/home/me"),
        ("~m", "~m"),
        ("a~/b", "a~/b"),
        ("what is ~/m?", "what is ~/m?"),
    ):
        assert expand_home(word) == meant


def test_a_path_that_is_no_utf_8_is_printed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"caf\xe9")
    command = FOLDERS["upcycle btx"].replace("new", name)
    monkeypatch.setattr(sys, "argv", ["koine", *shlex.split(command)])
    main()
    assert "written to" in capfd.readouterr().out
    assert (place / name / "config.json").is_file()


def test_a_name_that_a_library_cannot_take_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    name = os.fsdecode(b"caf\xe9")
    shutil.copytree("tokenizer", f"{name}/tokenizer")
    shutil.copy("text.jsonl", f"{name}/text.jsonl")
    # Data, tokenizers and outputs may have any name.
    run(f"data tokenize '{name}/text.jsonl' --tokenizer '{name}/tokenizer' --out '{name}/tokens'")
    assert Path(name, "tokens/manifest.json").is_file()

    def refuse(**named: object) -> None:
        f"{name}/weights".encode()

    monkeypatch.setattr(cli, "main", refuse)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said == "koine: caf\\udce9/weights: not UTF-8, which a library needs here; rename it"
    assert left(place) == []
