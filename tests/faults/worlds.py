"""Inputs of the stages: small models, tokens and texts, written once."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tests.bad_inputs import worlds as sound

PLAN = '''
"""Three steps that need no torch: one writes, one reads it and resumes, one reads both."""

import json
from pathlib import Path

from koine.plan import Plan, step


@step(version="1")
def first(data: Path, *, times: int, out: Path) -> None:
    text = data.read_text(encoding="utf-8")
    (out / "text.txt").write_text(text * times, encoding="utf-8")
    (out / "metrics.json").write_text(json.dumps({"characters": len(text) * times}), encoding="utf-8")


@step(version="1")
def second(text: Path, *, out: Path) -> None:
    (out / "inside").mkdir(exist_ok=True)
    for number in range(3):
        part = out / "inside" / f"{number}.txt"
        if not part.exists():
            unfinished = part.with_suffix(".unfinished")
            unfinished.write_text((text / "text.txt").read_text(encoding="utf-8")[number::3], encoding="utf-8")
            unfinished.replace(part)


@step(version="1")
def third(text: Path, parts: Path, *, out: Path) -> None:
    length = sum(len(part.read_text(encoding="utf-8")) for part in sorted((parts / "inside").iterdir()))
    assert length == len((text / "text.txt").read_text(encoding="utf-8"))
    (out / "results.json").write_text(json.dumps({"length": length}), encoding="utf-8")


@step(version="1")
def count(data: Path, *, out: Path) -> None:
    from koine.data import read_records

    texts = [record["text"] for record in read_records(data)]
    (out / "length.json").write_text(json.dumps([len(texts), sum(map(len, texts))]), encoding="utf-8")


def reads(plan: Plan, *, data: Path) -> None:
    plan.step(count, name="read", data=plan.input(data, name="data"))


def three(plan: Plan, *, data: Path, times: int = 3) -> None:
    text = plan.step(first, name="text", data=plan.input(data, name="data"), times=times)
    parts = plan.step(second, name="parts", text=text)
    last = plan.step(third, name="last", text=text, parts=parts)
    plan.export(last / "results.json", "results.json")
'''


def inside_another(world: Path) -> None:
    """Build `multimodal`: the model as the language model of a multimodal checkpoint."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(world / "model", world / "multimodal")
    weights = world / "multimodal" / "model.safetensors"
    save_file({f"language_model.{name}": tensor for name, tensor in load_file(weights).items()}, weights)


def build(world: Path) -> None:
    """Write everything that `stages.py` names below `world`."""
    world.mkdir(parents=True)
    for name in (
        "tokenizer",
        "tokens",
        "model",
        "exportable",
        "gguf",
        "pickled",
        "branch",
        "mixture",
        "unrelated",
    ):
        shutil.copytree(sound.built(name), world / name)
    sound.good_text(world)
    for code, words in sound.TEXTS.items():
        sound.write_lines(
            world / f"{code}.jsonl",
            [
                {"text": f"{words}{number}", "language": code, "domain": "tale", "id": f"{code}{number}"}
                for number in range(8)
            ],
        )
    sound.write_lines(
        world / "questions.jsonl",
        [
            {"question": f"{number}?", "answer": str(number), "language": "en", "kind": "recall"}
            for number in range(2)
        ],
    )
    sound.write_lines(
        world / "chats.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": words},
                    {"role": "assistant", "content": words[:20]},
                ],
                "language": code,
                "id": f"{code}{number}",
            }
            for number in range(8)
            for code, words in sound.TEXTS.items()
        ],
    )
    (world / "longer.txt").write_text(
        "Der Fluss fließt durch das Tal, und die Brücke führt hinüber.\n\n" * 30, encoding="utf-8"
    )
    sound.write_lines(
        world / "longer.jsonl",
        [
            {
                "text": f"Der Fluss fließt durch das Tal, und die Brücke führt hinüber {number}.",
                "language": "de",
            }
            for number in range(60)
        ],
    )
    sound.run_koine(
        "data", "tokenize", str(world / "chats.jsonl"), "--tokenizer", str(world / "tokenizer"), "--out", str(world / "chat-tokens")
    )  # fmt: skip
    sound.build_tokenizer(world / "larger-tokenizer", merges=24)
    sound.run_koine(
        "upcycle", "nexus", "--seed-model", str(world / "model"), "--experts", f"code={world / 'branch'}", "--out",
        str(world / "nexus"), "--domain-text", f"code={world / 'de.jsonl'}", "--domain-size", "8",
    )  # fmt: skip
    inside_another(world)
    (world / "three.py").write_text(PLAN.lstrip(), encoding="utf-8")
    (world / "notes.json").write_text(json.dumps({"note": "a file to be adopted"}), encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
