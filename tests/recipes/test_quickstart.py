"""The recipe at a tiny size: complete, killed and continued, repeated, and on the user's own text."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from koine.cli.main import cli
from koine.files import sha256_file
from tests.plan.inline import run_steps_inline

TINY = {
    "languages": "en,de,zh,hi",
    "preset": "koine-0.5m",
    "vocabulary_size": "700",
    "pretrain_steps": "6",
    "adapt_steps": "6",
    "chat_steps": "4",
    "sequence_length": "64",
    "batch_size": "4",
    "micro_batch_size": "2",
    "documents_per_language": "40",
    "questions_per_language": "12",
    "evaluation_documents": "2",
    "evaluation_questions": "6",
}


def command(runs: Path, **settings: str) -> list[str]:
    chosen = {**TINY, **settings}
    arguments = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "koine", "run", "quickstart", "--runs", str(runs), *arguments]


def run(runs: Path, **settings: str) -> str:
    done = subprocess.run(command(runs, **settings), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    runs = tmp_path_factory.mktemp("whole")
    return runs / "quickstart", run(runs)


def test_it_leaves_an_answer_a_report_and_a_model(whole: tuple[Path, str]) -> None:
    folder, message = whole
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["languages"]["primary"] == ["en", "de"]
    assert results["languages"]["expanded"] == ["zh", "hi"]
    for stage in ("pretrained", "adapted", "chat"):
        for arm in ("universal", "cluster"):
            assert results["bits_per_byte"][stage][arm]["expanded"] > 0.0
    bits = results["bits_per_byte"]
    for arm in ("universal", "cluster"):
        curve = results["curves"][arm]["bits_per_byte"]
        assert [curve[0], curve[-1]] == [bits[stage][arm]["expanded"] for stage in ("pretrained", "adapted")]
        assert {"interval", "majority_baseline"} <= results["questions"][arm]["recall"].keys()
    page = (folder / "report.html").read_text(encoding="utf-8")
    for words in ("Cost of the universal tokenizer", "Forgetting by the chat stage", "majority baseline"):
        assert words in page
    assert "did the universal tokenizer adapt faster" in page
    answer = json.loads((folder / "comparison" / "report.json").read_text(encoding="utf-8"))["blocks"][0]
    lines = message.splitlines()
    assert f"The question: {answer['title']}" in lines
    shown = " ".join(" ".join(lines[lines.index(f"The question: {answer['title']}") + 1 :]).split())
    assert shown.startswith(" ".join(answer["text"].split()))
    assert "questions of its evaluation right" in shown
    assert "total time: " in message
    assert any(line.split()[:2] == ["adapted", "×2"] for line in lines)
    assert lines[-1].endswith(f"koine chat {folder / 'model'}") or "--once" in lines[-1]
    steps = len(json.loads((folder / "plan.json").read_text(encoding="utf-8"))["nodes"])
    assert [line.split(":")[0] for line in lines if line.startswith("step ")] == [
        f"step {number} of {steps}" for number in range(1, steps + 1)
    ]


def test_answers_and_examples_are_left_beside_the_evaluation_and_the_model(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    evaluation = folder / "evaluation" / "universal" / "chat"
    answers = [json.loads(line) for line in (evaluation / "answers.jsonl").read_text("utf-8").splitlines()]
    questions = json.loads((evaluation / "evaluation.json").read_text("utf-8"))["questions"]["overall"]
    examples = json.loads((folder / "model" / "example_questions.json").read_text("utf-8"))
    assert len(answers) == sum(kind["questions"] for kind in questions.values()) == examples["asked"]
    right = [one for one in answers if one["is_right"]]
    assert len(right) == sum(kind["correct"] for kind in questions.values()) == examples["right"]
    asked = {one["messages"][0]["content"] for one in right}
    assert {one["question"] for one in examples["examples"]} <= asked
    # The model is the one that was evaluated, without the files of its training.
    ours, theirs = (path / "model.safetensors" for path in (folder / "model", folder / "chat" / "universal"))
    assert sha256_file(ours) == sha256_file(theirs)
    assert (folder / "model" / "training.json").exists()
    assert not (folder / "model" / "metrics.jsonl").exists()


def test_the_model_answers_in_koine_chat(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    arguments = [
        sys.executable,
        "-m",
        "koine",
        "chat",
        str(folder / "model"),
        "--once",
        "Hello",
        "--max-new-tokens",
        "5",
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_third_run_does_nothing(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/artifact.json")}
    run(folder.parent)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/artifact.json")} == before


def test_killed_and_run_again_it_ends_in_the_same_model(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Killed while it pretrains, and once more a little later; the model's bytes are those of the uninterrupted run."""
    folder, _ = whole
    for steps_seen in (1, 3):
        process = subprocess.Popen(
            command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            # A folder that gets its name while it is looked through is not there for a moment.
            with contextlib.suppress(FileNotFoundError):
                found = tmp_path.glob("quickstart/.work/**/metrics.jsonl")
                if max((path.read_bytes().count(b"\n") for path in found), default=0) >= steps_seen:
                    break
            time.sleep(0.02)
        assert process.poll() is None, "the run ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(tmp_path)
    for name in ("model", "chat/cluster", "pretrained/cluster"):
        ours, theirs = (root / name / "model.safetensors" for root in (tmp_path / "quickstart", folder))
        assert sha256_file(ours) == sha256_file(theirs), name


def test_on_the_users_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for code, sentence in (
        ("eng_Latn", "The river runs down to the sea"),
        ("deu_Latn", "Der Fluss fließt zum Meer"),
        ("hin_Deva", "नदी समुद्र तक बहती है"),
    ):
        lines += [
            json.dumps(
                {"content": f"{sentence} {number}. " * 6, "lang": code, "id": f"{code}-{number}"},
                ensure_ascii=False,
            )
            for number in range(120)
        ]
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run_steps_inline(monkeypatch)
    words = command(
        tmp_path,
        data=str(data),
        fields="text=content,language=lang",
        languages="",
        min_bytes_per_language="1000",
        vocabulary_size="320",
        # Nearly one token a byte: an answer must still fit behind its question.
        sequence_length="256",
    )
    done = CliRunner().invoke(cli, words[words.index("run") :], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "quickstart" / "results.json").read_text(encoding="utf-8"))
    assert results["languages"]["primary"] == ["de", "en"]
    assert results["languages"]["expanded"] == ["hi"]
