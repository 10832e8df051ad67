"""Training, its checkpoints and its processes: what somebody else's folder, a damaged record or a half-set environment says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from . import worlds
from .case import Case
from .cases_model import RESUME

CHECKPOINT = "halfway/checkpoints/step-000001"
EXPORT = f"model export {CHECKPOINT} --format safetensors --out new"
BTX = "upcycle btx --seed-model model --experts branch --out new"
EXTEND = "extend nexus --expert other=branch --domain-text text.jsonl --out new"
TRAIN = (
    "train pretrain --preset koine-0.5m --steps 2 --batch-size 2 --sequence-length 32 --data tokens "
    "--tokenizer tokenizer --out out"
)


def hostile_index(folder: Path) -> None:
    """An index that runs a command when it is unpickled, with sums that fit."""
    from koine.files import sha256_file

    (folder / CHECKPOINT / ".metadata").write_bytes(b"cos\nsystem\n(S'touch mark'\ntR.")
    where = folder / CHECKPOINT / "checkpoint.json"
    about = json.loads(where.read_text())
    about["files"][".metadata"] = sha256_file(folder / CHECKPOINT / ".metadata")
    where.write_text(json.dumps(about))


def nexus(*then: Callable[[Path], None]) -> Callable[[Path], None]:
    """A mixture whose router knows domains, and a branch to add; spoilt by `then`."""

    def build(folder: Path) -> None:
        worlds.run_koine(
            "upcycle", "nexus", "--seed-model", str(folder / "model"), "--experts", f"branch={folder / 'branch'}",
            "--domain-text", f"branch={folder / 'text.jsonl'}", "--domain-size", "8", "--out", str(folder / "nexus"),
        )  # fmt: skip

    return worlds.both(worlds.having("model", "branch", "text"), build, *then)


CASES = (
    Case(
        mistake="somebody else's checkpoint that would run a command, to make a model of",
        command=EXPORT,
        prepare=worlds.having("halfway", then=hostile_index),
        says=f"{CHECKPOINT}/.metadata: its index is not one of a checkpoint (it names os.system); do not use this checkpoint; take one from a source that you trust",
    ),
    Case(
        mistake="somebody else's checkpoint that would run a command, to go on from",
        command=RESUME,
        prepare=worlds.having("tokens", "tokenizer", "halfway", then=hostile_index),
        says=f"{CHECKPOINT}/.metadata: its index is not one of a checkpoint (it names os.system); do not use this checkpoint; take one from a source that you trust",
    ),
    Case(
        mistake="a checkpoint whose record has a step below 0",
        command=EXPORT,
        prepare=worlds.having("halfway", then=worlds.edited_json(f"{CHECKPOINT}/checkpoint.json", step=-1)),
        says=f"{CHECKPOINT}/checkpoint.json: damaged checkpoint; choose an earlier checkpoint",
    ),
    Case(
        mistake="a checkpoint whose record is a list",
        command=EXPORT,
        prepare=worlds.having("halfway", then=worlds.written(f"{CHECKPOINT}/checkpoint.json", "[1]")),
        says=f"{CHECKPOINT}/checkpoint.json: damaged checkpoint; choose an earlier checkpoint",
    ),
    Case(
        mistake="a checkpoint of a later version",
        command=EXPORT,
        prepare=worlds.having("halfway", then=worlds.edited_json(f"{CHECKPOINT}/checkpoint.json", format=9)),
        says=f"{CHECKPOINT}: checkpoint of format 9, not 1; choose an earlier checkpoint",
    ),
    Case(
        mistake="a checkpoint without its index",
        command=EXPORT,
        prepare=worlds.having("halfway", then=worlds.removed(f"{CHECKPOINT}/.metadata")),
        says=f"{CHECKPOINT}/.metadata: damaged checkpoint (its sha256 differs); choose an earlier checkpoint",
    ),
    Case(
        mistake="the record of a training that is empty, to go on from",
        command=TRAIN.replace("--out out", "--out trained"),
        prepare=worlds.having(
            "tokens", "tokenizer", "trained", then=worlds.written("trained/training.json", "{}")
        ),
        says="trained/training.json: the field 'identity' is missing; it is damaged; choose another --out",
    ),
    Case(
        mistake="the record of a training that is a list, to ask what a step saw",
        command="data at-step trained 0",
        prepare=worlds.having("trained", then=worlds.written("trained/training.json", "[]")),
        says="trained/training.json: is not a JSON object; it is damaged; train again, or copy the folder again",
    ),
    Case(
        mistake="a branch whose record says nonsense of what it has read",
        command=BTX,
        prepare=worlds.having("model", "branch", then=worlds.written("branch/training.json", '{"drawn": 5}')),
        says="branch/training.json: the field 'drawn' is 5; it must be a list",
    ),
    Case(
        mistake="a branch with a cut record of what it has read",
        command=BTX,
        prepare=worlds.having("model", "branch", then=worlds.written("branch/drawn.json", '{"drawn": [')),
        says="branch/drawn.json: not valid JSON (…); the file is damaged or truncated; write it again",
    ),
    Case(
        mistake="a mixture whose places in its sources are no places",
        command="train pretrain --preset koine-0.5m --mixture mixture.json --tokenizer tokenizer --out out",
        prepare=worlds.having("tokens", "tokenizer", then=worlds.write_mixture(drawn=[1])),
        says="mixture.json: drawn: is not a JSON object; train again",
    ),
    Case(
        mistake="fresh data for a model that has read nothing",
        command="train pretrain --model model --data tokens --steps 2 --batch-size 2 --sequence-length 32 --fresh-data --out out",
        prepare=worlds.having("tokens", "model"),
        says="model: --fresh-data, and nothing says what was read before; leave it out, or go on from a model that this version of Koine trained",
    ),
    Case(
        mistake="an experiment tracker without the extra track",
        command=TRAIN + " --track wandb",
        prepare=worlds.having("tokens", "tokenizer"),
        during=worlds.without_package("wandb"),
        simulated="the package is hidden",
        says="to log a training to wandb, the package 'wandb' is needed and not installed; … -m pip install 'koine-lm[track]'",
    ),
    Case(
        mistake="a seed of more than 64 bits",
        command=TRAIN + " --seed 99999999999999999999999",
        prepare=worlds.having("tokens", "tokenizer"),
        says="seed is 99999999999999999999999; it must be at most 9223372036854775807",
    ),
    Case(
        mistake="a hundred million threads",
        command=TRAIN + " --threads 100000000",
        prepare=worlds.having("tokens", "tokenizer"),
        says="threads is 100000000; it must be at most 4096",
    ),
    Case(
        mistake="a weight decay that is no number",
        command=TRAIN + " --weight-decay nan",
        prepare=worlds.having("tokens", "tokenizer"),
        says="weight_decay is nan; it must be a number",
    ),
    Case(
        mistake="an encoder of domains of an unknown kind",
        command=EXTEND,
        prepare=nexus(worlds.written("nexus/domain_encoder/encoder.json", '{"kind": "word2vec"}')),
        says="nexus/domain_encoder/encoder.json: unknown kind of encoder 'word2vec'",
    ),
    Case(
        mistake="an encoder of domains that is cut short",
        command=EXTEND,
        prepare=nexus(worlds.cut("nexus/domain_encoder/encoder.safetensors")),
        says="nexus/domain_encoder/encoder.safetensors: is not the file of this encoder (…); copy the mixture's folder whole, or upcycle again",
    ),
    Case(
        mistake="an encoder of domains that names no model",
        command=EXTEND,
        prepare=nexus(worlds.written("nexus/domain_encoder/encoder.json", '{"kind": "hidden"}')),
        says="nexus/domain_encoder/encoder.json: names no model; upcycle again",
    ),
    Case(
        mistake="a new expert's share above 1",
        command=EXTEND + " --share 2",
        prepare=nexus(),
        says="the new model's share is 2.0; it must lie between 0 and 1",
    ),
    Case(
        mistake="a share for an expert that is removed",
        command="extend mixture --remove code --share 0.5 --out new",
        prepare=worlds.having("mixture"),
        says="--share is given with --remove; leave it out",
    ),
    Case(
        mistake="a record of a mixture that is none",
        command="extend mixture --remove code --expert branch --out new",
        prepare=worlds.having(
            "mixture",
            "branch",
            then=worlds.written("mixture/mixture.json", '{"changes": [5], "experts": []}'),
        ),
        says="mixture/mixture.json: the field 'experts' is []; it must be an object",
    ),
    Case(
        mistake="an encoder of domains that is no folder",
        command="upcycle nexus --seed-model model --experts branch --domain-text branch=text.jsonl --encoder nowhere --out new",
        prepare=worlds.having("model", "branch", "text"),
        says="nowhere: no such folder; give a sentence-transformers model's folder",
    ),
    Case(
        mistake="a factor of the balance loss that is no number",
        command=BTX + " --load-balancing nan",
        prepare=worlds.having("model", "branch"),
        says="load_balancing is nan; it must be a number",
    ),
)
