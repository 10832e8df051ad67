"""Files of ours that were cut, emptied or edited."""

from __future__ import annotations

import json
from pathlib import Path

from .case import Case
from .worlds import TRAIN, cut, flip_byte, having, removed, written

TRAINING = f"{' '.join(TRAIN)} --data tokens --tokenizer tokenizer --out"
AT_STEP = "data at-step trained 1"


def other_seed(folder: Path) -> None:
    """Change one number of a training's mixture."""
    record = folder / "trained" / "training.json"
    trained = json.loads(record.read_text())
    trained["mixture"]["seed"] += 1
    record.write_text(json.dumps(trained))


CASES = (
    Case(
        mistake="an artifact's record cut short",
        command="lineage runs/r/a",
        prepare=written("runs/r/a/artifact.json", '{"artifact": "a"'),
        says="…runs/r/a/artifact.json: not valid JSON (…); remove the artifact's folder to have it built again",
    ),
    Case(
        mistake="an artifact's record without a field",
        command="lineage runs/r/a",
        prepare=written("runs/r/a/artifact.json", '{"artifact": "a"}'),
        says="…runs/r/a/artifact.json: has no 'step'; remove the artifact's folder to have it built again",
    ),
    Case(
        mistake="the lineage of a folder that no plan built",
        command="lineage runs/r/a",
        prepare=written("runs/r/a/notes.txt", "a note"),
        says="runs/r/a: holds no artifact.json; only what a command of Koine made, or `koine adopt` registered, has a lineage",
    ),
    Case(
        mistake="a run's record cut short",
        command="report runs/r",
        prepare=written("runs/r/plan.json", '{"status"'),
        says="runs/r/plan.json: not valid JSON (…); the file is damaged or truncated; write it again",
    ),
    Case(
        mistake="a run's record that is JSON and no record",
        command="report runs/r",
        prepare=written("runs/r/plan.json", "[]"),
        says="runs/r/plan.json: not the record of a run; run the plan again",
    ),
    Case(
        mistake="a report of a folder that is no run",
        command="report notes",
        prepare=written("notes/note.txt", "a note"),
        says="notes: not a run folder: it holds no artifact; give the folder that koine run wrote, runs/NAME",
    ),
    Case(
        mistake="a file to be adopted",
        command="adopt text.jsonl --run r --name a",
        prepare=having("text"),
        says="text.jsonl: is a file; an artifact is a folder; put it into a folder of its own",
    ),
    Case(
        mistake="a training's record cut short",
        command=AT_STEP,
        prepare=having("trained", then=cut("trained/training.json")),
        says="trained/training.json: not valid JSON (…); the file is damaged or truncated; write it again",
    ),
    Case(
        mistake="a training's record that was edited",
        command=AT_STEP,
        prepare=having("trained", then=other_seed),
        says="trained/training.json: tells of another mixture than the training's own; it was edited or damaged; copy the model again",
    ),
    Case(
        mistake="a checkpoint without its record",
        command=f"{TRAINING} halfway",
        prepare=having(
            "halfway", "tokens", "tokenizer", then=removed("halfway/checkpoints/step-000001/checkpoint.json")
        ),
        says="halfway/checkpoints/step-000001/checkpoint.json: damaged checkpoint; "
        "remove step-000001 to start from the beginning (there is none before it)",
    ),
    Case(
        mistake="a model's weights of no bytes",
        command="merge linear model branch --out out",
        prepare=having("model", "branch", then=written("model/model.safetensors", "")),
        says="model/model.safetensors: not a whole safetensors file (…); it is truncated or damaged; copy or build it again",
    ),
    Case(
        mistake="a model's weights whose first bytes were damaged",
        command="merge linear model branch --out out",
        prepare=having("model", "branch", then=flip_byte("model/model.safetensors", 6)),
        says="model/model.safetensors: not a whole safetensors file (…); it is truncated or damaged; copy or build it again",
    ),
    Case(
        mistake="an export with a tokenizer cut short",
        command="model export exportable --format gguf --out model.gguf",
        prepare=having("exportable", then=cut("exportable/tokenizer.json")),
        says="exportable: not a tokenizer (…); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="the settings of a tokenizer cut short",
        command="data tokenize text.jsonl --tokenizer tokenizer --out out",
        prepare=having("text", "tokenizer", then=cut("tokenizer/tokenizer_config.json")),
        says="tokenizer: tokenizer_config.json is not valid JSON (…); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="token shards without their manifest",
        command=f"{TRAINING} out",
        prepare=having("tokens", "tokenizer", then=removed("tokens/manifest.json")),
        says="tokens: holds no token shards (manifest.json is missing); write them with `koine data tokenize`",
    ),
)
