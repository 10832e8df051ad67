"""RoPE to NoPE: the smallest scale, verdicts on made-up measures, and the committed results."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from experiments.common.hypotheses import verdict_markdown
from experiments.rope_to_nope import judge as judging
from experiments.rope_to_nope import needles, plots, stages
from tests.experiments.test_rope_to_nope_stages import SECOND as ARMS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "rope_to_nope"
PACK = ROOT.parent / "shared" / "data"

SCALES = [path.stem for path in (FOLDER / "results").glob("*.json")]
SENTENCES = [
    f"The {colour} house stood near the {place}." for colour in ("red", "old") for place in ("sea", "mill")
]


def test_the_arms_are_those_of_the_plan() -> None:
    text = (FOLDER / "plan.py").read_text(encoding="utf-8")
    assert all(f'"{arm}": (' in text for arm in ARMS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from koine.tokenizer import train_tokenizer

    words = [f"{one} {two}" for one in ("sea", "mill", "house") for two in ("red", "old", "near")]
    return train_tokenizer(
        {"en": lambda: SENTENCES * 20 + words * 20},
        vocab_size=320,
        scheme="natural",
        english_share=None,
        min_frequency=2,
    )


@pytest.mark.parametrize("length", [90, 200])
@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_a_prompt_is_as_long_as_asked_and_knows_its_facts(
    tokenizer: Any, length: int, depth: float | None
) -> None:
    words = (["sea", "mill", "house"], ["red", "old", "near"])
    prompt = needles.build(
        random.Random(3), tokenizer, SENTENCES, words, length=length, facts=3, questions=2, depth=depth
    )
    longest = max(len(tokenizer.encode(" " + sentence)) for sentence in SENTENCES)
    assert length - longest <= len(prompt.tokens) <= length
    # The text is one that the tokenizer would cut in the same way, as training will.
    assert tokenizer.encode(tokenizer.decode(prompt.tokens[1:])) == prompt.tokens[1:]
    for question, completion, fact in prompt.questions:
        spans = [[prompt.tokens[place] for place in span] for span in (question, completion, fact)]
        assert spans[0] == spans[2]
        assert tokenizer.decode(spans[1]).strip() in words[1]
        assert fact.stop <= question.start
    if depth is not None:
        place = prompt.questions[0][2].start / prompt.questions[-1][0].start
        assert abs(place - depth) < 0.5


def measures(scores: dict[str, float], bits: dict[str, float], masses: dict[str, float]) -> dict[str, Any]:
    """Three seeds, a little apart, of every arm."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        for seed in range(3):
            score, noise = scores.get(arm, -3.0), 0.001 * seed
            layers = [
                {
                    "layer": index,
                    "kind": kind,
                    "mass": {
                        "needle": masses.get(arm, 0.02) * (8 if kind == "full NoPE" else 1),
                        "question": 0.03 if kind == "full NoPE" else 0.3,
                    },
                    "entropy_of_rows": 12.0 + noise if arm == "qk-norm" else 7.0,
                }
                for index, kind in enumerate(("full RoPE", "full NoPE"))
            ]
            found[f"{arm}/{seed}"] = {
                "bits_per_byte": bits.get(arm, 2.0) + noise / 2,
                "answers": {
                    str(length): {"log_probability": score + noise} for length in (128, 1024, 2048, 4096)
                },
                "attention": layers,
            }
    return found


SPEED = {"ratios": [1.5, 1.6, 1.55], "held_bytes": 7, "formula_bytes": 7, "command_a_share_128k": 0.2734}
AS_THE_PAPER = {
    "rope": -3.0,
    "rnope-10k": -2.0,
    "rnope-100k": -2.2,
    "rnope-2m": -2.6,
    "rnope-4m": -2.8,
    "swa-1": -1.0,
    "swa-3": -1.1,
    "swa-7": -1.9,
}
MASSES = {"nope": 0.033, "rope": 0.02, "qk-norm": 0.006}


def verdicts(
    tmp_path: Path, found: dict[str, Any], speed: dict[str, Any], arms: tuple[str, ...] = tuple(ARMS)
) -> dict[str, str]:
    folders = {}
    for name, value in found.items():
        folders[name] = tmp_path / name
        folders[name].mkdir(parents=True)
        (folders[name] / "measures.json").write_text(json.dumps(value), encoding="utf-8")
    return {
        name: one["verdict"]
        for name, one in judging.verdicts(judging.Runs(folders, 3), 1024, speed, arms).items()
    }


def test_what_the_paper_found_is_reproduced(tmp_path: Path) -> None:
    found = measures(AS_THE_PAPER, {"nope": 2.2, "qk-norm": 2.01}, MASSES)
    assert set(verdicts(tmp_path, found, SPEED).values()) == {"reproduced"}


def test_the_opposite_is_not(tmp_path: Path) -> None:
    opposite = {arm: -4.0 - score for arm, score in AS_THE_PAPER.items()}
    found = measures(
        opposite, {"nope": 1.8, "qk-norm": 1.9, "swa-3": 2.3}, {"nope": 0.006, "rope": 0.02, "qk-norm": 0.033}
    )
    got = verdicts(tmp_path, found, SPEED | {"ratios": [0.8, 0.81, 0.79], "held_bytes": 8})
    assert {name for name, verdict in got.items() if verdict == "not reproduced"} == {
        "RN1",
        "RN2",
        "RN5",
        "RN6",
        "RN7",
        "RN8",
        "RN9",
        "CA1",
    }


def test_a_scale_with_fewer_arms_judges_what_it_can(tmp_path: Path) -> None:
    arms = ("rope", "swa-3")
    found = {name: one for name, one in measures(AS_THE_PAPER, {}, MASSES).items() if name[:-2] in arms}
    got = verdicts(tmp_path, found, SPEED, arms)
    assert got == dict.fromkeys(("RN7", "RN8", "CA1"), "reproduced")


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not PACK.exists(), reason="the development data pack is not beside the checkout")
def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every arm through both stages and the judge in this process, with a few steps."""
    monkeypatch.setattr(judging, "STEP_TOKENS", 256)
    texts = PACK / "text" / "en_books.jsonl.xz"
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    needles.needle_corpus(
        texts, vocabulary=700, short=128, long=256, documents=30, long_documents=12, seed=0, out=corpus
    )
    sizes = {
        "num_layers": 8,
        "hidden": 32,
        "intermediate": 32,
        "heads": 1,
        "kv_heads": 1,
        "window": 64,
        "tokens_per_step": 256,
        "threads": 1,
        "dtype": "bfloat16",
        "prompts": 1,
        "seed": 0,
        "steps": 2,
        "learning_rate": 1e-3,
    }
    short: dict[str, Path] = {}
    runs: dict[str, Path] = {}
    for arm, theta in ARMS.items():
        variant = "rnope" if arm.startswith("rnope") else arm
        if variant not in short:
            short[variant] = tmp_path / "short" / variant
            short[variant].mkdir(parents=True)
            stages.pretrain_short(
                corpus,
                texts,
                variant=variant,
                theta=1e4,
                length=128,
                longest=1024,
                out=short[variant],
                **sizes,
            )
        runs[f"{arm}/0"] = tmp_path / "long" / arm
        runs[f"{arm}/0"].mkdir(parents=True)
        stages.extend(
            corpus,
            texts,
            short[variant],
            theta=theta,
            short=128,
            long=256,
            attention_prompts=1,
            out=runs[f"{arm}/0"],
            **sizes,
        )
    out = tmp_path / "verdicts"
    out.mkdir()
    judging.judge(
        runs,
        scale="smoke",
        arms=tuple(ARMS),
        seeds=1,
        short=128,
        long=256,
        layers=8,
        hidden=32,
        heads=1,
        kv_heads=1,
        threads=1,
        out=out,
    )
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert set(results["hypotheses"]) == {*(f"RN{number}" for number in range(1, 10)), "CA1"}
    for layer in results["runs"]["swa-3/0"]["attention"]:
        assert sum(layer["mass"].values()) == pytest.approx(1.0, abs=1e-4)
    assert [layer["kind"] for layer in results["runs"]["swa-3/0"]["attention"]][:4] == [
        "sliding RoPE"
    ] * 3 + ["full NoPE"]


@pytest.mark.parametrize("scale", SCALES)
def test_the_manual_has_the_tables_of_the_committed_results(scale: str) -> None:
    results = json.loads((FOLDER / "results" / f"{scale}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "explanation" / "rope-to-nope.md").read_text(encoding="utf-8")
    assert verdict_markdown(results["hypotheses"]) in page
    assert plots.arm_table(results) in page


@pytest.mark.parametrize("scale", SCALES)
def test_the_committed_verdicts_follow_from_the_committed_runs(scale: str) -> None:
    """Every verdict is worked out again from the seeds beside it."""
    results = json.loads((FOLDER / "results" / f"{scale}.json").read_text(encoding="utf-8"))
    assert len(results["seeds"]) >= 3
    found = object.__new__(judging.Runs)
    found.measures, found.seeds = results["runs"], range(len(results["seeds"]))
    again = judging.verdicts(found, results["lengths"]["long"], results["speed"], results["arms"])
    for name, one in results["hypotheses"].items():
        assert one["verdict"] == again[name]["verdict"], name
        assert one["series"].keys() == again[name]["series"].keys()
        for label, series in one["series"].items():
            assert series["by_seed"] == pytest.approx(again[name]["series"][label]["by_seed"])
