"""C++ of ours is compiled once, kept, and left out where it cannot be."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from koine.errors import KoineWarning
from koine.model.moe import cpp_extension as compiled
from koine.model.moe import cpu_kernels as compiled_experts
from koine.model.moe.cpp_extension import library

SOURCE = 'extern "C" int two() { return 2; }\n'


@pytest.fixture
def source(compiled_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "two.cpp"
    path.write_text(SOURCE)
    return path


def test_it_is_compiled_once(source: Path) -> None:
    first = library.__wrapped__(source)
    assert first is not None
    assert first.two() == 2
    (kept,) = (source.parent / "cache" / "koine").iterdir()
    number = kept.stat().st_ino
    assert library.__wrapped__(source).two() == 2
    assert [path.stat().st_ino for path in kept.parent.iterdir()] == [number]


def test_a_damaged_file_is_compiled_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_digest", lambda source, told: "digest")
    kept = source.parent / "cache" / "koine" / "two-digest.so"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"")
    assert library.__wrapped__(source).two() == 2
    assert kept.stat().st_size


def test_a_folder_that_others_may_write_is_not_trusted(source: Path) -> None:
    folder = source.parent / "cache" / "koine"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert library.__wrapped__(source).two() == 2
    assert not list(folder.iterdir())


def test_processes_that_compile_at_once(source: Path) -> None:
    """A file that another made meanwhile stays: somebody may run it."""
    target = source.parent / "two.so"

    def slow(*command: Any, **options: Any) -> Any:
        target.write_bytes(b"of another")
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", slow)
        assert compiled._built("g++", source, target) == target
    assert target.read_bytes() == b"of another"
    assert {path.name for path in source.parent.iterdir()} == {"two.cpp", "two.so"}


@pytest.mark.parametrize("changed", ["source", "compiler", "flags", "processor"])
def test_the_name_stands_for_all_that_it_depends_on(
    source: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    before = compiled._digest(source, "g++ 12")
    told = "g++ 12"
    if changed == "source":
        source.write_text("")
    elif changed == "compiler":
        told = "g++ 13"
    elif changed == "flags":
        monkeypatch.setattr(compiled, "FLAGS", ("-O2",))
    else:
        monkeypatch.setattr(compiled, "processor_flags", lambda: {"avx512f"})
    assert compiled._digest(source, told) != before


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


def test_a_user_without_a_home(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert library.__wrapped__(source).two() == 2


def test_a_compiler_that_does_not_start(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_program = source.parent / "g++"
    no_program.write_text("")
    no_program.chmod(0o755)
    monkeypatch.setenv("CXX", str(no_program))
    with pytest.warns(KoineWarning, match="could not compile"):
        assert library.__wrapped__(source) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("compiler", lambda: None),
        ("processor_flags", lambda: {"avx2"}),
        ("platform.system", lambda: "Darwin"),
    ],
)
def test_machines_that_cannot(source: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    monkeypatch.setattr(f"koine.model.moe.cpp_extension.{name}", value)
    assert library.__wrapped__(source) is None


def test_another_compiler_than_gcc(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, stdout="clang version 19"),
    )
    assert library.__wrapped__(source) is None


def test_silu_at_both_ends(source: Path) -> None:
    """exp is a polynomial of ours: to 1e-6 of torch's in float64 wherever float32 can say so little, and nothing beyond."""
    gate = torch.cat((torch.linspace(-80, 80, 100_003), torch.tensor([-1e4, 1e4, 0.0, -0.0, -3e38])))
    halves = torch.stack((gate, torch.ones_like(gate)), dim=1)
    units = torch.empty(len(gate), 1)
    compiled_experts.swiglu(halves, units)
    wanted = F.silu(gate.double())
    assert torch.allclose(units[:, 0].double(), wanted, rtol=1e-6, atol=1e-33)
    grad = torch.ones(len(gate), 1)
    grad_halves = torch.empty_like(halves)
    compiled_experts.swiglu_backward(grad, halves, grad_halves, units)
    leaf = gate.double().requires_grad_()
    (slope,) = torch.autograd.grad(F.silu(leaf).sum(), leaf)
    assert torch.allclose(grad_halves[:, 0].double(), slope, rtol=1e-6, atol=1e-6)
    assert torch.allclose(grad_halves[:, 1].double(), wanted, rtol=1e-6, atol=1e-33)
