"""Every output option of every command takes pipes, devices and `-`, or refuses `-` in one line."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from koine.cli.main import READER_GONE, cli
from koine.cli.outputs import OutputFile, OutputFolder
from koine.errors import UserError
from tests.bad_inputs import worlds
from tests.cli import test_outputs

place = test_outputs.place
pytestmark = pytest.mark.filterwarnings("ignore::koine.errors.KoineWarning")

FILES = {
    "evaluate --out": "evaluate model --data text.jsonl --limit 2 --out new",
    "evaluate --page": "evaluate model --data text.jsonl --limit 2 --page new",
    "merge search --out": test_outputs.FILES["merge search"],
    "model export --out": test_outputs.FILES["gguf"],
    "report --out": test_outputs.FILES["report"],
    "tokenizer measure --out": test_outputs.FILES["tokenizer measure"],
    "tokenizer measure --report": test_outputs.FILES["tokenizer report"],
}

ALIGNED = {"align inspect --out", "align revise --out", "align score --out"}
"""Tested in tests/cli/test_json.py and tests/align only: they need a model that chats, or files of their own."""


@pytest.fixture(autouse=True)
def _quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no plots of a run: these tests are about where its report goes."""
    from koine.plan.report import page

    monkeypatch.setattr(page, "render", lambda name, run: f"<!doctype html>\n{name}, {len(run.members)}\n")


OUTPUT_NAMES = ("--out", "--output", "--page", "--report", "--runs", "--csv", "--to")


def commands(
    group: click.Group, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield the words and the command of each command that does something."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield (*words, name), command


def options(kind: type[click.Path]) -> dict[str, list[str]]:
    """Return the output options of a kind by "COMMAND --OPTION", as words of a command line."""
    return {
        " ".join([*words, option.opts[0]]): [*words, option.opts[0]]
        for words, command in commands(cli)
        for option in command.params
        if isinstance(option.type, kind)
    }


def test_every_output_option_is_known() -> None:
    assert set(FILES) | ALIGNED == set(options(OutputFile))
    for words, command in commands(cli):
        for option in command.params:
            if option.opts[0] in OUTPUT_NAMES:
                assert isinstance(option.type, OutputFile | OutputFolder), (words, option.opts)


@pytest.mark.parametrize("words", options(OutputFolder).values(), ids=options(OutputFolder))
def test_a_command_that_writes_a_folder_refuses_standard_output(words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        cli.main([*words, "-"], standalone_mode=False)
    assert str(error.value) == (
        f"{words[-1]} -: standard output takes one file, and a folder is written; give the name of a new folder"
    )


def read_pipe(path: Path, came: list[bytes]) -> threading.Thread:
    """Read a named pipe in a thread until its writer ends."""
    reader = threading.Thread(target=lambda: came.append(path.read_bytes()), daemon=True)
    reader.start()
    return reader


@pytest.mark.parametrize("command", FILES.values(), ids=FILES)
def test_links_standard_output_pipes_and_devices_are_written_through(
    command: str, place: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (place / "disk").mkdir()
    (place / "folder").symlink_to("disk")
    (place / "new").symlink_to("folder/there")
    test_outputs.run(command)
    content = (place / "disk/there").read_bytes()
    assert len(content) > 20

    def same(other: bytes) -> bool:
        if command.startswith("tokenizer measure"):  # which measures the speed, too
            return (other[:200], other[-8:]) == (content[:200], content[-8:])
        return other == content

    assert b"written to new" in capfdbinary.readouterr().out or command.startswith("model export")
    with pytest.raises(UserError, match="new: exists already"):
        test_outputs.run(command)
    assert (place / "new").is_symlink()

    test_outputs.run(command.replace(" new", " -"))
    captured = capfdbinary.readouterr()
    assert same(captured.out)
    assert b"written to" not in captured.err
    if not command.startswith(("report", "model export")):
        assert len(captured.err) > 100  # the tables
    assert not (place / "-").exists()

    (place / "new").unlink()
    os.mkfifo(place / "new")
    came: list[bytes] = []
    reader = read_pipe(place / "new", came)
    test_outputs.run(command + " --overwrite")
    reader.join(60)
    assert same(*came)
    assert (place / "new").is_fifo()
    assert b"written to new" in capfdbinary.readouterr().out

    (place / "new").unlink()
    (place / "new").symlink_to("/dev/null")
    test_outputs.run(command)
    assert (place / "new").is_symlink()
    assert stat.S_ISCHR(Path("/dev/null").lstat().st_mode)
    assert test_outputs.left(place) == test_outputs.left(place / "disk") == []


MEASURE = "tokenizer measure tokenizer --data text.jsonl --out "


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_standard_output_has_other_names(name: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "link").symlink_to("/dev/stdout")
    test_outputs.run(MEASURE + name)
    captured = capfd.readouterr()
    assert isinstance(json.loads(captured.out), dict)
    assert "bytes/token" in captured.err or "bytes per token" in captured.err
    # Only this command prints to standard error.
    print("as before")
    assert capfd.readouterr().out == "as before\n"


def test_a_link_to_nothing_is_made_and_one_to_a_missing_folder_refused(place: Path) -> None:
    (place / "new").symlink_to("away/there")
    with pytest.raises(UserError, match="whose folder is not there; is its disk mounted"):
        test_outputs.run(MEASURE + "new")
    (place / "away").mkdir()
    test_outputs.run(MEASURE + "new")
    (place / "away/there").write_text("old")
    (place / "away/there").chmod(0o640)
    test_outputs.run(MEASURE + "new --overwrite")
    assert (place / "away/there").read_text().startswith("{")
    assert stat.S_IMODE((place / "away/there").stat().st_mode) == 0o640


def test_a_file_may_be_called_dash(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    test_outputs.run(MEASURE + "./-")
    assert (place / "-").read_text().startswith("{")
    assert "written to -" in capfd.readouterr().out


def test_standard_output_takes_one_output(place: Path) -> None:
    with pytest.raises(UserError, match="is given for two outputs"):
        test_outputs.run(MEASURE + "- --report /dev/fd/1")


def test_after_an_error_standard_output_is_empty(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from koine.plan.report import page

    def fail(*arguments: object, **named: object) -> str:
        raise UserError("wrong")

    monkeypatch.setattr(page, "page", fail)
    with pytest.raises(UserError, match="wrong"):
        test_outputs.run("tokenizer measure tokenizer --data text.jsonl --report -")
    assert capfd.readouterr().out == ""


def test_a_model_directory_is_not_exported_to_standard_output(place: Path) -> None:
    with pytest.raises(UserError, match="--out -: standard output takes one file, and a folder is written"):
        test_outputs.run("model export checkpoint --format safetensors --out -")


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash."""
    koine = f"{shlex.quote(sys.executable)} -m koine"
    words = ["bash", "-c", command.replace("koine", koine)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command",
    ["--help", "merge", "doctor", "model describe", "model describe --json", "data inspect text.jsonl"],
)
def test_a_reader_that_leaves_ends_the_command_quietly(command: str, place: Path) -> None:
    done = shell(f"koine {command} | true; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == (f"{READER_GONE}\n", "")
    # As other programs end.
    assert shell("yes | true; echo ${PIPESTATUS[0]}").stdout == f"{READER_GONE}\n"


def test_data_whose_reader_leaves_ends_the_command_quietly(place: Path) -> None:
    command = "koine model export exportable --format gguf --out - | true; echo ${PIPESTATUS[0]}"
    done = shell(command)
    assert (done.stdout, done.stderr) == (f"{READER_GONE}\n", "")


def test_an_error_whose_reader_leaves_has_no_traceback() -> None:
    done = shell("(koine nothing 2>&1; echo $? >&3) 3>&2 | true")
    assert (done.stdout, done.stderr) == ("", f"{READER_GONE}\n")


def test_a_full_disk_under_standard_output_is_one_line() -> None:
    done = shell("koine --help > /dev/full; echo $? >&2")
    assert done.stderr == "koine: the disk is full; free some space or choose another place\n2\n"


def test_standard_output_that_is_appended_to_keeps_what_was_there(place: Path) -> None:
    (place / "log").write_text("before\n")
    for name in ("-", "/dev/stdout", "/proc/self/fd/1"):
        shell(f"koine {MEASURE}{name} 2>/dev/null >> log")
    text = (place / "log").read_text()
    assert text.startswith("before\n{")
    assert text.count("\n{") == 3


def test_a_binary_file_is_not_written_to_a_terminal(place: Path) -> None:
    import pty

    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "koine", "model", "export", "exportable", "--format", "gguf", "--out", "-"],
        stdout=slave, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(slave)
    os.close(master)
    assert done.returncode == 2
    assert done.stderr == (
        "koine: --out -: standard output is a terminal, and the file is binary; "
        "redirect it (> FILE), or pipe it to a program\n"
    )


LIBRARIES = {
    "training": "train pretrain --preset koine-0.5m --data tokens --tokenizer tokenizer --steps 2 --batch-size 2"
    " --sequence-length 32 --checkpoint-every 1 --keep-last 2 --device cpu --out new",
    "domain encoder": "upcycle nexus --seed-model model --experts branch --domain-text branch=text.jsonl"
    " --domain-size 4 --out new",
}
"""Commands that let a library write files of other kinds."""
PERMISSIONS = test_outputs.FOLDERS | LIBRARIES


@pytest.mark.parametrize("command", PERMISSIONS.values(), ids=PERMISSIONS)
def test_a_folder_has_the_permissions_of_the_umask(command: str, place: Path) -> None:
    if "--data tokens" in command:
        shutil.copytree(worlds.built("tokens"), place / "tokens")
    old = os.umask(0o027)
    try:
        test_outputs.run(command)
    finally:
        os.umask(old)
    for path in (place / "new", *(place / "new").rglob("*")):
        expected = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == expected, path.name


@pytest.mark.parametrize("command", FILES.values(), ids=FILES)
def test_a_file_has_the_permissions_of_the_umask(command: str, place: Path) -> None:
    old = os.umask(0o027)
    try:
        test_outputs.run(command)
    finally:
        os.umask(old)
    assert stat.S_IMODE((place / "new").stat().st_mode) == 0o640


def test_standard_output_that_is_closed_is_one_line_or_ignored(place: Path) -> None:
    done = shell("koine model describe >&-; echo $? >&2")
    assert done.stderr == "0\n"
    done = shell(f"koine {MEASURE}- >&-; echo $? >&2")
    assert done.stderr == (
        "koine: /dev/stdout: is not open; open it in the shell (1>FILE), or give the name of a file\n2\n"
    )
