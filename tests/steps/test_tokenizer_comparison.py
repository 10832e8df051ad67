"""Adaptation speed, computed by hand; the comparison's curves, tables and words on a small world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from koine.evaluate import wilson_interval
from koine.files import read_json
from koine.plan.report.blocks import read_step_report
from koine.steps.evaluation import evaluate_model
from koine.steps.text_mixture import adaptation_sources
from koine.steps.tokenizer_comparison import ARMS, STAGES, adaptation_speed, compare_arms, curve, first_reach
from koine.steps.tokenizer_comparison_report import answers_cell, speed_in_words
from koine.steps.training import HeldOutProbe, doubling_steps, train_model
from tests.steps.worlds import CONFIG, mixture, settings, write_world


def test_first_reach_interpolates() -> None:
    # From 3.0 at step 10 to 2.0 at step 20: 2.5 is half-way.
    assert first_reach([10, 20], [3.0, 2.0], 2.5) == 15.0
    assert first_reach([10, 20], [3.0, 2.0], 1.9) is None
    assert first_reach([10, 20], [3.0, 2.0], 3.5) == 10.0


def test_speed_per_step_and_per_byte() -> None:
    curves = {
        "universal": ([0, 10, 20, 30], [9.0, 3.0, 2.0, 1.0]),
        "cluster": ([0, 10, 20, 30], [9.0, 4.0, 3.0, 2.5]),
    }
    # The cluster arm ends at 2.5 after 30 steps; the universal one is there at 15: twice as fast. It reads
    # 3 bytes a token in place of 2, so by bytes it is only 2 * 2 / 3 as fast.
    speed = adaptation_speed(curves, {"universal": 3.0, "cluster": 2.0})
    assert speed["per_step"] == pytest.approx(2.0)
    assert speed["per_byte"] == pytest.approx(4.0 / 3.0)
    assert (speed["reached"], speed["at_least"]) == (15.0, False)


def test_a_level_reached_before_the_first_evaluation_in_training_gives_a_lower_bound() -> None:
    curves = {"universal": ([0, 10, 20], [4.0, 1.0, 0.5]), "cluster": ([0, 10, 20], [9.0, 4.0, 3.0])}
    speed = adaptation_speed(curves, {"universal": 1.0, "cluster": 1.0})
    # A line from step 0 would put it at step 3.3; what was measured is that it was there at step 10.
    assert (speed["per_step"], speed["reached"], speed["at_least"]) == (2.0, 10.0, True)
    assert "at least 2.0 times" in speed_in_words(speed, primary=1, expanded=2)


def test_a_level_reached_before_adaptation_has_no_ratio() -> None:
    curves = {"universal": ([0, 10], [2.0, 1.0]), "cluster": ([0, 10], [9.0, 3.0])}
    speed = adaptation_speed(curves, {"universal": 1.0, "cluster": 1.0})
    assert (speed["per_step"], speed["reached"]) == (None, 0.0)
    words = speed_in_words(speed, primary=1, expanded=2)
    assert words.startswith("Yes: ")
    assert words.endswith("before adaptation began.")


def test_an_arm_that_never_reaches_the_level_has_no_speed() -> None:
    curves = {"universal": ([0, 10, 20], [9.0, 4.0, 3.0]), "cluster": ([0, 10, 20], [9.0, 3.0, 2.0])}
    speed = adaptation_speed(curves, {"universal": 1.0, "cluster": 1.0})
    assert (speed["per_step"], speed["reached"]) == (None, None)
    words = speed_in_words(speed, primary=1, expanded=2)
    assert words.startswith("No: the universal arm ends 1.000 bits per byte above")


def test_an_interval_is_shown_in_per_cent() -> None:
    entry = {"value": 0.0, "interval": list(wilson_interval(0.0, 11))}
    assert answers_cell(entry) == "0\u00a0% (0–26)"
    assert answers_cell(None) is None


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model adapted for a few steps and evaluated, compared with itself in the other arm."""
    root = write_world(tmp_path_factory.mktemp("compared"))
    sources = adaptation_sources((), 0.2)
    for name in ("adapted", "before", "after", "final", "comparison"):
        (root / name).mkdir()
    train_model(
        root / "model",
        {source.name: root / "documents" for source in sources},
        root / "cluster",
        root / "corpus",
        mixture=mixture(sources, 4),
        settings=settings(4, evaluate_every=1, schedule="constant"),
        config=CONFIG,
        probe=HeldOutProbe(
            groups={"primary": ("primary",), "expanded": ("expanded",)},
            documents=3,
            max_bytes=200,
            track_languages=True,
            at=(1, 4),
        ),
        out=root / "adapted",
    )
    models = {"before": "model", "after": "adapted", "final": "adapted"}
    for name, model in models.items():
        evaluate_model(
            root / "corpus",
            root / model,
            documents_per_language=3,
            questions_per_language=10 if name == "final" else 0,
            max_document_bytes=200,
            seed=0,
            out=root / name,
        )
    stages = dict(zip(STAGES, models, strict=True))
    compare_arms(
        root / "corpus",
        {arm: root / arm for arm in ARMS},
        dict.fromkeys(ARMS, root / "documents"),
        {stage: dict.fromkeys(ARMS, root / models[name]) for stage, name in stages.items()},
        {stage: dict.fromkeys(ARMS, root / name) for stage, name in stages.items()},
        primary_share=0.2,
        seed=0,
        out=root / "comparison",
    )
    return root


@pytest.fixture(scope="module")
def results(compared: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(compared / "comparison" / "results.json")
    return found


def test_the_ends_of_the_curve_are_the_figures_of_the_tables(compared: Path, results: dict[str, Any]) -> None:
    steps, values = curve(compared / "adapted", ("hi", "tr"))
    assert steps == [0, 1, 4]
    for value, stage in ((values[0], "pretrained"), (values[-1], "adapted")):
        languages = results["evaluations"][stage]["universal"]["languages"]
        by_hand = (languages["hi"]["bits_per_byte"] + languages["tr"]["bits_per_byte"]) / 2
        assert value == pytest.approx(by_hand, rel=1e-5)  # float32 sums in another order
        assert results["bits_per_byte"][stage]["universal"]["expanded"] == pytest.approx(by_hand)
    shown = results["curves"]["universal"]["bits_per_byte"]
    assert shown == pytest.approx(values, rel=1e-5)
    bits = results["bits_per_byte"]
    ends = [bits[stage]["universal"]["expanded"] for stage in ("pretrained", "adapted")]
    assert [shown[0], shown[-1]] == ends
    # The training's own metric is the same mean over languages, and was measured at the chosen steps only.
    lines = [json.loads(line) for line in (compared / "adapted" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "evaluation/bits_per_byte_expanded" in line]
    assert [line["step"] + 1 for line in measured] == [1, 4]
    assert [line["evaluation/bits_per_byte_expanded"] for line in measured] == pytest.approx(values[1:])
    assert all(len(line) > 1 for line in lines)


def test_cost_and_forgetting_are_differences_of_the_groups(results: dict[str, Any]) -> None:
    assert results["cost_on_primary"] == dict.fromkeys(STAGES, 0.0)  # both arms are the same model
    bits = results["bits_per_byte"]
    for name, entry in results["forgetting_by_chat"]["cluster"].items():
        assert entry["before"] == bits["adapted"]["cluster"][name]
        assert entry["change"] == pytest.approx(entry["after"] - entry["before"])


def test_model_sizes_and_tokens_are_those_of_the_training(results: dict[str, Any], compared: Path) -> None:
    facts = results["models"]["universal"]
    from safetensors import safe_open

    with safe_open(compared / "adapted" / "model.safetensors", "pt") as tensors:
        parameters = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert facts["parameters"] == parameters
    adapted = facts["training"]["adapted"]
    assert (adapted["steps"], adapted["tokens"]) == (4, 4 * 2 * 96)
    assert adapted["sources"] == pytest.approx({"adapted": 0.8, "primary": 0.2})
    assert facts["text"]["documents"] == 3 * 60


def test_the_baseline_of_the_report_is_a_count_over_the_corpus(
    compared: Path, results: dict[str, Any]
) -> None:
    right = asked = 0
    for code in ("de", "hi", "tr"):
        training, test = (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for path in (
                compared / "corpus" / "questions" / part / f"{code}.jsonl" for part in ("train", "test")
            )
        )
        for record in test[:10]:
            if record["split"] == "recall":
                answers = [one["answer"] for one in training if one["kind"] == record["kind"]]
                asked += 1
                if answers:
                    right += (
                        sorted(answers, key=lambda one: (-answers.count(one), one))[0] == record["answer"]
                    )
    entry = results["questions"]["universal"]["recall"]
    assert (entry["questions"], entry["majority_baseline"]) == (asked, pytest.approx(right / asked))


def test_the_report_explains_itself(compared: Path) -> None:
    report = read_step_report(compared / "comparison" / "report.json")
    kinds = [block["kind"] for block in report.blocks]
    assert kinds[:3] == ["verdict", "text", "terms"]
    verdict, trained, terms = report.blocks[:3]
    for word in ("primary languages", "expanded languages", "bits per byte", "recall", "generalisation"):
        assert word in verdict["text"]
        assert word in dict(terms["terms"])
    assert "majority baseline" in verdict["text"]
    assert "parameters" in trained["text"]
    titles = {block.get("title"): block for block in report.blocks}
    assert len(titles["Cost of the universal tokenizer on the primary languages"]["rows"]) == len(STAGES)
    assert len(titles["Forgetting by the chat stage"]["rows"]) == 2 * len(ARMS)
    columns = titles["Questions: exact answers"]["columns"]
    assert [name for name in columns if "majority" in name] == [
        "recall, majority",
        "generalisation, majority",
    ]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(350, (10, 20, 40, 80, 160, 350)), (6, (1, 2, 4, 6)), (1, (1,)), (64, (2, 4, 8, 16, 32, 64))],
)
def test_doubling_steps(steps: int, expected: tuple[int, ...]) -> None:
    assert doubling_steps(steps) == expected
