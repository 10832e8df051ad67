"""The search for weights on functions of known optimum, and on merges in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from koine.cli.merge.search import command, wrong_share
from koine.combine.merging.runner import run_merge
from koine.combine.merging.weight_search import (
    InMemoryMerge,
    Trial,
    leave_one_out,
    pareto_front,
    search_weights,
    simplex_grid,
)
from koine.errors import UserError
from koine.evaluate import question_accuracy
from koine.model import load_model
from koine.tokenizer import load_tokenizer
from tests.combine.merge_configs import config_of
from tests.combine.models import write_branches


def test_the_grid_is_the_simplex() -> None:
    grid = list(simplex_grid(3, 4))
    assert len(grid) == len(set(grid)) == 15
    assert all(sum(point) == pytest.approx(1.0) for point in grid)


def test_finer_steps_improve_the_best() -> None:
    target = (0.3, 0.6, 0.1)
    calls = []

    def evaluate(weights: tuple[float, ...]) -> dict[str, float]:
        calls.append(weights)
        return {"distance": sum((a - b) ** 2 for a, b in zip(weights, target, strict=True))}

    trials = search_weights(evaluate, 3, parts=4, rounds=4)
    best = min(trials, key=lambda trial: trial.mean)
    assert all(abs(a - b) <= 1 / 64 + 1e-9 for a, b in zip(best.weights, target, strict=True))
    assert len(calls) == len(set(calls)) == len(trials)
    assert len(search_weights(evaluate, 3, parts=4, rounds=4, budget=17)) == 17
    with pytest.raises(UserError, match="the grid has 15 points and the budget is 9"):
        search_weights(evaluate, 3, parts=4, budget=9)


def test_the_pareto_front_and_leave_one_out() -> None:
    trials = [
        Trial((w, 1 - w), {"a": (1 - w) ** 2, "b": w**2 + (0.5 if w == 0.25 else 0.0)})
        for w in (0.0, 0.25, 0.5, 1.0)
    ]
    assert [trial.weights[0] for trial in pareto_front(trials)] == [0.0, 0.5, 1.0]

    def evaluate(weights: tuple[float, ...]) -> dict[str, float]:
        return {"code": 1.0 - weights[0], "prose": 1.0 - weights[1] + 0.5 * weights[2]}

    changes = leave_one_out(evaluate, (0.5, 0.25, 0.25))
    # Without the third, the first two have 2/3 and 1/3: prose is better, so the third collides there.
    assert changes[2]["prose"] == pytest.approx((1 - 1 / 3) - (1 - 0.25 + 0.125))
    assert changes[0]["code"] == pytest.approx(0.5)


def test_leave_one_out_of_a_vertex_is_none() -> None:
    """Where one model has all the weight, nothing is left without it: None, as JSON has no infinity."""
    changes = leave_one_out(lambda weights: {"code": weights[1]}, (1.0, 0.0))
    assert changes == [{"code": None}, {"code": 0.0}]


def test_a_vertex_as_the_best_is_written_and_printed(tmp_path: Path) -> None:
    """The whole command, with slerp, whose `t` is searched."""
    _, branches = write_branches(tmp_path, ("a", "b"))
    (tmp_path / "text.jsonl").write_text('{"id": "1", "text": "ein Text", "language": "de"}\n')
    arguments = [
        *map(str, branches.values()),
        "--data",
        str(tmp_path / "text.jsonl"),
        "--method",
        "slerp",
        "--parts",
        "1",
        "--rounds",
        "0",
        "--out",
        str(tmp_path / "search.json"),
    ]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    found = json.loads((tmp_path / "search.json").read_text(), parse_constant=pytest.fail)
    assert sorted(found["best"]["weights"]) == [0.0, 1.0]
    assert {"text": None} in found["left_out"].values()
    assert "–" in result.output
    assert f"\n--t {found['best']['weights'][1]:g}\nwritten to" in result.stdout


def test_questions_are_a_score_too(tmp_path: Path) -> None:
    """The share of wrong answers is a score, equal to that of `question_accuracy` for the same model."""
    _, branches = write_branches(tmp_path, ("a", "b"))
    (tmp_path / "text.jsonl").write_text('{"id": "1", "text": "ein Text", "language": "de"}\n')
    messages = [{"role": "user", "content": "Text?"}, {"role": "assistant", "content": "Text"}]
    record = {"messages": messages, "answer": "Text", "language": "de"}
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({**record, "id": str(number)}) + "\n" for number in range(3)))
    arguments = [
        *map(str, branches.values()),
        "--data",
        str(tmp_path / "text.jsonl"),
        "--questions",
        f"wrong={asked}",
        "--parts",
        "1",
        "--rounds",
        "0",
        "--out",
        str(tmp_path / "search.json"),
    ]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    trials = json.loads((tmp_path / "search.json").read_text())["trials"]
    assert [set(trial["scores"]) for trial in trials] == [{"text", "wrong"}] * 2
    for trial in trials:
        alone = branches["a" if trial["weights"][0] == 1.0 else "b"]
        accuracy = question_accuracy(load_model(alone), load_tokenizer(alone), [record] * 3)
        assert trial["scores"]["wrong"] == wrong_share(accuracy)
    kinds = {"recall": {"correct": 1, "questions": 4}, "generalisation": {"correct": 0, "questions": 1}}
    assert wrong_share({"overall": kinds}) == pytest.approx(0.8)


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare-linear"])
def test_merges_in_memory_equal_those_on_disk(tmp_path: Path, method: str) -> None:
    base, branches = write_branches(tmp_path, ("a", "b"))
    with_base = method not in ("linear", "slerp")
    more = {"dare-linear": {"density": 1.0, "scale": 0.5}, "linear": {"normalize": False}}
    options = more.get(method, {})
    merged = InMemoryMerge(
        list(branches.values()), method=method, base=base if with_base else None, options=options
    )
    tokens = torch.randint(0, 200, (1, 12))
    first = merged.set((1.0, 0.0))(tokens)
    got = merged.set((0.25, 0.75))(tokens)
    assert not torch.equal(first, got)
    written = {"t": 0.75} if method == "slerp" else options
    run_merge(config_of(method, {"base": base, **branches}, options=written), tmp_path / "out")
    assert torch.allclose(got, load_model(tmp_path / "out")(tokens), atol=1e-5)


def test_searches_without_weights_are_refused(tmp_path: Path) -> None:
    _, branches = write_branches(tmp_path, ("a", "b"))
    with pytest.raises(UserError, match="model-stock has no weights to search"):
        InMemoryMerge(list(branches.values()), method="model-stock")
    with pytest.raises(UserError, match="ties needs the common ancestor"):
        InMemoryMerge(list(branches.values()), method="ties")
    with pytest.raises(UserError, match="linear has no option 'scale'"):
        InMemoryMerge(list(branches.values()), options={"scale": 2.0})
    content = json.loads((branches["b"] / "tokenizer.json").read_text())
    (branches["b"] / "tokenizer.json").write_text(json.dumps({**content, "normalizer": None}))
    with pytest.raises(UserError, match="its tokenizer is another than that of"):
        InMemoryMerge(list(branches.values()))
    stored = load_file(branches["b"] / "model.safetensors")
    stored["model.norm.weight"][1] = float("nan")
    save_file(stored, branches["b"] / "model.safetensors")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        InMemoryMerge(list(branches.values()), tokenizer="first")


def test_the_pareto_front_with_equal_scores() -> None:
    """Better in one score and equal in the other is better; equal in both is not."""
    scores = ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    trials = [Trial((float(number),), one) for number, one in enumerate(scores)]
    assert pareto_front(trials) == trials[1:]


def test_a_grid_as_large_as_the_budget_is_run() -> None:
    trials = search_weights(lambda weights: {"x": weights[0]}, 2, parts=4, rounds=1, budget=5)
    assert [trial.weights[0] for trial in trials] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_the_other_weights_sum_to_one() -> None:
    """Weights that sum to 2 (task arithmetic): without the first, the others are divided to sum to 1."""
    seen: list[tuple[float, ...]] = []
    leave_one_out(lambda weights: {"x": float(seen.append(weights) is None)}, (1.0, 0.5, 0.5))
    assert seen[1:] == [
        (0.0, 0.5, 0.5),
        pytest.approx((2 / 3, 0.0, 1 / 3)),
        pytest.approx((2 / 3, 1 / 3, 0.0)),
    ]


def test_all_weights_use_one_dare_mask(tmp_path: Path) -> None:
    """DARE drops the same entries for all weights: half of a weight is half of the change."""
    base, branches = write_branches(tmp_path, ("a", "b"))
    merged = InMemoryMerge(list(branches.values()), method="dare-linear", base=base, options={"density": 0.5})
    origin = load_model(base).state_dict()
    whole = {name: tensor.clone() for name, tensor in merged.set((1.0, 0.0)).state_dict().items()}
    for name, tensor in merged.set((0.5, 0.0)).state_dict().items():
        wanted = origin[name] + (whole[name] - origin[name]) / 2
        assert torch.allclose(tensor, wanted, atol=1e-6), name
