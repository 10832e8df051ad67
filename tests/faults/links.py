"""Outputs that are links, devices and pipes; inputs behind links; folders that contain themselves."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from tests.faults.cases import SECONDS, Bench
from tests.faults.judge import Listing, Result, WrongError, check_end, difference, listing, temporary
from tests.faults.life import live
from tests.faults.stages import Stage

READ_SECONDS = 30.0
MEMORY = 8 << 30
"""Of addresses: what reads for ever ends before the machine does."""

Prepare = Callable[[Path, str], str]
"""Makes what stands in the way in a folder, given the usual name of the output; returns what is given as `--out`."""


def _link_to(target: str, *, make: Callable[[Path], None] | None = None) -> Prepare:
    def prepare(work: Path, out: str) -> str:
        if make is not None:
            make(work)
        (work / out).symlink_to(target)
        return out

    return prepare


def _two_links(work: Path, out: str) -> str:
    (work / "there").mkdir()
    (work / "between").symlink_to("there")
    (work / out).symlink_to("between")
    return out


def _node(mode: int, device: int) -> Prepare:
    def prepare(work: Path, out: str) -> str:
        os.mknod(work / out, mode | 0o600, device)
        return out

    return prepare


def _socket(work: Path, out: str) -> str:
    before = Path.cwd()
    os.chdir(work)  # a socket's name is short
    try:
        socket.socket(socket.AF_UNIX).bind(out)
    finally:
        os.chdir(before)
    return out


def _parent(target: str | None) -> Prepare:
    def prepare(work: Path, out: str) -> str:
        if target is None:
            (work / "parent").write_text("a file\n")
        else:
            if target == "there":
                (work / "there").mkdir()
            (work / "parent").symlink_to(target)
        return f"parent/{out}"

    return prepare


def _file(content: str, name: str) -> Callable[[Path], None]:
    return lambda work: (work / name).write_text(content) and None


def _full_folder(work: Path) -> None:
    (work / "there").mkdir()
    (work / "there" / "precious.txt").write_text("precious\n")


OUTPUTS: dict[str, Prepare] = {
    "link-to-empty-folder": _link_to("there", make=lambda work: (work / "there").mkdir()),
    "link-to-link": _two_links,
    "link-to-full-folder": _link_to("there", make=_full_folder),
    "link-to-file": _link_to("there", make=_file("precious\n", "there")),
    "link-to-nothing": _link_to("there"),
    "link-to-nothing-deep": _link_to("not/there"),
    "link-to-itself": lambda work, out: _link_to(out)(work, out),
    "link-to-device": _link_to("null", make=lambda work: os.mknod(work / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))),
    "device": _node(stat.S_IFCHR, os.makedev(1, 3)),
    "full-device": _node(stat.S_IFCHR, os.makedev(1, 7)),
    "pipe": _node(stat.S_IFIFO, 0),
    "socket": _socket,
    "parent-is-link": _parent("there"),
    "parent-is-dangling": _parent("nowhere"),
    "parent-is-file": _parent(None),
    "through-dots": lambda work, out: f"./../{work.name}/{out}",
    "long-name": lambda work, out: "n" * 256,
    "longest-name": lambda work, out: "n" * 250,
    "not-utf-8": lambda work, out: "o\udcff\udcfe",
    "line-break": lambda work, out: "o\nu",
    "dot": lambda work, out: ".",
    "dot-dot": lambda work, out: "..",
    "root": lambda work, out: "/proc/out",
    "empty": lambda work, out: "",
}  # fmt: skip
WRITTEN_THROUGH = ("link-to-device", "device", "pipe")
"""Outputs that a command that writes one file writes through."""
MUST_WORK = ("link-to-empty-folder", "link-to-link", "parent-is-link", "through-dots")


def kinds(work: Path) -> Listing:
    """Return everything that is no ordinary file and existed before; it must stay unchanged."""
    found: Listing = {}
    for path in sorted(work.rglob("*")):
        mode = path.lstat().st_mode
        name = str(path.relative_to(work))
        if stat.S_ISLNK(mode):
            found[name] = f"-> {path.readlink()}"
        elif stat.S_ISREG(mode):
            found[name] = path.read_bytes().hex()
        else:
            found[name] = str(stat.S_IFMT(mode))
    return found


def output(bench: Bench, stage: Stage, name: str) -> Result:
    """Run a stage with something odd in place of its output."""
    work, _ = bench.fresh()
    out = stage.outs[0]
    given = OUTPUTS[name](work, out)
    before = kinds(work)
    reader = None
    if name == "pipe":
        reader = threading.Thread(target=(work / out).read_bytes, daemon=True)
        reader.start()
    life = live(stage.words(bench.world, **{out: given}), work, work.parent / "first", seconds=SECONDS)
    line = check_end(life)
    if reader is not None:
        _release_reader(work / out)
        reader.join()
    after = kinds(work)
    for path, what in before.items():
        # A link that led nowhere leads to the result now; a file is replaced only where that was asked for.
        if after.get(path) != what:
            raise WrongError("silent", f"{path} was replaced; ended with {line or 'success'}")
    if line is not None:
        if name in MUST_WORK and not (
            stage.shape == "file" and name in ("link-to-empty-folder", "link-to-link")
        ):
            raise WrongError("silent", f"refused: {line}")
        if left := [path for path in after if path not in before]:
            raise WrongError("silent", f"refused, and left {', '.join(left[:4])}")
        return Result("line", said=line)
    place, wanted = work / given, bench.wanted[stage.name]
    if stage.shape == "file":
        if not (place.is_file() or name in WRITTEN_THROUGH):
            raise WrongError("silent", "success, but no file is there")
    elif name not in ("dot", "dot-dot", "empty"):
        found = {f"{out}/{one}": what for one, what in listing(place, place=work).items()}
        if stage.shape == "training":
            # A training goes into a folder that holds something else.
            found = {one: what for one, what in found.items() if one in wanted}
        if told := difference({one: what for one, what in wanted.items() if one != f"{out}/"}, found):
            raise WrongError("silent", f"success, but {told}")
    if left := [one for one in temporary(listing(work)) if "/" not in one]:
        raise WrongError("silent", f"success, and left {left[:4]}")
    return Result("whole")


def _release_reader(pipe: Path) -> None:
    """End the reader of a pipe that nobody has opened for writing."""
    with contextlib.suppress(OSError):
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


def _linked(source: Path, into: Path) -> None:
    into.symlink_to(source)


def _linked_twice(source: Path, into: Path) -> None:
    between = into.with_name(into.name + "-between")
    between.symlink_to(source)
    into.symlink_to(between)


def _of_links(source: Path, into: Path) -> None:
    if source.is_file():
        into.symlink_to(source)
        return
    into.mkdir()
    for path in source.iterdir():
        (into / path.name).symlink_to(path)


def _blobs(source: Path, into: Path) -> None:
    """Arrange files as a download cache does: names are links to files named by their hash."""
    blobs = into.with_name(into.name + "-blobs")
    blobs.mkdir()
    if source.is_file():
        shutil.copyfile(source, blobs / "0")
        into.symlink_to(blobs / "0")
        return
    into.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, blobs / str(number))  # type: ignore[operator]
        (into / path.name).symlink_to(os.path.relpath(blobs / str(number), into))


def _dangling(source: Path, into: Path) -> None:
    """Make the largest file a dangling link."""
    if source.is_file():
        into.symlink_to("nowhere")
        return
    shutil.copytree(source, into)
    largest = max((path for path in into.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.unlink()
    largest.symlink_to("nowhere")


def _looped(source: Path, into: Path) -> None:
    into.symlink_to(into.name)


def _piped(source: Path, into: Path) -> None:
    """Make the largest file a pipe that nobody writes to; a single file is written to its pipe once."""
    if source.is_file():
        os.mkfifo(into)
        threading.Thread(target=into.write_bytes, args=(source.read_bytes(),), daemon=True).start()
        return
    shutil.copytree(source, into)
    largest = max((path for path in into.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.unlink()
    os.mkfifo(largest)


INPUTS: dict[str, Callable[[Path, Path], None]] = {
    "linked": _linked,
    "linked-twice": _linked_twice,
    "of-links": _of_links,
    "blobs": _blobs,
    "dangling": _dangling,
    "loop": _looped,
    "pipe": _piped,
}
SOUND = ("linked", "linked-twice", "of-links", "blobs")


def inputs_of(stage: Stage) -> list[str]:
    """Return the inputs that a stage names."""
    return list(
        dict.fromkeys(
            word.partition("@")[2].partition(":")[0] for word in stage.command.split() if "@" in word
        )
    )


def read(bench: Bench, stage: Stage, name: str, which: str) -> Result:
    """Run a stage with an input behind links, or one that is no file."""
    work, place = bench.fresh()
    inputs = place / "inputs"
    inputs.mkdir()
    INPUTS[name](bench.world / which, inputs / Path(which).name)
    if which.endswith(".py"):
        return Result("whole", why="a plan's code is no input")
    words = [
        word.replace(f"{bench.world}/{which}", str(inputs / Path(which).name))
        for word in stage.words(bench.world)
    ]
    before = listing(inputs)
    life = live(words, work, place / "first", seconds=READ_SECONDS, limits={resource.RLIMIT_AS: MEMORY})
    line = check_end(life)
    if listing(inputs) != before:
        raise WrongError("silent", f"an input was changed: {difference(before, listing(inputs))}")
    if line is not None:
        if name in SOUND:
            raise WrongError("silent", f"refused: {line}")
        if stage.shape != "run" and (left := list(listing(work))):
            raise WrongError("silent", f"refused, and left {', '.join(left[:4])}")
        return Result("line", said=line)
    weights = {
        one: what
        for one, what in listing(work).items()
        if one.endswith((".safetensors", ".tokens", "tokenizer.json"))
    }
    wanted = bench.wanted[stage.name]
    wrong = [one for one, what in weights.items() if wanted.get(one) != what]
    missing = [
        one
        for one in wanted
        if one.endswith((".safetensors", ".tokens", "tokenizer.json")) and one not in weights
    ]
    if wrong or missing:
        raise WrongError("silent", f"other content in {', '.join([*wrong, *missing][:4])}")
    return Result("whole")


def _with_loop(folder: Path) -> None:
    (folder / "loop").symlink_to(".")


def _with_two_loops(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    (folder / "a" / "to-b").symlink_to("../b")
    (folder / "b" / "to-a").symlink_to("../a")


def _with_parent(folder: Path) -> None:
    (folder / "up").symlink_to(folder.parent)


def _with_node(name: str, mode: int, device: int) -> Callable[[Path], None]:
    return lambda folder: os.mknod(folder / name, mode | 0o600, device)


def _moved_behind_link(folder: Path) -> None:
    (folder / "text.jsonl").rename(folder.parent / "elsewhere.jsonl")
    (folder / "text.jsonl").symlink_to("../elsewhere.jsonl")


def _folder_behind_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "text.jsonl").rename(folder.parent / "elsewhere" / "text.jsonl")
    (folder / "inside").symlink_to("../elsewhere")


DATA_FOLDERS: dict[str, Callable[[Path], None]] = {
    "loop": _with_loop,
    "two-loops": _with_two_loops,
    "link-to-parent": _with_parent,
    "pipe": _with_node("more.jsonl", stat.S_IFIFO, 0),
    "zeros": _with_node("more.jsonl", stat.S_IFCHR, os.makedev(1, 5)),
    "null": _with_node("more.jsonl", stat.S_IFCHR, os.makedev(1, 3)),
    "dangling": lambda folder: (folder / "more.jsonl").symlink_to("nowhere"),
    "self": lambda folder: (folder / "more.jsonl").symlink_to("more.jsonl"),
    "file-behind-link": _moved_behind_link,
    "folder-behind-link": _folder_behind_link,
    "socket": lambda folder: _socket(folder, "more.jsonl") and None,
}
FOLDER_COMMANDS = {
    "tokenize": "data tokenize data --tokenizer @tokenizer --out out",
    "train": "tokenizer train --data data --vocab-size 300 --min-frequency 2 --out out",
    "evaluate": "evaluate @model --data data --limit 1 --out out.json",
    "measure": "tokenizer measure @tokenizer --data data --out out.json",
    "inspect": "data inspect data",
    "run": "run @three.py:reads --set data=data",
}


def data_folder(bench: Bench, name: str, command: str) -> Result:
    """Read a folder of text with something odd in it: once or with an error, never endlessly or twice."""
    ends = []
    for odd in (False, True):
        work, place = bench.fresh()
        (work / "data").mkdir()
        shutil.copyfile(bench.world / "text.jsonl", work / "data" / "text.jsonl")
        if odd:
            DATA_FOLDERS[name](work / "data")
        words = [word.replace("@", f"{bench.world}/") for word in FOLDER_COMMANDS[command].split()]
        life = live(words, work, place / "first", seconds=READ_SECONDS, limits={resource.RLIMIT_AS: MEMORY})
        line = check_end(life)
        found = {
            one: what
            for one, what in listing(work).items()
            if one.startswith(("out", "runs/reads/read/length")) and not one.endswith("manifest.json")
        }
        ends.append((line, found, life.out if command == "inspect" else ""))
    if ends[0][0] is not None:
        raise RuntimeError(f"does not work undisturbed: {ends[0][0]}")
    if ends[1][0] is not None:
        return Result("line", said=ends[1][0])
    if ends[0][1:] != ends[1][1:]:
        raise WrongError(
            "silent", f"other results: {difference(ends[0][1], ends[1][1]) or ends[1][2][-300:]}"
        )
    return Result("whole")


def _move(work: Path, names: list[str], *, whole: bool = False) -> None:
    """Move artifacts elsewhere and leave links."""
    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    for name in names:
        here = work / "runs" if whole else work / "runs" / "three" / name
        shutil.move(here, elsewhere / name)
        here.symlink_to(elsewhere / name)


MOVES: dict[str, tuple[list[str], bool, str]] = {
    "one-artifact": (["text"], False, "times=3"),
    "middle-artifact": (["parts"], False, "times=3"),
    "all-artifacts": (["text", "parts", "last"], False, "times=3"),
    "whole-folder": (["runs"], True, "times=3"),
    "one-artifact-rebuilt": (["text"], False, "times=4"),
    "all-artifacts-rebuilt": (["text", "parts", "last"], False, "times=4"),
    "whole-folder-rebuilt": (["runs"], True, "times=4"),
    "artifact-lost": (["parts"], False, "times=3"),
}


def moved(bench: Bench, name: str) -> Result:
    """Move artifacts to another disk behind links: a run must continue and finish."""
    work, place = bench.fresh()
    shutil.copytree(bench.world / "finished", work, dirs_exist_ok=True)
    names, whole, setting = MOVES[name]
    _move(work, names, whole=whole)
    if name == "artifact-lost":
        shutil.rmtree(work / "elsewhere" / "parts")
    links = {path: path.readlink() for path in work.rglob("*") if path.is_symlink()}
    words = f"run {bench.world}/three.py:three --set data={bench.world}/longer.txt --set {setting}".split()
    life = live(words, work, place / "first", seconds=SECONDS)
    line = check_end(life)
    if line is not None:
        if name == "artifact-lost":
            return Result("line", said=line)
        raise WrongError("silent", f"refused: {line}")
    kept = {path: target for path, target in links.items() if path.is_symlink() and path.readlink() == target}
    if name != "artifact-lost" and kept != links:
        raise WrongError(
            "silent", f"links replaced: {[str(path.relative_to(work)) for path in links if path not in kept]}"
        )
    if "times=3" in words and name != "artifact-lost" and "built" in life.out.replace("built from", ""):
        raise WrongError("silent", f"built again: {life.out[-300:]}")
    length = 3 if setting.endswith("3") else 4
    text = (bench.world / "longer.txt").read_text() * length
    if (work / "runs" / "three" / "text" / "text.txt").read_text() != text:
        raise WrongError("silent", "the artifact is not what was asked for")
    left = [
        one
        for one in temporary(listing(work / "runs" / "three"))
        if not one.startswith((".cache", ".locks", ".progress", ".work"))
    ]
    if left:
        raise WrongError("silent", f"left over: {left[:4]}")
    return Result("whole")
