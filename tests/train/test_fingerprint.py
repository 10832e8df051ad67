"""The identity of a training: first weights, the objective's arguments, records of older versions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koine.errors import UserError
from koine.files import write_json
from koine.model.formats import tensor_digest
from koine.train import LanguageModelling, TrainSettings, arguments_identity, train, weights_digest
from koine.train import fingerprint as module
from koine.train.fingerprint import objective_identity

from .fakes import fake_order
from .models import small_model

SETTINGS = TrainSettings(dtype="float32", threads=1, learning_rate=1e-2)


@dataclass(frozen=True)
class Distillation:
    """Cross-entropy plus the squared distance from a teacher's hidden states."""

    teacher: nn.Module
    kl_weight: float = 0.5

    def __call__(self, model: Any, batch: Any, /) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = LanguageModelling()(model, batch)
        with torch.no_grad():
            target = self.teacher(batch.tokens)
        distance = (model(batch.tokens) - target).square().sum()
        return loss + self.kl_weight * distance, metrics

    def identity(self) -> dict[str, Any]:
        return arguments_identity(self)


def run(out: Path, order: Any, objective: Any) -> None:
    train(small_model(), objective, order, SETTINGS, out=out, progress=False, device="cpu")


def test_every_bit_of_every_weight_counts() -> None:
    """The next float of any one weight, anywhere in a tensor, gives another digest."""
    model = small_model()
    whole = weights_digest(model)
    assert weights_digest(small_model()) == whole
    for parameter in model.state_dict().values():
        flat = parameter.view(-1)
        for index in {0, 1, flat.numel() // 2, flat.numel() - 1}:
            before = flat[index].clone()
            flat[index] = torch.nextafter(before, torch.tensor(torch.inf))
            assert weights_digest(model) != whole
            flat[index] = before
    assert weights_digest(model) == whole


def test_the_digest_does_not_depend_on_chunks_layout_or_narrow_types(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Linear(100, 37)
    whole = weights_digest(model)
    for chunk in (4, 12, 1000, 10_000_000):
        monkeypatch.setattr(tensor_digest, "CHUNK_BYTES", chunk)
        assert weights_digest(model) == whole
    transposed = nn.Linear(100, 37)
    transposed.weight.data = model.weight.data.t().contiguous().t()
    transposed.bias.data = model.bias.data.clone()
    assert not transposed.weight.is_contiguous()
    assert weights_digest(transposed) == whole
    strided, dense = nn.Module(), nn.Module()
    for tensor_of, values in ((strided, model.bias.data.repeat_interleave(2)[::2]), (dense, model.bias.data)):
        tensor_of.register_buffer("values", values)
        tensor_of.register_buffer(
            "constant", torch.ones(1).expand(5) if tensor_of is strided else torch.ones(5)
        )
    assert weights_digest(strided) == weights_digest(dense)
    half = nn.Linear(100, 37).to(torch.bfloat16)
    digest = weights_digest(half)
    assert weights_digest(half.to(torch.float32)) == digest
    assert weights_digest(half.to(torch.float64)) != digest


def test_names_shapes_and_order_count() -> None:
    def with_tensors(**tensors: Tensor) -> nn.Module:
        found = nn.Module()
        for name, tensor in tensors.items():
            found.register_buffer(name, tensor)
        return found

    a, b = torch.arange(6.0), torch.arange(6.0, 12.0)
    found = [
        with_tensors(a=a, b=b),
        with_tensors(a=b, b=a),
        with_tensors(a=a.view(2, 3), b=b),
        with_tensors(a=torch.cat((a, b))),
        with_tensors(c=a, b=b),
        with_tensors(a=a.long(), b=b),
    ]
    assert len({weights_digest(model) for model in found}) == len(found)
    assert weights_digest(with_tensors(b=b, a=a)) == weights_digest(found[0])


def test_another_teacher_or_weight_is_another_training(tmp_path: Path) -> None:
    order = fake_order(tmp_path / "s", steps=(2,))
    out = tmp_path / "o"
    run(out, order, Distillation(small_model(1), kl_weight=0.1))
    run(out, order, Distillation(small_model(1), kl_weight=0.1))
    with pytest.raises(UserError) as raised:
        run(out, order, Distillation(small_model(2), kl_weight=0.9))
    assert "objective.kl_weight: 0.1 -> 0.9; objective.teacher.weights: sha256:" in str(raised.value)
    assert "another --out" in str(raised.value)
    with pytest.raises(
        UserError, match="objective.class: Distillation -> LanguageModelling; objective.kl_weight"
    ):
        run(out, order, LanguageModelling())
    # A teacher whose weights are the same and whose layers are not.
    config = small_model(1).config
    other = small_model(1)
    other.config = replace(config, rope_theta=2 * config.rope_theta)
    with pytest.raises(UserError, match=r"objective.teacher.config.rope_theta: \S+ -> \S+; run the same"):
        run(out, order, Distillation(other, kl_weight=0.1))


def test_an_objective_has_an_identity() -> None:
    def function(model: Any, batch: Any) -> Any: ...

    for without in (function, LanguageModelling, lambda model, batch: None):
        with pytest.raises(UserError, match="make it a frozen dataclass with __call__"):
            objective_identity(without)  # type: ignore[arg-type]

    @dataclass(frozen=True)
    class Forgetful:
        weight: float = 1.0
        cache: dict[str, Any] = field(default_factory=dict, compare=False)

        def __call__(self, model: Any, batch: Any, /) -> Any: ...

        def identity(self) -> dict[str, Any]:
            return {}

    with pytest.raises(UserError, match=r"Forgetful leaves out weight; use koine.train.arguments_identity"):
        objective_identity(Forgetful())
    changed: Any = Forgetful
    changed.identity = lambda self: {"weight": Path("a")}
    with pytest.raises(UserError, match="cannot be written as JSON"):
        objective_identity(Forgetful())
    changed.identity = arguments_identity
    assert objective_identity(Forgetful(2.0)) == {"class": Forgetful.__qualname__, "weight": 2.0}


def test_arguments_are_values_or_digests(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Arguments:
        value: Any

    def of(value: Any) -> Any:
        return arguments_identity(Arguments(value))["value"]

    assert of([1, "two", None, {"three": 3.5}]) == [1, "two", None, {"three": 3.5}]
    assert of(Arguments(True)) == {"value": True}
    assert of(torch.zeros(2)) != of(torch.tensor([0.0, -0.0])), "the sign of zero is a bit too"
    (tmp_path / "a").write_text("a")
    first = of(tmp_path)
    assert of(tmp_path / "a") == "sha256:" + hashlib.sha256(b"a").hexdigest()
    (tmp_path / "a").rename(tmp_path / "b")
    assert of(tmp_path) != first
    with pytest.raises(UserError, match=r"Arguments.value is a object, of which no identity is known"):
        of(object())


def recorded_before(out: Path, **changes: Any) -> None:
    """Rewrite `training.json` as it was written before version 0.1.0."""
    record = json.loads((out / "training.json").read_text())
    record["identity"] |= {
        "objective": "language_modelling",
        "first_weights": module._sampled_digest(small_model()),
    }
    record["identity"] |= changes
    write_json(out / "training.json", record)


def test_a_training_of_the_version_before_is_still_complete(tmp_path: Path) -> None:
    order = fake_order(tmp_path / "s", steps=(2,))
    out = tmp_path / "o"
    run(out, order, LanguageModelling())
    recorded_before(out)
    run(out, order, LanguageModelling())
    with pytest.raises(UserError, match="objective: language_modelling -> {'class': 'Distillation'"):
        run(out, order, Distillation(small_model()))
    recorded_before(out, objective=None)
    run(out, order, Distillation(small_model()))
    recorded_before(out, first_weights="0" * 64)
    with pytest.raises(UserError, match="first_weights: 0{64} -> sha256:"):
        run(out, order, LanguageModelling())
