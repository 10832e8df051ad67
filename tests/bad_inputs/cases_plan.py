"""Bad inputs around plans: names, settings, folders, executors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from . import worlds
from .case import Case

PLAN = """\
from pathlib import Path

from koine.plan import Plan, step


@step(version="1")
def write(*, words: int, out: Path) -> None:
    if words < 0:
        raise ValueError("no such thing as a negative word")
    (out / "text.txt").write_text("word " * words)


def small(plan: Plan, *, words: int = 3) -> None:
    plan.step(write, name="text", words=words)
"""
WITH_PLAN = worlds.written("plans.py", PLAN)


def qwen(folder: Path) -> None:
    """Write the folder of a model of another architecture, with a tokenizer."""
    shutil.copytree(worlds.built("tokenizer"), folder / "qwen")
    (folder / "qwen" / "config.json").write_text('{"model_type": "gpt_neox", "hidden_size": 8}')


def two_domains(folder: Path) -> None:
    worlds.good_text(folder)
    shutil.copyfile(folder / "text.jsonl", folder / "law.jsonl")


def no_room(patch: Any) -> None:
    patch.setattr("koine.plan.run.checks.free_disk_bytes", lambda path: 2**20)


DOMAINS = "--set domains=tales=text.jsonl,law=law.jsonl"
BRANCHES = f"run branch_train_mix --dry-run --set seed_model=model {DOMAINS}"
ADAPTATION = "run adaptation --dry-run --set model=model --set data=text.jsonl --set min_bytes_per_language=1"
WITH_BRANCHES = worlds.having("model", then=two_domains)
WITH_TEXT = worlds.having("model", "text")

CASES = (
    Case(
        mistake="a recipe on a model of another architecture",
        command=f"run branch_train_mix --set seed_model=qwen {DOMAINS}",
        prepare=worlds.both(qwen, two_domains),
        says="seed_model=qwen: is a model of type gpt_neox, and this recipe or step computes with Koine's own decoder; "
        "it computes cohere, …; this one can be evaluated, answered with, adapted, trained and merged through transformers, and not upcycled, given another attention or sharded",
    ),
    Case(
        mistake="a recipe that merges a model without weights",
        command=f"run merge_touch_up --dry-run --set models=qwen,model {DOMAINS}",
        prepare=worlds.both(qwen, WITH_BRANCHES),
        says="models=qwen: holds no model.safetensors; weights in another format must be converted first",
    ),
    Case(
        mistake="a longer context for a model of another architecture",
        command="run extend --dry-run --set model=qwen --set data=text.jsonl --set min_bytes_per_language=1",
        prepare=worlds.both(qwen, worlds.good_text),
        says="model=qwen: is a model of type gpt_neox,…",
    ),
    Case(
        mistake="a recipe on a model that is not there",
        command=BRANCHES,
        prepare=two_domains,
        says="seed_model=model: no such file or folder",
    ),
    Case(
        mistake="a recipe on a folder without a model",
        command=f"run branch_train_mix --dry-run --set seed_model=tokenizer {DOMAINS}",
        prepare=worlds.having("tokenizer", then=two_domains),
        says="seed_model=tokenizer: holds no config.json, so it is no model; "
        "give the folder of a model, not of a run or a checkpoint",
    ),
    Case(
        mistake="a recipe on a file of a model",
        command="run extend --dry-run --set model=model/config.json --set data=text.jsonl --set min_bytes_per_language=1",
        prepare=WITH_TEXT,
        says="model=model/config.json: is a file, and a folder with a model or a tokenizer is needed; give its folder",
    ),
    Case(
        mistake="a domain whose text is not there",
        command=BRANCHES,
        prepare=WITH_TEXT,
        says="domains=law=law.jsonl: no such file or folder",
    ),
    Case(
        mistake="more experts of a token than there are",
        command=f"{BRANCHES} --set top_k=3",
        prepare=WITH_BRANCHES,
        says="step 'mixed': top_k is 3; it must lie between 1 and the 2 experts",
    ),
    Case(
        mistake="an encoder of domains that does not exist",
        command=f"{BRANCHES} --set encoder=tf-idf",
        prepare=WITH_BRANCHES,
        says="step 'mixed': encoder is 'tf-idf'; possible are: tfidf, svd, hidden, or the folder of a sentence model",
    ),
    Case(
        mistake="a recipe with rows longer than the model's context",
        command=f"{BRANCHES} --set sequence_length=200000",
        prepare=WITH_BRANCHES,
        says="seed_model=model: rows have 200000 tokens (sequence_length), and the model takes at most 131072; "
        "choose at most 131072, or lengthen the model's context with the recipe extend",
    ),
    Case(
        mistake="a wrong number of weights in a recipe",
        command=f"run merge_touch_up --dry-run --set models=model,model --set weights=1,2,3 {DOMAINS}",
        prepare=WITH_BRANCHES,
        says="step 'merged': 3 weights for 2 models; give one each, with commas between",
    ),
    Case(
        mistake="a profile of a folder without a model",
        command="run profile --dry-run --set model=tokenizer",
        prepare=worlds.having("tokenizer"),
        says="model=tokenizer: holds no config.json, so it is no model; "
        "give the folder of a model, not of a run or a checkpoint",
    ),
    Case(
        mistake="a profile of one model twice",
        command="run profile --dry-run --set model=model,model",
        prepare=worlds.having("model"),
        says="two models have the name '…-model'; give each once, or rename a folder",
    ),
    Case(
        mistake="a profile in a language that the sample world does not have",
        command="run profile --dry-run --set model=model --set languages=en,bo",
        prepare=worlds.having("model"),
        says="step 'text': languages has 'bo' (Tibetan), of which CLDR knows too little for the sample world; "
        "it is there in … languages; for others give text of your own (data=PATH)",
    ),
    Case(
        mistake="a profile of a language that the user's text does not have",
        command="run profile --dry-run --set model=model --set data=text.jsonl --set languages=en,fr",
        prepare=WITH_TEXT,
        says="data=text.jsonl: languages has fr, of which the data have no text; they have: de, en",
    ),
    Case(
        mistake="a profile that knows a language from training and has no text of it",
        command="run profile --dry-run --set model=model --set languages=en,de --set primary_languages=fr",
        prepare=worlds.having("model"),
        says="step 'languages/model': primary_languages has fr, of which there is no text; possible are: en, de",
    ),
    Case(
        mistake="a profile of the speed at two tokens",
        command="run profile --dry-run --set model=model --set lengths=2",
        prepare=worlds.having("model"),
        says="step 'speed': lengths has 2; each must be more than the 17 new tokens of a run",
    ),
    Case(
        mistake="an unknown language in a recipe",
        command="run quickstart --set languages=en,xx --dry-run",
        says="step 'corpus': languages has 'xx', which is no language; did you mean 'xh' (Xhosa)?",
    ),
    Case(
        mistake="a language that the sample world does not have",
        command="run quickstart --set languages=en,bo --dry-run",
        says="step 'corpus': languages has 'bo' (Tibetan), of which CLDR knows too little for the sample world; "
        "it is there in … languages, with questions in …; for others give text of your own (data=PATH)",
    ),
    Case(
        mistake="a language twice in a recipe",
        command="run quickstart --set languages=en,de,deu,zh --dry-run",
        says="step 'corpus': languages names 'de' and 'deu', the same language, twice; name each language once",
    ),
    Case(
        mistake="languages without any question, for a recipe that teaches to chat",
        command="run quickstart --set languages=af,sw --set primary_languages=af --dry-run",
        says="step 'tokens/universal/chats': none of the languages has questions to learn chatting from (af, sw); "
        "add one to languages; questions are there in: …",
    ),
    Case(
        mistake="a language in a recipe that the user's text does not have",
        command="run quickstart --set data=text.jsonl --set languages=de,fr --dry-run",
        prepare=worlds.good_text,
        says="data=text.jsonl: languages has fr, of which the data have no text; they have: de, en",
    ),
    Case(
        mistake="too little text of every language for a recipe",
        command="run extend --set model=model --set data=text.jsonl --dry-run",
        prepare=WITH_TEXT,
        says="data=text.jsonl: no language has 20,000 bytes of text (by language: …); "
        "lower min_bytes_per_language, or give more text",
    ),
    Case(
        mistake="a language to adapt to that the text does not have",
        command=f"{ADAPTATION} --set primary_languages=en --set targets=fr",
        prepare=WITH_TEXT,
        says="step 'model': training on 'adapted' names fr, and the corpus has no text of it; possible are: en, de",
    ),
    Case(
        mistake="fields of records that are not there, in a recipe",
        command=f"{ADAPTATION} --set primary_languages=en --set fields=text=content",
        prepare=WITH_TEXT,
        says="data=text.jsonl: 40 of 40 records are bad … no field 'content' (it has …); fix the data, "
        "map its fields (--set fields=text=COLUMN), or allow more (--set max_bad_share=SHARE)",
    ),
    Case(
        mistake="a recipe with a tokenizer that is none",
        command=f"{ADAPTATION} --set primary_languages=en --set tokenizer=empty",
        prepare=worlds.having("model", "text", then=worlds.written("empty/readme.txt", "nothing")),
        says="tokenizer=empty: holds no tokenizer.json; give a folder with a tokenizer",
    ),
    Case(
        mistake="a file in place of the folder of runs",
        command="run plans.py:small",
        prepare=worlds.both(WITH_PLAN, worlds.written("runs", "")),
        says="…runs: a file, and the run needs a folder here; choose another --runs or --name, or move it away",
    ),
    Case(
        mistake="a disk that is too small for a run",
        command="run quickstart --set languages=en,zh",
        during=no_room,
        simulated="one MiB is said to be free",
        says="runs/quickstart: the run will write about … of it for …), and 1 MiB are free; "
        "free some, or choose a folder on another disk with --runs",
    ),
    Case(
        mistake="a plan that does not exist",
        command="run quickstrat",
        says="unknown recipe 'quickstrat'; did you mean 'quickstart'?",
    ),
    Case(
        mistake="a file of plans that is not there",
        command="run plans.py:small",
        says="plans.py: no such plan file",
    ),
    Case(
        mistake="a file of plans without that function",
        command="run plans.py:smal",
        prepare=WITH_PLAN,
        says="plans.py:smal: no plan function 'smal'; did you mean 'small'?",
    ),
    Case(
        mistake="a file of plans that is not Python",
        command="run plans.py:small",
        prepare=worlds.written("plans.py", "def small(plan:\n"),
        says="plans.py:1: not valid Python ('(' was never closed); fix the plan file",
    ),
    Case(
        mistake="a setting with a typo",
        command="run plans.py:small --set wrods=4",
        prepare=WITH_PLAN,
        says="--set: unknown key 'wrods'; did you mean 'words'?",
    ),
    Case(
        mistake="a cluster of languages with a typo",
        command="run quickstart --set primary_cluster=europan",
        says="primary_cluster is 'europan'; did you mean 'european'?",
    ),
    Case(
        mistake="a setting of a recipe out of its bounds",
        command="run quickstart --set pretrain_steps=0",
        says="pretrain_steps is 0; it must be at least 1",
    ),
    Case(
        mistake="a setting without a value",
        command="run plans.py:small --set words",
        prepare=WITH_PLAN,
        says="--set: 'words' is not key=value",
    ),
    Case(
        mistake="a setting of the wrong kind",
        command="run plans.py:small --set words=many",
        prepare=WITH_PLAN,
        says="--set words: 'many' does not fit; expected: integer",
    ),
    Case(
        mistake="a closing without the inputs that its function takes",
        command="run plans.py:small",
        prepare=worlds.written(
            "plans.py", PLAN + "    plan.closing(show)\n\n\ndef show(run, text):\n    return str(text)\n"
        ),
        says="plan.closing: show: missing a required argument: 'text'; give it the run, and the inputs by name",
    ),
    Case(
        mistake="a step with a parameter called purpose",
        command="run plans.py:small",
        prepare=worlds.written("plans.py", PLAN.replace("words: int, out", "purpose: str, out")),
        says="write: a step's parameter cannot be called 'purpose', which is one of plan.step; call it otherwise",
    ),
    Case(
        mistake="an executor that does not exist",
        command="run plans.py:small --executor slurm",
        prepare=WITH_PLAN,
        says="--executor: unknown executor 'slurm'; known: local, ray",
    ),
    Case(
        mistake="Ray without the extra cluster",
        command="run plans.py:small --executor ray",
        prepare=WITH_PLAN,
        during=worlds.without_package("ray"),
        simulated="the package is hidden",
        says="to run a plan on a Ray cluster, the package 'ray' is needed and not installed; … -m pip install 'koine-lm[cluster]'",
    ),
    Case(
        mistake="adopting what is not there",
        command="adopt missing --run mine --name text",
        says="missing: no such folder",
    ),
    Case(
        mistake="the lineage of a folder that is no artifact",
        command="lineage tokenizer",
        prepare=worlds.having("tokenizer"),
        says="tokenizer: holds no artifact.json; only what a command of Koine made, or `koine adopt` registered, has a lineage",
    ),
    Case(
        mistake="a report of a run that is not there",
        command="report runs/missing",
        says="runs/missing: no such run folder; build one with koine run PLAN",
    ),
)
