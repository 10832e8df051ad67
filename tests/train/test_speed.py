"""Speed of training steps: measured while the machine is quiet, remembered, assumed otherwise."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from koine.model.config import MixtureConfig
from koine.model.counting import block_matrix_parameters, training_flops_per_token
from koine.model.presets import PRESETS, preset
from koine.train import TrainSettings, speed
from koine.train.speed import Speed, assumed_speed, measure_speed, training_speed

CONFIG = preset("koine-0.5m", 300)
SETTINGS = TrainSettings(dtype="float32")
FOUND = Speed(micro_batch=0.5, update=0.25)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "koine" / "training-speed"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[int]]:
    """Let other processes use so many of 4 cores; returns the threads of each measurement."""
    measured: list[int] = []

    def measure(config: object, settings: object, rows: int, length: int, threads: int) -> Speed:
        measured.append(threads)
        return FOUND

    def busy(cores: float) -> list[int]:
        monkeypatch.setattr(speed, "usable_cores", lambda: 4)
        monkeypatch.setattr(speed, "_busy_cores", lambda: cores)
        monkeypatch.setattr(speed, "measure_speed", measure)
        return measured

    return busy


def test_a_quiet_machine_is_measured_once_an_hour(
    machine: Callable[[float], list[int]], own_cache: Path
) -> None:
    measured = machine(0.4)
    first = training_speed(CONFIG, SETTINGS, 2, 64, 1)
    assert (first.micro_batch, first.update, first.measured) == (0.5, 0.25, True)
    assert first.basis == "Training speed: measured now on this machine."
    assert training_speed(CONFIG, SETTINGS, 2, 64, 1) == first
    (file,) = own_cache.glob("*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "when": time.time() - 120}))
    again = training_speed(CONFIG, SETTINGS, 2, 64, 1)
    assert again.micro_batch == 0.5
    assert again.basis.startswith(f"Training speed: measured on this machine on {time.strftime('%Y-')}")
    assert measured == [1]
    # Another shape, another number of threads, other settings: each is measured for itself.
    training_speed(CONFIG, SETTINGS, 2, 64, 2)
    training_speed(CONFIG, SETTINGS, 4, 64, 1)
    training_speed(CONFIG, TrainSettings(dtype="float32", gradient_checkpointing=True), 2, 64, 1)
    assert measured == [1, 2, 1, 1]


def test_a_busy_machine_is_not_measured(machine: Callable[[float], list[int]], own_cache: Path) -> None:
    measured = machine(1.9)
    found = training_speed(CONFIG, SETTINGS, 2, 64, 1)
    assert not found.measured
    assert found.basis == (
        "Training speed: assumed, it may be off by a factor of 3; it was not measured now, "
        "because other processes use 1.9 of 4 cores."
    )
    assert measured == []
    assert not own_cache.exists()


def test_a_busy_machine_uses_an_earlier_measurement(
    machine: Callable[[float], list[int]], own_cache: Path
) -> None:
    machine(0.0)
    training_speed(CONFIG, SETTINGS, 2, 64, 1)
    (file,) = own_cache.glob("*.json")
    value = json.loads(file.read_text())
    file.write_text(json.dumps({**value, "when": time.mktime((2026, 3, 1, 10, 30, 0, 0, 0, -1))}))
    measured = machine(2.0)
    found = training_speed(CONFIG, SETTINGS, 2, 64, 1)
    assert (found.micro_batch, found.measured) == (0.5, True)
    assert found.basis == (
        "Training speed: measured on this machine on 2026-03-01 10:30; it was not measured now, "
        "because other processes use 2.0 of 4 cores."
    )
    # Once it is quiet, the old measurement is repeated.
    assert len(measured) == 1
    machine(0.0)
    training_speed(CONFIG, SETTINGS, 2, 64, 1)
    assert len(measured) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"micro_batch": -1, "update": 1, "when": 1}', "{"])
def test_a_damaged_record_is_measured_again(
    machine: Callable[[float], list[int]], own_cache: Path, content: str
) -> None:
    measured = machine(0.0)
    training_speed(CONFIG, SETTINGS, 2, 64, 1)
    (file,) = own_cache.glob("*.json")
    file.write_text(content)
    assert training_speed(CONFIG, SETTINGS, 2, 64, 1).micro_batch == 0.5
    assert len(measured) == 2


def test_a_measurement_leaves_torch_as_it_was() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = measure_speed(CONFIG, SETTINGS, 2, 64, threads + 1)
    assert min(found.micro_batch, found.update) > 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def test_mixtures_of_experts_are_measured() -> None:
    from dataclasses import replace

    experts = replace(CONFIG, mixture=MixtureConfig(experts=("a", "b"), domain_size=4, shared_expert=True))
    assert measure_speed(experts, SETTINGS, 2, 64, 1).micro_batch > 0


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_timed_is_small_for_every_model(name: str) -> None:
    config = preset(name)
    small, rows, length = speed._affordable(config, 64, 8192)
    assert rows * length * training_flops_per_token(small, length) <= 1.5 * speed.MAX_OPERATIONS
    assert max(block_matrix_parameters(small), small.vocab_size * small.hidden_size) <= 2 * speed.MAX_ENTRIES
    # A small micro-batch of a small model is timed as it is.
    assert speed._affordable(CONFIG, 2, 64) == (CONFIG, 2, 64)


def test_an_assumed_speed_grows_with_work_and_falls_with_threads() -> None:
    def seconds(name: str, rows: int, threads: int) -> float:
        return assumed_speed(preset(name), SETTINGS, rows, 512, threads).micro_batch

    assert seconds("koine-8m", 8, 1) > 1.9 * seconds("koine-8m", 4, 1)
    assert seconds("koine-135m", 4, 1) > 10 * seconds("koine-8m", 4, 1)
    assert seconds("koine-135m", 4, 2) < 0.6 * seconds("koine-135m", 4, 1)
