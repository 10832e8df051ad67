"""What this machine offers, by what its system's files say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from koine import hardware
from koine.train import TrainSettings


@pytest.fixture(autouse=True)
def _ask_again() -> Iterator[None]:
    """What was found out of the real processor is not kept for a pretended one, nor the other way round."""
    hardware.bfloat16_is_fast.cache_clear()
    yield
    hardware.bfloat16_is_fast.cache_clear()


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("GenuineIntel", "avx512f amx_bf16 avx512_bf16", "bfloat16"),
        ("GenuineIntel", "avx512f avx512_bf16", "float32"),
        ("AuthenticAMD", "avx512f avx512_bf16", "bfloat16"),
        ("AuthenticAMD", "avx2", "float32"),
        (None, "asimd bf16", "bfloat16"),
        (None, None, "float32"),
    ],
)
def test_training_takes_the_faster_precision(
    monkeypatch: pytest.MonkeyPatch, vendor: str | None, flags: str | None, expected: str
) -> None:
    told = {"vendor_id": vendor, "flags": flags}
    monkeypatch.setattr(hardware, "_cpuinfo", lambda *keys: told.get(keys[0]))
    monkeypatch.setattr(hardware.Path, "exists", lambda path: False)
    assert hardware.chosen_dtype("auto") == expected
    assert hardware.chosen_dtype("bfloat16") == "bfloat16"
    assert TrainSettings().dtype == expected


def test_an_accelerator_computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_cpuinfo", lambda *keys: None)
    monkeypatch.setattr(hardware.Path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    assert hardware.chosen_dtype("auto") == "bfloat16"


def test_what_is_free_is_no_more_than_the_control_group_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory_limit", lambda: 2**20)
    assert hardware.available_memory() == 2**20
    assert hardware.machine().available_memory_bytes == 2**20


def test_devices_are_named_as_their_drivers_report(tmp_path: Path) -> None:
    assert hardware.driver_devices(tmp_path) == (["Apple GPU"] if sys.platform == "darwin" else [])
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert hardware.driver_devices(tmp_path)[0] == "NVIDIA GPU"
    for number in (2, 1):
        folder = tmp_path / f"proc/driver/nvidia/gpus/0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t NVIDIA H{number}00\nIRQ:   \t\t 11\n")
    (tmp_path / "dev/kfd").touch()
    assert hardware.driver_devices(tmp_path)[:3] == ["NVIDIA H100", "NVIDIA H200", "AMD GPU"]


def test_busy_cores_are_those_of_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one second of 2 cores: 0.5 s idle, 0.25 s waiting, and 0.75 s of the rest are our own."""
    import psutil

    times = iter([(10.0, 5.0, 20.0, 1.0), (10.75, 5.5, 20.5, 1.25)])
    own, clock = iter([3.0, 3.75]), iter([100.0, 101.0])

    class Times(tuple[float, ...]):
        @property
        def idle(self) -> float:
            return self[2]

        @property
        def iowait(self) -> float:
            return self[3]

    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(next(times)))
    monkeypatch.setattr(hardware.time, "process_time", lambda: next(own))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(hardware.time, "sleep", lambda seconds: None)
    assert hardware.busy_cores() == pytest.approx(0.5)
