"""Stop rules: a training that ends early is complete, and nothing but its evaluations decides."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from koine.errors import UserError
from koine.files import read_json, sha256_file
from koine.train import LanguageModelling, StopRule, TrainSettings, train
from tests.train.fakes import fake_order
from tests.train.models import small_model
from tests.train.stop_rules import KeepSecond, StopAfter

SETTINGS: dict[str, Any] = {"warmup_steps": 2, "checkpoint_every": 5, "threads": 1, "dtype": "float32"}


def weight_sum(model: Any, step: int) -> Mapping[str, float]:
    return {"figure": float(sum(parameter.abs().sum() for parameter in model.parameters()))}


def run(
    folder: Path, out: Path, *, stop: StopRule | None, evaluate: Any = weight_sum, every: int = 3, **more: Any
) -> dict[str, Any]:
    """Train 12 steps, or fewer where the rule stops; return the record."""
    settings = TrainSettings(evaluate_every=every, **{**SETTINGS, **more})
    order = fake_order(folder / "source")
    train(
        small_model(), LanguageModelling(), order, settings,
        out=out, evaluate=evaluate, stop=stop, progress=False, device="cpu",
    )  # fmt: skip
    return dict(read_json(out / "training.json"))


def test_a_stopped_training_is_complete_with_the_weights_of_its_last_step(tmp_path: Path) -> None:
    seen = []

    def evaluate(model: Any, step: int) -> Mapping[str, float]:
        seen.append((step, float(model.embedding.weight.detach().abs().sum())))
        return weight_sum(model, step)

    record = run(tmp_path, tmp_path / "out", stop=StopAfter(2), evaluate=evaluate)
    assert record["stopped"]["step"] == 6
    assert record["stopped"]["of"] == 12
    assert record["stopped"]["reason"].startswith("2 evaluations were made")
    assert record["steps"] == 6
    assert [step for step, _ in seen] == [3, 6]
    from koine.model import load_model

    assert float(load_model(tmp_path / "out").embedding.weight.detach().abs().sum()) == seen[-1][1]
    assert "6 of 12 steps" in (tmp_path / "out" / "README.md").read_text()
    assert "2 evaluations were made" in (tmp_path / "out" / "README.md").read_text()
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(steps) == 5
    # The best checkpoint, by the lowest figure, is there; the same call again has nothing to do.
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == [
        f"step-{record['best']['step']:06d}"
    ]
    before = sha256_file(tmp_path / "out" / "model.safetensors")
    assert run(tmp_path, tmp_path / "out", stop=StopAfter(2)) == record
    assert sha256_file(tmp_path / "out" / "model.safetensors") == before


def test_a_rule_that_never_stops_changes_no_weight(tmp_path: Path) -> None:
    record = run(tmp_path, tmp_path / "rule", stop=StopAfter(100))
    assert "stopped" not in record
    run(tmp_path, tmp_path / "plain", stop=None)
    assert sha256_file(tmp_path / "rule" / "model.safetensors") == sha256_file(
        tmp_path / "plain" / "model.safetensors"
    )


@pytest.mark.parametrize("at", [4, 6])
def test_an_interrupted_run_stops_at_the_same_step(tmp_path: Path, at: int) -> None:
    """SIGTERM between two evaluations, and during the one after which the rule stops."""
    whole = run(tmp_path, tmp_path / "whole", stop=StopAfter(3))
    assert whole["stopped"]["step"] == 9

    class Interrupting(LanguageModelling):
        def __call__(self, model: Any, batch: Any, /) -> Any:
            calls.append(0)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(model, batch)

    calls: list[int] = []
    Interrupting.__qualname__ = "LanguageModelling"
    settings = TrainSettings(evaluate_every=3, **SETTINGS)
    more = {
        "out": tmp_path / "out",
        "evaluate": weight_sum,
        "stop": StopAfter(3),
        "progress": False,
        "device": "cpu",
    }
    with pytest.raises(SystemExit):
        train(small_model(), Interrupting(), fake_order(tmp_path / "source"), settings, **more)
    assert not (tmp_path / "out" / "training.json").exists()
    assert run(tmp_path, tmp_path / "out", stop=StopAfter(3)) == whole
    for name in ("model.safetensors", "training.json", "README.md"):
        assert sha256_file(tmp_path / "out" / name) == sha256_file(tmp_path / "whole" / name)


def test_the_rule_chooses_the_best_where_no_metric_is_named(tmp_path: Path) -> None:
    assert run(tmp_path, tmp_path / "rule", stop=KeepSecond(4))["best"]["step"] == 6
    assert (tmp_path / "rule" / "checkpoints" / "step-000006").is_dir()
    assert (
        run(tmp_path, tmp_path / "low", stop=KeepSecond(4), best_metric="figure")["best"]["metric"]
        == "figure"
    )


def test_minus_marks_the_highest_value_as_the_best(tmp_path: Path) -> None:
    figures = {3: 1.0, 6: 5.0, 9: 2.0, 12: 4.0}
    evaluate = lambda model, step: {"score": figures[step]}  # noqa: E731
    high = run(tmp_path, tmp_path / "high", stop=None, evaluate=evaluate, best_metric="-score")
    assert high["best"] == {"step": 6, "metric": "-score", "value": 5.0}
    low = run(tmp_path, tmp_path / "low", stop=None, evaluate=evaluate, best_metric="score")
    assert low["best"] == {"step": 3, "metric": "score", "value": 1.0}


def test_another_rule_or_interval_is_another_training(tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "out", stop=StopAfter(2))
    with pytest.raises(UserError, match=r"stop.count: 2 -> 3"):
        run(tmp_path, tmp_path / "out", stop=StopAfter(3))
    with pytest.raises(UserError, match=r"stop.evaluate_every: 3 -> 4"):
        run(tmp_path, tmp_path / "out", stop=StopAfter(2), every=4)
    with pytest.raises(UserError, match=r"stop"):
        run(tmp_path, tmp_path / "out", stop=None)


def test_what_cannot_stop_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is evaluated"):
        run(tmp_path, tmp_path / "out", stop=StopAfter(2), every=0)
    with pytest.raises(UserError, match="nothing is evaluated"):
        run(tmp_path, tmp_path / "out", stop=StopAfter(2), evaluate=None)
    with pytest.raises(UserError, match="the stop rule .* has no identity"):
        run(tmp_path, tmp_path / "out", stop=lambda evaluations: None)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_damaged_evaluations_in_a_checkpoint_are_named(tmp_path: Path) -> None:
    from koine.train.checkpoint import read_checkpoint

    run(tmp_path, tmp_path / "out", stop=StopAfter(2))
    [path] = (tmp_path / "out" / "checkpoints").iterdir()
    record = json.loads((path / "checkpoint.json").read_text())
    assert record["evaluations"][0]["step"] == 3
    record["evaluations"][0]["figure"] = "high"
    (path / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="damaged checkpoint") as caught:
        read_checkpoint(path, hint="choose another")
    assert "evaluation 1" in str(caught.value.__cause__)
