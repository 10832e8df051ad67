"""Groups from records: the tokens of the chat template, bad records named, restarts byte-identical."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from koine.data import TokenSource, tokenize
from koine.data.group_tokens import encode_group, split_answer
from koine.data.groups import Segment
from koine.errors import UserError
from koine.tokenizer import Tokenizer, load_tokenizer

from .conftest import write_records
from .groups import REVISION, group_tokens, labelled, pair, scored

USER = {"role": "user", "content": "down to the sea"}
GOOD = {"role": "assistant", "content": "the river runs"}
BAD = {"role": "assistant", "content": "over old stones again"}
CHAT = [
    {"role": "system", "content": "be old"},
    {"role": "user", "content": "back to the river"},
    {"role": "assistant", "content": "and again"},
    USER,
]

LAST_TURN_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ system }} {% endif %}[{{ message['content'] }}]"
    "{% else %}{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
"""Writes the system prompt into the user's turn only where that is the last one, as some published ones do."""


@pytest.fixture(scope="module")
def loaded(tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tokenizer)


def pieces(tokens: list[int], segments: list[Segment]) -> list[list[int]]:
    out, start = [], 0
    for one in segments:
        out.append(tokens[start : start + one.length])
        start += one.length
    assert start == len(tokens)
    return out


def read(folder: Path, number: int = 0) -> tuple[TokenSource, list[list[int]]]:
    source = TokenSource(folder)
    return source, pieces(source.tokens(number).tolist(), source.segments(number))


SHAPES: dict[str, dict[str, Any]] = {
    "texts": {"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "conversations and prompt": {
        "prompt": USER["content"],
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pair_is_the_same_from_every_shape(
    tokenizer: Path, loaded: Tokenizer, tmp_path: Path, shape: str
) -> None:
    folder = group_tokens(tmp_path, tokenizer, [{"language": "en", **SHAPES[shape]}])
    source, (prompt, chosen, rejected) = read(folder)
    header, _ = loaded.encode_messages([USER], generation_prompt=True)
    assert prompt == header
    assert [*prompt, *chosen] == loaded.encode_messages([USER, GOOD])[0]
    assert [*prompt, *rejected] == loaded.encode_messages([USER, BAD])[0]
    assert [one.parent for one in source.segments(0)] == [-1, 0, 0]
    assert source.kind == "preferences"
    # All that the model writes counts, the end of its turn included.
    assert source.mask(0).tolist() == [0] * len(prompt) + [1] * (len(chosen) + len(rejected))
    assert source.group(0, "s").probability == 1.0


def test_a_longer_conversation_keeps_its_turns_in_the_prompt(
    tokenizer: Path, loaded: Tokenizer, tmp_path: Path
) -> None:
    records = [{"chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD], "language": "en"}]
    source, (prompt, chosen, _) = read(group_tokens(tmp_path, tokenizer, records))
    assert prompt == loaded.encode_messages(CHAT, generation_prompt=True)[0]
    assert [*prompt, *chosen] == loaded.encode_messages([*CHAT, GOOD])[0]
    # The assistant's earlier turn is part of the prompt, and does not count.
    assert not source.mask(0, 0, len(prompt)).any()


def test_prompt_and_answers_are_those_of_transformers(tokenizer: Path, loaded: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)
    group = encode_group({"prompt": CHAT, "chosen": [GOOD], "rejected": [BAD]}, "preferences", loaded)
    prompt, chosen, rejected = pieces(group.tokens, group.segments)
    options = {"tokenize": True, "return_dict": False}
    assert prompt == theirs.apply_chat_template(CHAT, add_generation_prompt=True, **options)
    for answer, message in ((chosen, GOOD), (rejected, BAD)):
        assert [*prompt, *answer] == theirs.apply_chat_template([*CHAT, message], **options)


def test_labelled_and_scored(tokenizer: Path, loaded: Tokenizer, tmp_path: Path) -> None:
    good, bad = labelled(0), labelled(1)
    source = TokenSource(group_tokens(tmp_path, tokenizer, [good, bad], "labelled"))
    assert [source.group(number, "s").labels for number in (0, 1)] == [(True,), (False,)]
    turns = [
        {"role": "user", "content": bad["prompt"]},
        {"role": "assistant", "content": bad["completion"]},
    ]
    assert source.tokens(1).tolist() == loaded.encode_messages(turns)[0]
    assert [one.completion for one in source.segments(1)] == [False, True]

    record = scored(2)
    folder = group_tokens(tmp_path, tokenizer, [record], "scored")
    source, (prompt, *answers) = read(folder)
    assert source.group(0, "s").scores == (0.0, 0.5, 1.0, 1.5)
    assert len(answers) == 4
    for answer, text in zip(answers, record["completions"], strict=True):
        turns = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": text}]
        assert [*prompt, *answer] == loaded.encode_messages(turns)[0]


def test_a_labelled_chat_is_split_before_its_last_answer() -> None:
    assert split_answer([*CHAT, GOOD]) == (CHAT, [GOOD])
    assert split_answer([GOOD]) == ([], [GOOD])
    assert split_answer(CHAT) == (CHAT, [])


def test_revisions_follow_each_answer(tokenizer: Path, loaded: Tokenizer, tmp_path: Path) -> None:
    """The order of SRPO: y_w, y_l; then after each of them and the user's turn y_w, y_l again."""
    folder = group_tokens(tmp_path, tokenizer, [SHAPES["messages"]], revision=REVISION, language="en")
    source, parts = read(folder)
    tree = source.segments(0)
    assert [one.parent for one in tree] == [-1, 0, 0, 1, 3, 3, 2, 6, 6]
    assert [one.completion for one in tree] == [False, True, True, False, True, True, False, True, True]
    asked = {"role": "user", "content": REVISION}
    for leaf, turns in (
        (4, [USER, GOOD, asked, GOOD]),
        (5, [USER, GOOD, asked, BAD]),
        (7, [USER, BAD, asked, GOOD]),
        (8, [USER, BAD, asked, BAD]),
    ):
        path = [leaf]
        while tree[path[0]].parent >= 0:
            path.insert(0, tree[path[0]].parent)
        ids, mask = loaded.encode_messages(turns)
        assert [token for one in path for token in parts[one]] == ids
        starts = [sum(len(part) for part in parts[:one]) for one in path]
        counted = [source.mask(0, at, at + len(parts[one])) for at, one in zip(starts, path, strict=True)]
        # Only the last answer counts after a revision; the first one counts in its own place.
        assert counted[-1].tolist() == mask[-len(parts[leaf]) :]
        assert not counted[0].any()
        assert not counted[2].any()
    assert source.manifest["revision"] == REVISION
    with pytest.raises(UserError, match="a revision turn is for preferences"):
        group_tokens(tmp_path / "b", tokenizer, [scored(0)], "scored", revision=REVISION)


def test_probability_and_margin(tokenizer: Path, tmp_path: Path) -> None:
    records = [pair(0, probability=0.5), pair(1, margin=1.25), pair(2, probability=None), pair(3)]
    source = TokenSource(group_tokens(tmp_path, tokenizer, records))
    groups = [source.group(number, "s") for number in range(4)]
    assert [(group.probability, group.margin) for group in groups] == [
        (0.5, 0.0), (1.0, 1.25), (1.0, 0.0), (1.0, 0.0)
    ]  # fmt: skip


def test_numbers_of_a_table_of_texts(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(
        "prompt,chosen,rejected,probability,margin\nthe sea,old,again,0.75,\nthe river,over,old,,2\n"
    )
    tokenize(path, tokenizer, out=tmp_path / "out", kind="preferences")
    groups = [TokenSource(tmp_path / "out").group(number, "s") for number in (0, 1)]
    assert [(group.probability, group.margin) for group in groups] == [(0.75, 0.0), (1.0, 2.0)]


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a probability of 1.2": ("preferences", {"probability": 1.2}, "the probability is 1.2, it must be"),
    "a negative probability": ("preferences", {"probability": -0.1}, "the probability is -0.1, it must be"),
    "a probability NaN": ("preferences", {"probability": math.nan}, "the probability is not a finite number"),
    "a probability in words": ("preferences", {"probability": "high"}, "the probability is not a finite"),
    "an infinite margin": ("preferences", {"margin": math.inf}, "the margin is not a finite number"),
    "equal answers": ("preferences", {"chosen": "so", "rejected": "so"}, "the chosen answer equals the rej"),
    "an empty answer": ("preferences", {"rejected": ""}, "rejected: message 2: the text is empty"),
    "no rejected answer": ("preferences", {"rejected": None}, "lacks fields of the format preference"),
    "a score NaN": ("scored", {"scores": [1.0, math.nan]}, "a score is not a finite number"),
    "too few scores": ("scored", {"scores": [1.0]}, "1 scores for 2 completions"),
    "one completion": ("scored", {"completions": ["a"], "scores": [1.0]}, "fewer than two completions"),
    "an empty completion": (
        "scored",
        {"completions": ["a", ""]},
        "completions: message 2: the text is empty",
    ),
    "a label in words": ("labelled", {"label": "fine"}, "lacks fields of the format unpaired-preference"),
    "an empty labelled answer": ("labelled", {"completion": ""}, "message 2: the text is empty"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_records_are_refused_with_their_line(tokenizer: Path, tmp_path: Path, name: str) -> None:
    kind, changes, message = FAULTS[name]
    make: Any = {"preferences": pair, "labelled": labelled, "scored": scored}[kind]
    records = [make(0), {**make(3), **changes}]
    path = write_records(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError) as error:
        tokenize(path, tokenizer, out=tmp_path / "out", kind=kind)  # type: ignore[arg-type]
    assert "1 of 2 records are bad" in str(error.value)
    assert f"a.jsonl, line 2: {message}" in str(error.value)
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]
    # Allowed, it is left out and counted.
    reader = tokenize(path, tokenizer, out=tmp_path / "out", kind=kind, max_bad_share=0.5)  # type: ignore[arg-type]
    assert (reader.bad, len(TokenSource(tmp_path / "out"))) == (1, 1)


@pytest.mark.parametrize("kind", ["preferences", "scored", "labelled"])
def test_plain_chats_are_no_groups(tokenizer: Path, tmp_path: Path, kind: Any) -> None:
    path = write_records(tmp_path / "chats.jsonl", [{"messages": [USER, GOOD], "language": "en"}])
    with pytest.raises(UserError, match="lacks fields of the format"):
        tokenize(path, tokenizer, out=tmp_path / "out", kind=kind)


def with_template(tokenizer: Path, folder: Path, template: str) -> Tokenizer:
    shutil.copytree(tokenizer, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return load_tokenizer(folder)


def test_a_template_without_the_prompt_as_a_prefix_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = with_template(tokenizer, tmp_path / "odd", LAST_TURN_TEMPLATE)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "odd")
    rendered = [
        theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        for turns in (CHAT, [*CHAT, GOOD])
    ]
    assert not rendered[1].startswith(rendered[0])
    with pytest.raises(UserError, match="does not write the prompt as the beginning of the whole"):
        encode_group({"prompt": CHAT, "chosen": [GOOD], "rejected": [BAD]}, "preferences", loaded)
    # Without a system prompt the same template writes a prefix.
    group = encode_group({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "preferences", loaded)
    prompt, chosen, _ = pieces(group.tokens, group.segments)
    assert [*prompt, *chosen] == loaded.encode_messages([USER, GOOD])[0]
    records = [{"language": "en", "prompt": CHAT, "chosen": [GOOD], "rejected": [BAD], "id": "odd"}]
    path = write_records(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError, match=r"^record odd: the chat template does not write the prompt"):
        tokenize(path, tmp_path / "odd", out=tmp_path / "out", kind="preferences")
    assert not (tmp_path / "out").exists()


def digests(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


KILLED = """
import sys, time
from pathlib import Path
import koine.data.tokenization as tokenization

written = tokenization._write_shard
def slowly(*args):
    written(*args)
    print("shard", flush=True)
    time.sleep(600)
tokenization._write_shard = slowly
tokenization.tokenize(
    Path(sys.argv[1]), Path(sys.argv[2]), out=Path(sys.argv[3]), kind="preferences", shard_bytes=2000
)
"""


def test_restarts_and_workers_write_the_same_bytes(tokenizer: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "pairs.jsonl", [pair(number) for number in range(60)])
    whole, parallel, killed = (tmp_path / name for name in ("whole", "parallel", "killed"))
    options: dict[str, Any] = {"kind": "preferences", "shard_bytes": 2000}
    tokenize(path, tokenizer, out=whole, **options)
    assert len(TokenSource(whole).manifest["shards"]) > 3
    tokenize(path, tokenizer, out=parallel, workers=2, **options)
    assert digests(parallel) == digests(whole)

    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), str(tokenizer), str(killed)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "shard\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    [work] = [one for one in tmp_path.iterdir() if "killed" in one.name and one.is_dir()]
    first = work / "shard-00000.tokens"
    before = first.stat().st_mtime_ns
    time.sleep(0.01)
    tokenize(path, tokenizer, out=killed, **options)
    assert digests(killed) == digests(whole)
    # The shard of the killed run was kept.
    assert (killed / first.name).stat().st_mtime_ns == before
    assert json.loads((killed / "manifest.json").read_text())["kind"] == "preferences"
