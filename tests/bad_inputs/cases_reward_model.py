"""Reward models: data that are no pairs, folders that are no reward model, another tokenizer."""

from __future__ import annotations

from . import worlds
from .case import Case

ROW = '{"prompt": "Hi", "completion": "Hello", "language": "en"}\n'
REWARD = "align reward --steps 2 --batch-size 2 --sequence-length 64 --out new"

CASES = (
    Case(
        mistake="plain texts for a reward model",
        command=f"{REWARD} --model model --data tokens",
        prepare=worlds.having("model", "tokens"),
        says="tokens: holds documents, and a reward model learns from pairs; tokenize prompt, chosen and rejected with --kind preferences",
    ),
    Case(
        mistake="plain texts to evaluate a reward model on",
        command=f"{REWARD} --model model --data pairs --evaluate-pairs tokens",
        prepare=worlds.having("model", "pairs", "tokens"),
        says="tokens: holds documents, and a reward model learns from pairs; tokenize prompt, chosen and rejected with --kind preferences",
    ),
    Case(
        mistake="a reward model of another tokenizer than the pairs",
        command=f"{REWARD} --model exportable --data pairs",
        prepare=worlds.having("exportable", "pairs"),
        says="pairs: tokenized with another tokenizer than exportable; run `koine data tokenize` again with this tokenizer, or give the one that was used",
    ),
    Case(
        mistake="a reward model to evaluate as a language model",
        command="evaluate reward --data text.jsonl",
        prepare=worlds.having("reward", "text"),
        says="reward: is a reward model (Cohere2ForSequenceClassification), which scores text and writes none; give a language model; `koine align reward --model` takes a reward model too",
    ),
    Case(
        mistake="a reward model without its head",
        command=f"{REWARD} --model reward --data pairs",
        prepare=worlds.having(
            "reward",
            "pairs",
            then=worlds.changed_tensors(
                "reward/model.safetensors", lambda tensors: tensors.pop("score.weight")
            ),
        ),
        says="reward: the checkpoint lacks 1 tensors (score.weight); config.json and the weights do not belong together",
    ),
    Case(
        mistake="a classifier of two labels for a reward model",
        command=f"{REWARD} --model reward --data pairs",
        prepare=worlds.having(
            "reward",
            "pairs",
            then=worlds.edited_json("reward/config.json", id2label={"0": "good", "1": "bad"}),
        ),
        says="reward/config.json: is a classifier of 2 labels, and a reward model has one; give a reward model",
    ),
    Case(
        mistake="a centring weight below 0",
        command=f"{REWARD} --model model --data pairs --centring -1",
        prepare=worlds.having("model", "pairs"),
        says="centring is -1.0; it must be at least 0",
    ),
    Case(
        mistake="an interval of evaluations of a reward model, and nothing to evaluate on",
        command=f"{REWARD} --model model --data pairs --evaluate-every 1",
        prepare=worlds.having("model", "pairs"),
        says="--evaluate-every without --evaluate-pairs; give held-out pairs",
    ),
    Case(
        mistake="a language model in place of a reward model",
        command="align score rows.jsonl --reward reward-model --reward-model model --out scored.jsonl",
        prepare=worlds.having("model", then=worlds.written("rows.jsonl", ROW)),
        says="model: holds no reward model: config.json names no class ...ForSequenceClassification; train one: koine align reward",
    ),
    Case(
        mistake="the reward of a reward model without the model",
        command="align score rows.jsonl --reward reward-model --out scored.jsonl",
        prepare=worlds.written("rows.jsonl", ROW),
        says="--reward: the reward 'reward-model' needs a model; give --reward-model MODEL",
    ),
)
