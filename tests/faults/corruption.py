"""Flipped bits and truncation in every kind of file that commands read.

Each must give an error line, or change nothing.
"""

from __future__ import annotations

import random
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.cases import SECONDS, Bench
from tests.faults.judge import Listing, Result, WrongError, check_end, difference, listing
from tests.faults.life import live
from tests.faults.links import MEMORY

Spoil = Callable[[Path], bool]
"""Spoils a file in place; False where that would change nothing."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A command that reads files, and where its results are.

    command: as a stage's. reads: folders or files of the world that are copied, so that they can be damaged.
    files: patterns of the files below them. begins: a folder of the world that the command starts in.
    results: patterns of outputs that must equal those without damage; `stdout` is the printed output.
    """

    name: str
    command: str
    reads: str | None = None
    begins: str | None = None
    files: tuple[str, ...]
    results: tuple[str, ...]
    weight: float = 1.0


EVALUATE = "evaluate @{} --data @de.jsonl --limit 2 --out out.json"
TRAIN_MORE = (
    "train pretrain --preset koine-0.5m --steps 3 --batch-size 2 --sequence-length 32 --data @tokens --tokenizer @tokenizer "
    "--checkpoint-every 1 --keep-last 1 --evaluate-data @text.jsonl --evaluate-limit 1 --evaluate-every 1 --threads 1 "
    "--dtype float32 --device cpu --out out"
)
READERS = (
    Reader(name="evaluate", command=EVALUATE.format("model"), reads="model", files=("*",), results=("out.json",), weight=3.0),
    Reader(name="evaluate-mixture", command=EVALUATE.format("nexus"), reads="nexus", files=("*.json", "*.safetensors"), results=("out.json",)),
    Reader(name="evaluate-trained", command=EVALUATE.format("trained/out"), reads="trained", files=("out/*",), results=("out.json",), weight=2.0),
    Reader(
        name="merge", command="merge linear @model @branch --out out --threads 1", reads="branch",
        files=("*.safetensors", "config.json"), results=("out/model.safetensors", "out/config.json"),
    ),
    Reader(
        name="upcycle", command="upcycle btx --seed-model @model --experts code=@branch --out out", reads="branch",
        files=("*.safetensors", "config.json"), results=("out/*.safetensors", "out/config.json"),
    ),
    Reader(
        name="extend", command="extend @nexus --expert law=@branch --domain-text @en.jsonl --out out", reads="nexus",
        files=("*.json", "*.safetensors", "domain_encoder/*"), results=("out/*.safetensors", "out/config.json"),
    ),
    Reader(
        name="train-tokens",
        command="train pretrain --preset koine-0.5m --steps 2 --batch-size 2 --sequence-length 32 --data @tokens "
        "--tokenizer @tokenizer --threads 1 --dtype float32 --device cpu --out out",
        reads="tokens", files=("*",), results=("out/model.safetensors",), weight=2.0,
    ),
    Reader(
        name="train-model",
        command="train pretrain --model @model --steps 1 --batch-size 2 --sequence-length 32 --data @tokens "
        "--tokenizer @tokenizer --threads 1 --dtype float32 --device cpu --out out",
        reads="model", files=("*.safetensors", "config.json"), results=("out/model.safetensors",),
    ),
    Reader(
        name="tokenize", command="data tokenize @text.jsonl --tokenizer @tokenizer --out out", reads="tokenizer",
        files=("tokenizer.json", "tokenizer_config.json"), results=("out/*.tokens",),
    ),
    Reader(
        name="adapt", command="tokenizer adapt @model --tokenizer @larger-tokenizer --out out", reads="larger-tokenizer",
        files=("*",), results=("out/*.safetensors",),
    ),
    Reader(
        name="resume", command=TRAIN_MORE, begins="halfway", files=("out/checkpoints/*/*", "out/metrics.jsonl"),
        results=("out/model.safetensors",), weight=2.0,
    ),
    Reader(
        name="export-checkpoint", command="model export @halfway/out/checkpoints/step-000002 --format safetensors --out out",
        reads="halfway", files=("out/checkpoints/*/*",), results=("out/*.safetensors",),
    ),
    Reader(name="at-step", command="data at-step @trained/out 1", reads="trained", files=("out/training.json",), results=("stdout",)),
    Reader(
        name="merge-goes-on", command="merge linear @model @branch --out out --threads 1", begins="halfmerged",
        files=(".out.merge/*",), results=("out/model.safetensors",), weight=2.0,
    ),
    Reader(
        name="tokenize-goes-on", command="data tokenize @text.jsonl --tokenizer @tokenizer --out out", begins="halftokenized",
        files=(".out.work/*",), results=("out/*.tokens", "out/*.offsets", "out/*.parquet", "out/manifest.json"), weight=2.0,
    ),
    Reader(
        name="run-again", command="run @three.py:three --set data=@longer.txt", begins="finished",
        files=("runs/three/*/artifact.json", "runs/three/plan.json", "runs/three/.cache/*"),
        results=("runs/three/*/*.txt", "runs/three/results.json", "runs/three/parts/inside/*"),
    ),
    Reader(
        name="lineage", command="lineage @finished/runs/three/last --verify", reads="finished",
        files=("runs/three/*/artifact.json", "runs/three/*/*.txt", "runs/three/parts/inside/*"), results=("stdout",),
    ),
    Reader(
        name="gguf", command="model export @exportable --format gguf --out out.gguf", reads="exportable",
        files=("*.safetensors", "*.json"), results=("out.gguf",),
    ),
)  # fmt: skip
BY_NAME = {reader.name: reader for reader in READERS}


def spoils(size: int, seed: str, count: int) -> Iterator[tuple[str, Spoil]]:
    """Return about `count` ways to damage a file of this size, by name; deterministic."""
    draw = random.Random(seed)
    places = {0, 3, 8, min(20, size - 1), size // 2, size - 1}
    while len(places) < min(size, 6 + count // 2):
        # The beginning says what the rest is: it is met more often.
        places.add(draw.randrange(min(size, 2000) if draw.random() < 0.5 else size))
    for place in sorted(places)[: count - 6]:
        yield f"flip-{place}-{draw.randrange(8)}", _flipped
    for left in sorted({0, 1, size // 2, size - 1}):
        yield f"cut-{left}", _cut
    yield "more-7", _more
    yield f"zeroed-{size // 3}", _zeroed


def spoiling(name: str) -> Spoil:
    """Return the damage that a name of `spoils` stands for."""
    kind, *numbers = name.split("-")
    values = [int(number) for number in numbers]
    return lambda path: {"flip": _flipped, "cut": _cut, "more": _more, "zeroed": _zeroed}[kind](path, *values)


def _flipped(path: Path, place: int, bit: int) -> bool:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return True


def _cut(path: Path, left: int) -> bool:
    content = path.read_bytes()
    path.write_bytes(content[:left])
    return left < len(content)


def _more(path: Path, count: int) -> bool:
    path.write_bytes(path.read_bytes() + b"\x00" * count)
    return True


def _zeroed(path: Path, start: int) -> bool:
    content = bytearray(path.read_bytes())
    part = content[start : start + 512]
    content[start : start + 512] = bytes(len(part))
    path.write_bytes(content)
    return any(part)


def targets(bench: Bench, reader: Reader) -> list[tuple[str, int]]:
    """Return the files that a reader reads, with their sizes."""
    source = bench.world / (reader.begins or reader.reads or "")
    found = {path for pattern in reader.files for path in source.glob(pattern) if path.is_file()}
    return [
        (str(path.relative_to(source)), path.stat().st_size) for path in sorted(found) if path.stat().st_size
    ]


def results(reader: Reader, work: Path, out: str) -> Listing:
    """Return the outputs that must equal those without damage."""
    found: Listing = {}
    for name, what in listing(work).items():
        if any(Path(name).match(pattern) for pattern in reader.results):
            found[name] = what
    if "stdout" in reader.results:
        found["stdout"] = str(zlib.crc32(out.encode()))
    return found


def start(bench: Bench, reader: Reader) -> tuple[Path, Path, Path, list[str]]:
    """Return a case's folders, its copy of the files, and its command."""
    work, place = bench.fresh()
    words = [word.replace("@", f"{bench.world}/") for word in reader.command.split()]
    if reader.begins is not None:
        shutil.copytree(bench.world / reader.begins, work, dirs_exist_ok=True)
        return work, place, work, words
    assert reader.reads is not None
    copy = place / reader.reads
    shutil.copytree(bench.world / reader.reads, copy)
    words = [word.replace(f"{bench.world}/{reader.reads}", str(copy)) for word in words]
    return work, place, copy, words


_sound: dict[str, Listing] = {}


def sound_results(bench: Bench, reader: Reader) -> Listing:
    """Return the outputs of the command without damage."""
    if reader.name not in _sound:
        work, place, copy, words = start(bench, reader)
        life = live(words, work, place / "first", seconds=SECONDS)
        if life.code:
            raise RuntimeError(f"{reader.name} does not work undamaged: {life.err[-1000:]}")
        _sound[reader.name] = results(reader, work, life.out.replace(str(copy), "COPY"))
    return _sound[reader.name]


def spoilt(bench: Bench, reader: Reader, file: str, name: str) -> Result:
    """Damage one file and run the command that reads it."""
    wanted = sound_results(bench, reader)
    work, place, copy, words = start(bench, reader)
    before = listing(work)
    if not spoiling(name)(copy / file):
        return Result("whole")
    life = live(words, work, place / "first", seconds=SECONDS, limits={resource.RLIMIT_AS: MEMORY})
    line = check_end(life)
    if line is not None:
        if reader.begins is None and (
            more := [one for one in listing(work) if one not in before and not one.startswith("out/.lock")]
        ):
            raise WrongError("silent", f"refused, and left {', '.join(more[:4])}")
        return Result("line", said=line)
    found = results(reader, work, life.out.replace(str(copy), "COPY"))
    if found != wanted:
        raise WrongError("silent", f"other numbers, and nothing said: {difference(wanted, found)}")
    return Result("whole")
