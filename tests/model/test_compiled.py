"""C++ of ours is compiled once, kept, and left out where it cannot be."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from koine.errors import KoineWarning
from koine.model import compiled, compiled_experts
from koine.model.compiled import library

SOURCE = 'extern "C" int two() { return 2; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if library(compiled_experts.SOURCE) is None:
        pytest.skip("needs Linux, AVX-512 and g++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "two.cpp"
    path.write_text(SOURCE)
    return path


def test_it_is_compiled_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = library.__wrapped__(source)
    assert first is not None
    assert first.two() == 2
    kept = list((source.parent / "cache" / "koine").iterdir())
    assert len(kept) == 1

    def refused(gxx: str, source: Path, target: Path) -> Path:
        assert target.is_file()
        return target

    monkeypatch.setattr(compiled, "_built", refused)
    assert library.__wrapped__(source).two() == 2


def test_another_source_is_another_file(source: Path) -> None:
    library.__wrapped__(source)
    source.write_text(SOURCE.replace("2;", "3;"))
    assert library.__wrapped__(source).two() == 3
    assert len(list((source.parent / "cache" / "koine").iterdir())) == 2


def test_a_compiler_that_fails_is_named_and_done_without(source: Path) -> None:
    source.write_text("no C++")
    with pytest.warns(KoineWarning, match=r"could not compile two\.cpp \(.*going on without"):
        assert library.__wrapped__(source) is None
    assert not list((source.parent / "cache" / "koine").iterdir())


def test_a_cache_that_cannot_be_made_is_done_without(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / "file"))
    assert library.__wrapped__(source).two() == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("compiler", lambda: None),
        ("processor_flags", lambda: {"avx2"}),
        ("platform.system", lambda: "Darwin"),
    ],
)
def test_machines_that_cannot(source: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    monkeypatch.setattr(f"koine.model.compiled.{name}", value)
    assert library.__wrapped__(source) is None


def test_another_compiler_than_gcc(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, stdout="clang version 19"),
    )
    assert library.__wrapped__(source) is None


def test_silu_at_both_ends(source: Path) -> None:
    """exp is a polynomial of ours: to 1e-6 of torch's in float64 wherever the result is no less than float32 can say, and nothing beyond."""
    gate = torch.cat((torch.linspace(-80, 80, 100_003), torch.tensor([-1e4, 1e4, 0.0, -0.0])))
    halves = torch.stack((gate, torch.ones_like(gate)), dim=1)
    units = torch.empty(len(gate), 1)
    compiled_experts.swiglu(halves, units)
    wanted = F.silu(gate.double())
    assert torch.allclose(units[:, 0].double(), wanted, rtol=1e-6, atol=1e-33)
    grad = torch.ones(len(gate), 1)
    grad_halves = torch.empty_like(halves)
    compiled_experts.swiglu_backward(grad, halves, grad_halves, units)
    leaf = gate.double().requires_grad_()
    F.silu(leaf).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert torch.allclose(grad_halves[:, 0].double(), leaf.grad, rtol=1e-6, atol=1e-6)
    assert torch.allclose(grad_halves[:, 1].double(), wanted, rtol=1e-6, atol=1e-33)
