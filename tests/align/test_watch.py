"""Watching model folders that a training left: order, figures, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from koine.align.behaviour_report import behaviour_blocks
from koine.align.behaviour_table import SAMPLES, TABLE, read_table
from koine.align.held_out import encode_pairs, encode_prompts, read_pairs, read_prompts
from koine.align.monitor import Monitor
from koine.align.overoptimisation import verdict
from koine.align.watch import steps_of, watch_models
from koine.cli.main import cli
from koine.data import tokenize
from koine.data.packing import DocumentSlice
from koine.data.preference_order import build_groups
from koine.data.shards import TokenSource
from koine.errors import KoineWarning, UserError
from koine.generate.sampling import Sampling
from koine.plan.report.blocks import check_block
from tests.data.conftest import document

from . import policies
from .test_overoptimisation import TURN, course

SAMPLING = Sampling(temperature=0.5, seed=0, max_new_tokens=8)


def records(count: int = 9) -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{number}",
            "language": ("de", "hi", "en")[number % 3],
            "prompt": document(number, 5),
            "chosen": document(1000 + number, 4 + number),
            "rejected": document(2000 + number, 8),
        }
        for number in range(count)
    ]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two checkpoints, a reference and pairs."""
    tokenizer = policies.save_tokenizer(tmp_path / "tokenizer")
    for name, seed in (("base", 0), ("checkpoint-100", 1), ("checkpoint-20", 2)):
        policies.policy(seed).save(tmp_path / name, tokenizer=tokenizer)
    write(tmp_path / "pairs.jsonl", records())
    return tmp_path


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("checkpoint-100", "checkpoint-20"), [(20, "checkpoint-20"), (100, "checkpoint-100")]),
        (("run-7b/step-000010", "run-7b/step-000005"), [(5, "step-000005"), (10, "step-000010")]),
        (("base", "checkpoint-20"), [(1, "base"), (2, "checkpoint-20")]),
        (("b/step-5", "a/step-5"), [(1, "step-5"), (2, "step-5")]),
    ],
)
def test_the_order_is_that_of_the_steps_in_the_names(
    names: tuple[str, ...], wanted: list[tuple[int, str]]
) -> None:
    assert [(step, path.name) for step, path in steps_of([Path(name) for name in names])] == wanted


def test_the_figures_are_those_of_the_monitor(place: Path) -> None:
    held_out = read_pairs(place / "pairs.jsonl")
    out = place / "out"
    out.mkdir()
    found = watch_models(
        [place / "checkpoint-100", place / "checkpoint-20"],
        pairs=held_out, prompts=held_out, reference=place / "base", sampling=SAMPLING, out=out,
    )  # fmt: skip
    tokenizer = policies.tokenizer()
    monitor = Monitor(
        tokenizer, pairs=encode_pairs(held_out, tokenizer), prompts=encode_prompts(held_out, tokenizer),
        sampling=SAMPLING, reference=policies.policy(), quiet=True,
    )  # fmt: skip
    wanted = [{"step": step, **monitor(policies.policy(seed), step)} for step, seed in ((20, 2), (100, 1))]
    assert list(found.evaluations) == wanted
    assert found.verdict == verdict(wanted)
    assert [row["step"] for row in read_table(out / TABLE)] == [20, 100]


def test_a_folder_of_another_trainer_is_watched(place: Path) -> None:
    """Saved by `transformers`, under the name that its trainers give."""
    folder = place / "checkpoint-7"
    model = policies.llama()
    model.inner.save_pretrained(folder)
    policies.tokenizer().save(folder)
    (place / "out").mkdir()
    prompts = read_prompts(place / "pairs.jsonl", limit=1)
    found = watch_models([folder], prompts=prompts, sampling=SAMPLING, out=place / "out")
    tokenizer = policies.tokenizer()
    monitor = Monitor(tokenizer, prompts=encode_prompts(prompts, tokenizer), sampling=SAMPLING, quiet=True)
    wanted = monitor(model, 7)
    assert found.evaluations[0]["entropy"] == pytest.approx(wanted["entropy"], abs=1e-4)
    assert found.evaluations[0]["ead"] == pytest.approx(wanted["ead"])


def test_models_of_other_tokenizers_are_refused(place: Path) -> None:
    from koine.tokenizer import train_tokenizer

    texts = [document(number, 30) for number in range(200)]
    other = train_tokenizer({"en": lambda: texts}, vocab_size=349, english_share=None, min_frequency=2)
    other.save(place / "base")
    with pytest.raises(UserError, match="has another tokenizer than"):
        watch_models(
            [place / "checkpoint-20"],
            reference=place / "base",
            prompts=records(1),
            sampling=SAMPLING,
            out=place,
        )


def test_pairs_have_the_tokens_of_preference_training(place: Path) -> None:
    """What is scored is what `koine data tokenize --kind preferences` writes."""
    tokenize(place / "pairs.jsonl", place / "tokenizer", out=place / "tokens", kind="preferences")
    source = TokenSource(place / "tokens")
    rows = [[(source, "s", DocumentSlice(n, 0, int(source.lengths[n])))] for n in range(len(source))]
    batch = build_groups(rows, 128, list).separate()
    wanted = set()
    for index in range(batch.completions):
        counts = batch.completion_of == index
        row = int(batch.predicted_at[counts][0]) // batch.tokens.shape[1]
        length = int((batch.document_ids[row] >= 0).sum())
        wanted.add((tuple(batch.tokens[row, :length].tolist()), int(counts.sum())))
    pairs = encode_pairs(read_pairs(place / "pairs.jsonl"), policies.tokenizer())
    found = {
        ((*prompt, *completion), len(completion))
        for pair in pairs
        for prompt, completion in pair.continuations
    }
    assert found == wanted


def test_long_pairs_are_cut_and_long_prompts_left_out() -> None:
    tokenizer = policies.tokenizer()
    lines = read_like(records(3))
    whole = encode_pairs(lines, tokenizer)
    context = len(whole[0].prompt) + 3
    with pytest.warns(KoineWarning, match="held-out pairs fill the model's context"):
        cut = encode_pairs(
            [lines[0], {**lines[1], "prompt": user(document(5, 60))}], tokenizer, context=context
        )
    assert [(len(one.chosen), len(one.rejected)) for one in cut] == [(3, 3)]
    assert cut[0].chosen == whole[0].chosen[:3]
    with pytest.raises(UserError, match="no held-out pair"):
        encode_pairs([], tokenizer)
    with pytest.raises(UserError, match="no prompt to answer"):
        encode_prompts([], tokenizer)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def read_like(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records as `read_pairs` returns them."""
    answer = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    return [
        {
            **one,
            "prompt": user(one["prompt"]),
            "chosen": answer(one["chosen"]),
            "rejected": answer(one["rejected"]),
        }
        for one in lines
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"text": "Hallo"},
        {"prompt": "Hallo", "completion": "Ja"},
        {"prompt": "Hallo", "chosen": "Ja", "rejected": "Nein"},
        {"messages": [*user("Hallo"), {"role": "assistant", "content": "Ja"}]},
    ],
)
def test_prompts_of_every_kind_of_record(tmp_path: Path, record: dict[str, Any]) -> None:
    path = write(tmp_path / "prompts.jsonl", [{**record, "language": "de"}])
    [prompt] = encode_prompts(read_prompts(path), policies.tokenizer())
    assert list(prompt.messages) == user("Hallo")
    assert prompt.language == "de"


def test_the_limit_is_one_of_each_language(place: Path) -> None:
    assert [one["language"] for one in read_pairs(place / "pairs.jsonl", limit=2)] == ["de", "hi", "en"] * 2


def test_the_report_has_the_verdict_first_and_marks_the_stop() -> None:
    evaluations = course(TURN)
    names = ("entropy", "mass", "ead")
    table = [
        {
            "step": int(one["step"]),
            "overall": {name: one[name] for name in names},
            "languages": {code: {name: one[name] for name in names} for code in ("de", "hi")},
            "worst": {"mass": "hi"},
            "verdict": None,
        }
        for one in evaluations
    ]
    judged = verdict(evaluations)
    line = {"id": "p", "language": "de", "messages": user("Hallo"), "completion": "Ja"}
    samples = [{**line, "step": row["step"]} for row in table]
    blocks = behaviour_blocks(table, judged, samples)
    for number, block in enumerate(blocks):
        check_block(block, f"block {number}")
    assert blocks[0]["kind"] == "verdict"
    assert blocks[0]["text"].startswith("Entropy has turned down since step 150")
    lines = {block["title"]: block for block in blocks if block["kind"] == "lines"}
    assert list(lines) == [
        "Entropy of the top 10 next tokens", "Probability mass of the top 10 next tokens",
        "Cross-input diversity (EAD)",
    ]  # fmt: skip
    entropy, stop = lines["Entropy of the top 10 next tokens"]["series"]
    assert entropy["y"] == TURN
    assert (stop["name"], stop["x"]) == ("stop", [judged.step] * 2)
    assert [block["rows"] for block in blocks if block["kind"] == "heatmap"] == [["German", "Hindi"]] * 2
    [table_block] = [block for block in blocks if block["kind"] == "table"]
    assert ["mass", 0.95, "Hindi", 0.95, 0.95] in table_block["rows"]
    shown = [sample["title"] for sample in blocks[-1]["samples"]]
    assert shown == ["step 50", "step 150, the best", "step 300"]


def test_the_command_writes_figures_a_report_and_its_lineage(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    command = "align watch checkpoint-100 checkpoint-20 --data pairs.jsonl --reference base --limit 1 --max-new-tokens 4 --out w --json"
    done = CliRunner().invoke(cli, command.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["verdict"]["state"] == "none"
    assert answer["figures"]["kl"] > 0
    assert {"report.html", "artifact.json", TABLE, SAMPLES} <= {path.name for path in (place / "w").iterdir()}
    page = (place / "w" / "report.html").read_text()
    assert "No sign of over-optimisation" in page
    assert "Entropy of the top 10 next tokens" in page
    parents = json.loads((place / "w" / "artifact.json").read_text())["parents"]
    assert len(json.dumps(parents).split("checkpoint-")) > 2
