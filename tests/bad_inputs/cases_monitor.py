"""Monitoring a preference training, stopping it, and watching checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import worlds
from .case import Case

PAIR = {"prompt": "Hallo", "chosen": "Guten Tag", "rejected": "Nein", "language": "de"}
WATCH = "align watch model branch --data pairs.jsonl --max-new-tokens 4 --out new"
PRETRAIN = (
    "train pretrain --preset koine-0.5m --steps 2 --batch-size 2 --sequence-length 32 --data tokens "
    "--tokenizer tokenizer --out new"
)
ALIGN = (
    "align train --model model --data groups --loss dpo --steps 2 --batch-size 2 --sequence-length 64 "
    "--reference-cache cache --out new"
)
MONITORED = f"{ALIGN} --monitor-pairs pairs.jsonl --evaluate-every 1"


def pairs(*lines: object) -> Callable[[Path], None]:
    """Write a pairs.jsonl of these lines."""
    return lambda folder: worlds.write_lines(folder / "pairs.jsonl", list(lines))


def groups(folder: Path) -> None:
    """Write pairs.jsonl, and its token shards."""
    worlds.write_lines(folder / "pairs.jsonl", [{**PAIR, "id": str(number)} for number in range(4)])
    worlds.run_koine(
        "data", "tokenize", str(folder / "pairs.jsonl"), "--kind", "preferences", "--workers", "1",
        "--tokenizer", str(worlds.built("tokenizer")), "--out", str(folder / "groups"),
    )  # fmt: skip


def empty_folder(folder: Path) -> None:
    (folder / "run").mkdir()


CASES = (
    Case(
        mistake="a stop rule without an evaluation",
        command=f"{PRETRAIN} --stop-on bits_per_byte",
        prepare=worlds.having("tokens", "tokenizer"),
        says="--stop-on without --evaluate-data; give documents to evaluate on",
    ),
    Case(
        mistake="a stop rule for a metric that the training does not measure",
        command=f"{PRETRAIN} --stop-on kl=0.5 --evaluate-data text.jsonl --evaluate-every 1",
        prepare=worlds.having("tokens", "tokenizer", "text"),
        says="--stop-on kl=0.5: the metric 'kl' is not measured; known: bits_per_byte, bits_per_byte/de, "
        "bits_per_byte/domain/tale, bits_per_byte/en, bits_per_byte_domains, bits_per_byte_languages",
    ),
    Case(
        mistake="stopping on over-optimisation where the model is not sampled",
        command=f"{PRETRAIN} --stop-on overoptimisation --evaluate-data text.jsonl --evaluate-every 1",
        prepare=worlds.having("tokens", "tokenizer", "text"),
        says="--stop-on overoptimisation: entropy, mass, ead are not measured; the rule needs samples of the "
        "model: give prompts to the monitor of `koine align train`",
    ),
    Case(
        mistake="a stop rule whose limit is no number",
        command=f"{MONITORED} --stop-on kl=low",
        prepare=worlds.having("model", then=groups),
        says="--stop-on kl=low: 'low' is no limit; give METRIC=LIMIT with a number, such as kl=0.5",
    ),
    Case(
        mistake="a monitor, and no steps between evaluations",
        command=f"{ALIGN} --monitor-pairs pairs.jsonl",
        prepare=worlds.having("model", then=groups),
        says="a monitor without --evaluate-every; say after how many steps to evaluate",
    ),
    Case(
        mistake="the KL as a limit, and no reference to measure it to",
        command=f"{ALIGN.replace('--loss dpo', '--loss nll --reference none')} --monitor-pairs pairs.jsonl "
        "--evaluate-every 1 --stop-on kl=0.5",
        prepare=worlds.having("model", then=groups),
        says="--stop-on kl=0.5: the metric 'kl' is not measured; known: accuracy, accuracy/de, "
        "asked_language, asked_language/de, chosen, chosen/de, cut_off, cut_off/de, ead, ead/de, ead_1, ead_1/de, ...",
    ),
    Case(
        mistake="plain documents for the monitor's pairs",
        command=f"{ALIGN} --monitor-pairs text.jsonl --evaluate-every 1",
        prepare=worlds.having("model", "text", then=groups),
        says="40 of 40 records are bad (100.0%, at most 1.0% may be); the first is text.jsonl, line 1: lacks fields "
        "of the format preference: chosen, rejected (it has id, text, language, domain); fix the data, map its "
        "fields (--field text=COLUMN), or allow more (--max-bad)",
    ),
    Case(
        mistake="checkpoints to watch, and neither pairs nor prompts",
        command="align watch model branch --out new",
        prepare=worlds.having("model", "branch"),
        says="neither --data nor --prompts; give held-out pairs, prompts to answer, or both",
    ),
    Case(
        mistake="pairs whose chosen answer is the rejected one",
        command=WATCH,
        prepare=worlds.having("model", "branch", then=pairs({**PAIR, "rejected": PAIR["chosen"]})),
        says="1 of 1 records are bad (100.0%, at most 1.0% may be); the first is pairs.jsonl, line 1: the chosen "
        "answer equals the rejected one; fix the data, map its fields (--field text=COLUMN), or allow more "
        "(--max-bad)",
    ),
    Case(
        mistake="a folder without a model among the checkpoints",
        command=WATCH.replace("branch", "run"),
        prepare=worlds.having("model", then=worlds.both(pairs(PAIR), empty_folder)),
        says="run: holds no tokenizer.json; give a folder written by `koine tokenizer train` or a model's",
    ),
    Case(
        mistake="checkpoints of models with different tokenizers",
        command=WATCH.replace("branch", "exportable"),
        prepare=worlds.having("model", "exportable", then=pairs(PAIR)),
        says="exportable: has another tokenizer than model; give models of one training",
    ),
    Case(
        mistake="a temperature below 0 for the answers",
        command=f"{WATCH} --temperature -1",
        prepare=worlds.having("model", "branch", then=pairs(PAIR)),
        says="temperature is -1.0; it must be at least 0",
    ),
)
