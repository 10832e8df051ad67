"""Bad inputs around outputs: places that cannot be written, two writers, links, what the system refuses."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import worlds
from .case import Case
from .cases_plan import WITH_PLAN

UPCYCLE = "upcycle btx --seed-model model --experts branch --out "
EVALUATE = "evaluate model --data text.jsonl --limit 1 --out "
PRETRAIN = (
    "train pretrain --preset koine-0.5m --steps 2 --batch-size 2 --sequence-length 32"
    " --data tokens --tokenizer tokenizer --out "
)
UPCYCLING = worlds.having("model", "branch")
EVALUATING = worlds.having("model", "text")
AGAIN = "then run the command again"


def refused(call: str, code: int | None, part: str = "") -> Callable[[Any], None]:
    """A call of `os` answers with this error where `part` is in its path; None: an error without a number."""

    def during(patch: Any) -> None:
        real = getattr(os, call)

        def refuse(path: Any, *arguments: Any, **named: Any) -> Any:
            if not isinstance(path, int) and part not in str(path):
                return real(path, *arguments, **named)
            if code is None:
                raise OSError("1000 requested and 0 written")
            raise OSError(code, os.strerror(code), *([] if isinstance(path, int) else [str(path)]))

        patch.setattr(os, call, refuse)

    return during


def environment(**variables: str) -> Callable[[Any], None]:
    """Environment variables of a launch that is not whole."""

    def during(patch: Any) -> None:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)

    return during


def linked(name: str, to: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(to)


def piped(name: str) -> Callable[[Path], None]:
    return lambda folder: os.mkfifo(folder / name)


def appears(function: str, name: str) -> Callable[[Any], None]:
    """Somebody else makes `name` just before the result gets its name."""

    def during(patch: Any) -> None:
        from koine.files import outputs

        real = getattr(outputs, function)

        def late(*arguments: Any, **named: Any) -> Any:
            patch.undo()
            Path(name).mkdir()
            return real(*arguments, **named)

        patch.setattr(outputs, function, late)

    return during


def run_plan(then: Callable[[Path], None]) -> Callable[[Path], None]:
    """The small plan has run; then something happens to what it built."""

    def prepare(folder: Path) -> None:
        WITH_PLAN(folder)
        worlds.run_koine("run", "plans.py:small")
        then(folder)

    return prepare


def text_as_folder(folder: Path) -> None:
    """Put a folder where the plan will build, as somebody else would."""
    WITH_PLAN(folder)
    worlds.written("runs/small/text/notes.txt", "mine")(folder)


CASES = (
    Case(
        mistake="the current folder as output",
        command=UPCYCLE + ". --overwrite",
        prepare=UPCYCLING,
        says=".: is the current folder or one above it, which cannot be replaced; give the name of a new folder",
    ),
    Case(
        mistake="the folder above as output",
        command="data sample --languages de --out ..",
        says="..: is the current folder or one above it, which cannot be replaced; give the name of a new folder",
    ),
    Case(
        mistake="the root folder as output",
        command="merge linear model branch --weights 0.5,0.5 --out / --overwrite",
        prepare=UPCYCLING,
        says="/: is the current folder or one above it, which cannot be replaced; give the name of a new folder",
    ),
    Case(
        mistake="a name of more than 255 bytes for a folder",
        command=UPCYCLE + "x" * 256,
        prepare=UPCYCLING,
        says="x" * 256 + ": the name is longer than the file system allows; choose a shorter one",
    ),
    Case(
        mistake="a name of more than 255 bytes for a file",
        command=EVALUATE + "x" * 256,
        prepare=EVALUATING,
        says="x" * 256 + ": the name is longer than the file system allows; choose a shorter one",
    ),
    Case(
        mistake="a name of more than 255 bytes for an input",
        command="evaluate " + "m" * 256 + " --data text.jsonl",
        prepare=worlds.having("text"),
        says="m" * 256
        + "/adapter_config.json: the name is longer than the file system allows; choose a shorter one",
    ),
    Case(
        mistake="an output that is a link to itself",
        command=UPCYCLE + "new",
        prepare=worlds.having("model", "branch", then=linked("new", "new")),
        says="new: a link that leads back to itself; remove it, or choose another --out",
    ),
    Case(
        mistake="an output that is a link to a disk that is away",
        command=UPCYCLE + "new",
        prepare=worlds.having("model", "branch", then=linked("new", "disk/runs/new")),
        says="new: leads to …/disk/runs/new, whose folder is not there; is its disk mounted?",
    ),
    Case(
        mistake="results over results that are there",
        command=EVALUATE + "results.json",
        prepare=worlds.having("model", "text", then=worlds.written("results.json", "{}")),
        says="results.json: exists already; add --overwrite, or choose another --out",
    ),
    Case(
        mistake="a folder to standard output",
        command=UPCYCLE + "-",
        prepare=UPCYCLING,
        says="--out -: standard output takes one file, and a folder is written; give the name of a new folder",
    ),
    Case(
        mistake="a model directory to standard output",
        command="model export model --format safetensors --out -",
        prepare=worlds.having("model"),
        says="--out -: standard output takes one file, and a folder is written; give the name of a new folder",
    ),
    Case(
        mistake="a folder into a pipe",
        command=UPCYCLE + "new --overwrite",
        prepare=worlds.having("model", "branch", then=piped("new")),
        says="new: a pipe, a device or a descriptor, and a folder is written; give the name of a new folder",
    ),
    Case(
        mistake="results into a descriptor that is not open",
        command=EVALUATE + "/dev/fd/321",
        prepare=EVALUATING,
        says="/dev/fd/321: is not open; open it in the shell (321>FILE), or give the name of a file",
    ),
    Case(
        mistake="results onto a device that is full",
        command=EVALUATE + "/dev/full",
        prepare=EVALUATING,
        says="/dev/full: the disk is full; free some space or choose another place; nothing half-written was kept",
    ),
    Case(
        mistake="two outputs to standard output",
        command="tokenizer measure tokenizer --data text.jsonl --out - --report -",
        prepare=worlds.having("tokenizer", "text"),
        says="/dev/stdout: is given for two outputs; give each its own name",
    ),
    Case(
        mistake="results over the data that they are measured on",
        command=EVALUATE + "text.jsonl --overwrite",
        prepare=EVALUATING,
        says="text.jsonl: is read by this command; choose another --out",
    ),
    Case(
        mistake="two outputs in one file",
        command="tokenizer measure tokenizer --data text.jsonl --out x --report x",
        prepare=worlds.having("tokenizer", "text"),
        says="x: is given for two outputs; give each its own name",
    ),
    Case(
        mistake="a mixture over one of its experts",
        command=UPCYCLE + "branch --overwrite",
        prepare=UPCYCLING,
        says="branch: is read by this command; choose another --out",
    ),
    Case(
        mistake="an output that appears while the command runs",
        command=UPCYCLE + "new",
        prepare=UPCYCLING,
        during=appears("fsync_tree", "new"),
        simulated="the folder is made just before the result gets its name",
        leaves="new/",
        says="new: appeared or changed while this ran, and is left as it is; choose another --out and run it again",
    ),
    Case(
        mistake="results that another command is writing",
        command=EVALUATE + "results.json",
        prepare=EVALUATING,
        during=worlds.locked(".results.json.lock"),
        says="results.json: another process is writing it; wait for it to end, or choose another --out",
    ),
    Case(
        mistake="a folder that another command is writing",
        command=UPCYCLE + "new",
        prepare=UPCYCLING,
        during=worlds.locked(".new.lock"),
        says="new: another process is writing it; wait for it to end, or choose another --out",
    ),
    Case(
        mistake="a training over the model that it starts from",
        command=PRETRAIN.replace("--preset koine-0.5m", "--model model") + "model",
        prepare=worlds.having("model", "tokens", "tokenizer"),
        says="model: is the model that the training starts from; choose another --out",
    ),
    Case(
        mistake="a training over another model",
        command=PRETRAIN + "model",
        prepare=worlds.having("model", "tokens", "tokenizer"),
        says="model: holds a model already (config.json); choose another --out",
    ),
    Case(
        mistake="a disk that reports an error",
        command=UPCYCLE + "new",
        prepare=UPCYCLING,
        during=refused("fsync", errno.EIO),
        simulated="fsync answers EIO",
        says=f"new: the disk reports an error (input/output error); check the disk, {AGAIN}",
    ),
    Case(
        mistake="a file server that has lost the folder",
        command=UPCYCLE + "new",
        prepare=UPCYCLING,
        during=refused("rename", errno.ESTALE, "partial"),
        simulated="rename answers ESTALE",
        says=f"new: the file server has lost it (stale file handle); mount it again, {AGAIN}",
    ),
    Case(
        mistake="an output that is a mount point",
        command=UPCYCLE + "new",
        prepare=UPCYCLING,
        during=refused("rename", errno.EBUSY, "partial"),
        simulated="rename answers EBUSY",
        says=f"new: is in use; end what uses it (a mount, another program), {AGAIN}",
    ),
    Case(
        mistake="a quota that is used up",
        command=UPCYCLE + "new",
        prepare=UPCYCLING,
        during=refused("fsync", errno.EDQUOT),
        simulated="fsync answers EDQUOT",
        says="new: the disk quota is used up; free some space or choose another place; nothing half-written was kept",
    ),
    Case(
        mistake="a file that grows too large",
        command="data tokenize text.jsonl --tokenizer tokenizer --out new",
        prepare=worlds.having("text", "tokenizer"),
        during=refused("fsync", errno.EFBIG),
        simulated="fsync answers EFBIG",
        says="new: a file grows larger than the file system or `ulimit -f` allows; choose another place, or raise the limit",
    ),
    Case(
        mistake="a write of which a library says no more than that it failed",
        command="data tokenize text.jsonl --tokenizer tokenizer --out new",
        prepare=worlds.having("text", "tokenizer"),
        during=refused("fsync", None),
        simulated="fsync fails without a number",
        says=f"new: the system refuses (1000 requested and 0 written); check the disk, {AGAIN}",
    ),
    Case(
        mistake="a disk that has become read-only",
        command=EVALUATE + "results.json",
        prepare=EVALUATING,
        during=refused("link", errno.EROFS),
        simulated="link answers EROFS",
        says="results.json: cannot write here; choose a folder that you may write to",
    ),
    Case(
        mistake="a checkpoint that cannot be written",
        command=PRETRAIN + "new",
        prepare=worlds.having("tokens", "tokenizer"),
        during=refused("rename", errno.EIO, "step-"),
        simulated="rename answers EIO",
        leaves="new/",
        says=f"new/checkpoints/step-000002: the disk reports an error (input/output error); check the disk, {AGAIN}",
    ),
    Case(
        mistake="WORLD_SIZE without RANK",
        command=PRETRAIN + "new",
        prepare=worlds.having("tokens", "tokenizer"),
        during=environment(WORLD_SIZE="2"),
        says="the environment: WORLD_SIZE is 2 and RANK is not set; "
        "unset WORLD_SIZE to train in one process, or start with torchrun",
    ),
    Case(
        mistake="WORLD_SIZE that is no number",
        command=PRETRAIN + "new",
        prepare=worlds.having("tokens", "tokenizer"),
        during=environment(WORLD_SIZE="two", RANK="0"),
        says="the environment variable WORLD_SIZE: 'two' is no integer of 1 or more; "
        "unset it to train in one process, or start with torchrun",
    ),
    Case(
        mistake="a launch without an address to meet at",
        command=PRETRAIN + "new",
        prepare=worlds.having("tokens", "tokenizer"),
        during=environment(WORLD_SIZE="2", RANK="0"),
        says="the environment: WORLD_SIZE is 2 and MASTER_ADDR is not set; "
        "unset WORLD_SIZE to train in one process, or start with torchrun",
    ),
    Case(
        mistake="a RANK beyond WORLD_SIZE",
        command=PRETRAIN + "new",
        prepare=worlds.having("tokens", "tokenizer"),
        during=environment(WORLD_SIZE="2", RANK="2", MASTER_ADDR="localhost", MASTER_PORT="1234"),
        says="the environment: RANK is 2, and WORLD_SIZE only 2; "
        "unset WORLD_SIZE to train in one process, or start with torchrun",
    ),
    Case(
        mistake="an artifact that was cut since it was built",
        command="run plans.py:small",
        prepare=run_plan(lambda folder: os.truncate(folder / "runs/small/text/text.txt", 3)),
        says="…/runs/small/text: its file 'text.txt' has 3 bytes, and 15 were written; "
        "remove the artifact's folder to have it built again",
    ),
    Case(
        mistake="an artifact on a disk that is away",
        command="run plans.py:small --set words=4",
        prepare=run_plan(
            lambda folder: (
                (folder / "runs/small/text").rename(folder / "away"),
                linked("runs/small/text", "/mnt/away/text")(folder),
            )[-1]
        ),
        says="runs/small/text: leads to /mnt/away/text, which is not there; "
        "mount its disk; or, if it is gone, remove the link",
    ),
    Case(
        mistake="a folder of one's own where a plan builds",
        command="run plans.py:small",
        prepare=text_as_folder,
        says="runs/small/text: is no artifact, and is not replaced; move it away, then run again",
    ),
)
