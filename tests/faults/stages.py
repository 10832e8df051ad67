"""Every command that writes, with inputs so small that it can run thousands of times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Shape = Literal["folder", "file", "training", "run"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command.

    command: the words after `koine`, run in an empty folder; `@NAME` is a path in the world of `worlds.py`.
    outs: what it writes, below that folder.
    shape: folder and file are whole or absent at every moment; a training's folder is whole when it holds training.json;
        a run's folder holds artifacts of which each is whole or absent.
    begins_as: the folder starts with what a kill of this other stage leaves.
    quick: belongs to the part that the ordinary tests run.
    weight: its share of the time, relative to others.
    """

    name: str
    command: str
    outs: tuple[str, ...] = ("out",)
    shape: Shape = "folder"
    begins_as: str | None = None
    quick: bool = False
    weight: float = 1.0

    def words(self, world: Path, **others: str) -> list[str]:
        """The command's words. others: `out="x"` writes to x in place of out."""
        words = [others.get(word, word) if word in self.outs else word for word in self.command.split()]
        return [word.replace("@", f"{world}/") for word in words]


PRETRAIN = (
    "train pretrain --preset koine-0.5m --steps 3 --batch-size 2 --sequence-length 32 --data @tokens --tokenizer @tokenizer "
    "--checkpoint-every 1 --keep-last 1 --evaluate-data @text.jsonl --evaluate-limit 1 --evaluate-every 1 --threads 1 "
    "--dtype float32 --device cpu --out out"
)
STAGES = (
    Stage(
        name="tokenizer-train",
        command="tokenizer train --data @text.jsonl --vocab-size 300 --min-frequency 2 --out out",
        quick=True,
    ),
    Stage(
        name="tokenizer-extend",
        command="tokenizer extend @exportable --data @longer.jsonl --tokens 12 --min-frequency 2 --out out",
    ),
    Stage(
        name="tokenizer-adapt",
        command="tokenizer adapt @model --tokenizer @larger-tokenizer --out out",
    ),
    Stage(
        name="tokenizer-measure",
        command="tokenizer measure @tokenizer @larger-tokenizer --data @text.jsonl --out out.json --report out.html",
        outs=("out.json", "out.html"),
        shape="file",
    ),
    Stage(
        name="data-sample",
        command="data sample --languages de,ja --documents-per-language 4 --questions-per-language 4 --code-bytes 2000 --out out",
    ),
    Stage(
        name="data-tokenize", command="data tokenize @text.jsonl --tokenizer @tokenizer --out out", quick=True
    ),
    Stage(
        name="data-tokenize-2",
        command="data tokenize @text.jsonl --tokenizer @tokenizer --workers 2 --out out",
        weight=0.5,
    ),
    Stage(name="train-pretrain", command=PRETRAIN, shape="training", weight=2.0),
    Stage(name="train-resume", command=PRETRAIN, shape="training", begins_as="train-pretrain", weight=2.0),
    Stage(
        name="train-sft",
        command="train sft --model @model --data @chat-tokens --steps 2 --batch-size 2 --sequence-length 256 "
        "--threads 1 --dtype float32 --device cpu --out out",
        shape="training",
    ),
    Stage(
        name="model-export-gguf",
        command="model export @exportable --format gguf --out out.gguf",
        outs=("out.gguf",),
        shape="file",
    ),
    Stage(
        name="model-export-checkpoint",
        command="model export @halfway/out/checkpoints/step-000002 --format safetensors --out out",
    ),
    Stage(name="model-import-gguf", command="model import @gguf/model.gguf --out out"),
    Stage(name="model-import-pickled", command="model import @pickled --out out"),
    Stage(
        name="merge-linear",
        command="merge linear @model @branch --out out --threads 1",
        quick=True,
        weight=2.0,
    ),
    Stage(
        name="merge-ties",
        command="merge ties @branch @model --base @model --out out --threads 2 --max-shard-size 300KB",
    ),
    Stage(name="merge-cross-modal", command="merge cross-modal @multimodal @branch --out out"),
    Stage(
        name="merge-search",
        command="merge search @model @branch --data @de.jsonl --limit 1 --parts 1 --rounds 0 --out out.json",
        outs=("out.json",),
        shape="file",
    ),
    Stage(name="upcycle-btx", command="upcycle btx --seed-model @model --experts code=@branch --out out"),
    Stage(name="upcycle-bam", command="upcycle bam --seed-model @model --experts code=@branch --out out"),
    Stage(
        name="upcycle-nexus",
        command="upcycle nexus --seed-model @model --experts code=@branch --domain-text code=@de.jsonl --domain-size 8 --out out",
    ),
    Stage(
        name="extend-add",
        command="extend @nexus --expert law=@branch --domain-text @en.jsonl --out out",
    ),
    Stage(name="extend-remove", command="extend @mixture --remove code --out out"),
    Stage(
        name="evaluate",
        command="evaluate @model --data @de.jsonl --limit 1 --out out.json",
        outs=("out.json",),
        shape="file",
        quick=True,
    ),
    Stage(
        name="evaluate-long",
        command="evaluate @model --suite long --lengths 256 --depths 50 --tasks single --samples 1 --out out.json --page out.html",
        outs=("out.json", "out.html"),
        shape="file",
    ),
    Stage(
        name="run",
        command="run @three.py:three --set data=@longer.txt",
        outs=("runs/three/text", "runs/three/parts", "runs/three/last"),
        shape="run",
        weight=3.0,
    ),
    Stage(
        name="adopt",
        command="adopt @tokens --run three --name text",
        outs=("runs/three/text",),
        shape="run",
    ),
    Stage(
        name="report", command="report @finished/runs/three --out out.html", outs=("out.html",), shape="file"
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}
