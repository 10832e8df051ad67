"""Bad inputs of preference data: records, templates, token shards of groups, references and their cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import worlds
from .case import Case
from .cases_readers import HINT

PAIR = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red.", "language": "en"}
SCORED = {"prompt": "Sky?", "completions": ["Blue.", "Red."], "scores": [1.0, 0.0], "language": "en"}
ODD_TEMPLATE = (
    "{% for message in messages %}{% if loop.last %}last: {% endif %}"
    "{{ message['role'] }}: {% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}\n"
    "{% endgeneration %}{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
)
"""Marks the last message, so that the prompt alone is written in another way than before an answer."""
TRAIN = (
    "align train --model model --data pairs --steps 2 --batch-size 2 --sequence-length 96 --device cpu "
    "--dtype float32 --threads 1 --reference-cache cache --out new"
)


def tokenize(kind: str) -> str:
    return f"data tokenize text.jsonl --tokenizer tokenizer --out new --kind {kind}"


def bad_record(mistake: str, kind: str, record: dict[str, Any], reason: str) -> Case:
    """A file of one bad record, which is tokenized as groups."""
    return Case(
        mistake=mistake,
        command=tokenize(kind),
        prepare=worlds.having("tokenizer", then=worlds.written("text.jsonl", json.dumps(record) + "\n")),
        says="1 of 1 records are bad (100.0%, at most 1.0% may be); the first is text.jsonl, line 1: "
        f"{reason}; {HINT}",
    )


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


def odd_template(folder: Path) -> None:
    worlds.written("text.jsonl", json.dumps(PAIR) + "\n")(folder)
    worlds.written("tokenizer/chat_template.jinja", ODD_TEMPLATE)(folder)


def cache_of_other_weights(folder: Path) -> None:
    """Fill the cache, and say in it that it is of other weights."""
    from koine.files import read_json, write_json
    from koine.terminal import quiet_output

    with quiet_output():
        worlds.run_koine(
            *("align", "train", "--model", str(folder / "model"), "--data", str(folder / "pairs")),
            *("--loss", "dpo", "--steps", "1", "--batch-size", "2", "--sequence-length", "96"),
            *("--device", "cpu", "--dtype", "float32", "--threads", "1"),
            *("--reference-cache", str(folder / "cache"), "--out", str(folder / "earlier")),
        )
    [record] = folder.glob("cache/*/reference.json")
    write_json(record, {**read_json(record), "weights": "0" * 64})


CASES = (
    bad_record(
        "a pair without a rejected answer",
        "preferences",
        without(PAIR, "rejected"),
        "lacks fields of the format preference: chosen, rejected (it has prompt, chosen, language)",
    ),
    bad_record(
        "a pair whose answers are the same",
        "preferences",
        {**PAIR, "rejected": "Blue."},
        "the chosen answer equals the rejected one",
    ),
    bad_record(
        "a pair with an empty answer",
        "preferences",
        {**PAIR, "chosen": ""},
        "chosen: message 2: the text is empty",
    ),
    bad_record(
        "a label that is right with probability 1.2",
        "preferences",
        {**PAIR, "probability": 1.2},
        "the probability is 1.2, it must be from 0 to 1",
    ),
    bad_record(
        "a score that is not a number",
        "scored",
        {**SCORED, "scores": [float("nan"), 1.0]},
        "a score is not a finite number",
    ),
    bad_record(
        "fewer scores than completions",
        "scored",
        {**SCORED, "scores": [1.0]},
        "1 scores for 2 completions",
    ),
    bad_record(
        "one scored completion, for a loss that compares several",
        "scored",
        {**SCORED, "completions": ["Blue."], "scores": [1.0]},
        "fewer than two completions",
    ),
    bad_record(
        "chats in place of pairs",
        "preferences",
        {
            "messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}],
            "language": "en",
        },
        "lacks fields of the format preference: chosen, rejected (it has messages, language)",
    ),
    Case(
        mistake="a turn that asks for a revision, of scored completions",
        command=tokenize("scored") + " --revision Better?",
        prepare=worlds.having("tokenizer", then=worlds.written("text.jsonl", json.dumps(SCORED) + "\n")),
        says="a revision turn is for preferences; give --kind preferences with it",
    ),
    Case(
        mistake="a chat template that writes the prompt in another way before an answer",
        command=tokenize("preferences"),
        prepare=worlds.having("tokenizer", then=odd_template),
        says="record text.jsonl:1: the chat template does not write the prompt as the beginning of the whole conversation; use a chat template that only appends a message, so that a completion follows its prompt",
    ),
    Case(
        mistake="documents in place of pairs",
        command=TRAIN.replace("--data pairs", "--data tokens") + " --loss dpo",
        prepare=worlds.having("model", "tokens"),
        says="tokens: holds documents, not groups of completions; tokenize with --kind preferences",
    ),
    Case(
        mistake="pairs in place of documents",
        command="train sft --model model --data pairs --steps 2 --out new",
        prepare=worlds.having("model", "pairs"),
        says="pairs: holds groups of completions (preferences), which are no text to train on one after another; use `koine align train`, or tokenize the answers to take with --take",
    ),
    Case(
        mistake="prompts longer than a row",
        command=TRAIN.replace("--sequence-length 96", "--sequence-length 12") + " --loss dpo",
        prepare=worlds.having("model", "pairs"),
        says="pairs: 3 of 3 groups have no room for their completions in a row of 12 tokens; raise --sequence-length (the longest needs … tokens)",
    ),
    Case(
        mistake="a loss with a strength of zero",
        command=TRAIN + " --loss dpo:beta=0",
        prepare=worlds.having("model", "pairs"),
        says="loss 'dpo:beta=0': dpo: beta is 0.0; it must be greater than 0",
    ),
    Case(
        mistake="a loss of labelled answers on pairs",
        command=TRAIN + " --loss kto",
        prepare=worlds.having("model", "pairs"),
        says="pairs: holds preferences groups, and the loss 'kto…' takes labelled ones; tokenize records with `--kind labelled`, or choose a loss of preferences groups: …",
    ),
    Case(
        mistake="a loss with revisions on pairs without any",
        command=TRAIN + " --loss srpo",
        prepare=worlds.having("model", "pairs"),
        says="pairs: a group has 2 completions, and the loss 'srpo…' takes 6; SRPO's groups need revisions of both answers",
    ),
    Case(
        mistake="a loss of pairs that needs a reference, without one",
        command=TRAIN + " --loss dpo --reference none",
        prepare=worlds.having("model", "pairs"),
        says="the loss dpo:beta=0.1 needs a reference; give --reference start or --reference MODEL",
    ),
    Case(
        mistake="a reference with another tokenizer than the pairs",
        command=TRAIN + " --loss dpo --reference exportable",
        prepare=worlds.having("model", "pairs", "exportable"),
        says="exportable: has another tokenizer than the pairs; give a reference with the tokenizer of the model",
    ),
    Case(
        mistake="a cache of another reference's log-probabilities",
        command=TRAIN + " --loss dpo",
        prepare=worlds.having("model", "pairs", then=cache_of_other_weights),
        says="cache/…: is a cache of another weights; remove the folder; its log-probabilities are computed again",
    ),
    Case(
        mistake="documents to inspect as pairs",
        command="align inspect tokens --model model",
        prepare=worlds.having("model", "tokens"),
        says="tokens: holds documents, not groups of completions; tokenize with --kind preferences, labelled or scored",
    ),
    Case(
        mistake="pairs to inspect with a model of another tokenizer",
        command="align inspect pairs --model exportable",
        prepare=worlds.having("exportable", "pairs"),
        says="pairs: tokenized with another tokenizer than exportable; tokenize again with the tokenizer of the model, or give the records themselves",
    ),
    Case(
        mistake="records of another kind to inspect",
        command="align inspect text.jsonl --model model",
        prepare=worlds.having("model", then=worlds.written("text.jsonl", json.dumps(SCORED) + "\n")),
        says="1 of 1 records are bad (100.0%, at most 1.0% may be); the first is text.jsonl, line 1: lacks fields of the format preference: chosen, rejected (it has prompt, completions, scores, language); "
        + HINT,
    ),
)
