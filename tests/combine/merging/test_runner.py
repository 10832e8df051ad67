"""Merging of checkpoints: blocks and shards change nothing, and an interrupted merge goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from koine.combine.merging import runner as merging
from koine.combine.merging import tensor as tensor_module
from koine.combine.merging.config import MergeConfig
from koine.combine.merging.methods import METHODS
from koine.combine.merging.runner import run_merge
from koine.errors import UserError
from koine.files import read_json
from koine.model import load_model
from tests.combine.merge_configs import config_of, tensors


@pytest.mark.parametrize("method", METHODS)
def test_blocks_threads_and_shards_change_nothing(
    method: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_merge(config_of(method, models), tmp_path / "whole", threads=1)
    monkeypatch.setattr(merging, "SYNC_BYTES", 1000)
    run_merge(config_of(method, models, max_shard_bytes=20_000), tmp_path / "shards", threads=3)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole, shards = tensors(tmp_path / "whole"), tensors(tmp_path / "shards")
    assert whole.keys() == shards.keys() == tensors(models["a"]).keys()
    for name in whole:
        assert torch.equal(whole[name], shards[name])
    # Sharded models are read as well.
    again = {"a": tmp_path / "shards", "b": tmp_path / "shards", "base": models["base"]}
    if method == "linear":
        run_merge(config_of(method, again), tmp_path / "again")
        for name, tensor in tensors(tmp_path / "again").items():
            assert torch.allclose(tensor, whole[name], atol=1e-7)
    load_model(tmp_path / "shards")
    assert METHODS[method].source in (tmp_path / "whole" / "README.md").read_text()


def test_values_by_hand_and_weights_by_pattern(models: dict[str, Path], tmp_path: Path) -> None:
    patterns = (("model.layers.[01].*", (1.0, 0.0)), ("*mlp*", (0.0, 1.0)))
    report = run_merge(config_of("linear", models, weights_for=patterns), tmp_path / "out")
    a, b, got = (tensors(path) for path in (models["a"], models["b"], tmp_path / "out"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(got[name], a[name])
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(got[name], b[name])
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.allclose(got[name], 0.25 * a[name] + 0.75 * b[name], atol=1e-7)
    assert report["config"]["weights"] == (0.25, 0.75)
    figures = read_json(tmp_path / "out" / "merge_report.json")["tensors"][name]
    middle = (a[name] + b[name]) / 2
    assert figures["distance"][0] == pytest.approx(float((a[name] - middle).norm() / middle.norm()), rel=0.05)


def test_blocks_of_rows_are_joined(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_merge(config_of("task-arithmetic", models), tmp_path / "whole")
    monkeypatch.setattr(tensor_module, "BLOCK", 100)
    run_merge(config_of("task-arithmetic", models), tmp_path / "blocks")
    whole, blocks = tensors(tmp_path / "whole"), tensors(tmp_path / "blocks")
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)


def test_sign_conflicts_are_counted(models: dict[str, Path], tmp_path: Path) -> None:
    report = run_merge(config_of("ties", models), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    base, a, b = (tensors(models[one])[name] for one in ("base", "a", "b"))
    share = float((((a - base) > 0) != ((b - base) > 0)).float().mean())
    # Estimated from every entry here: the tensor is small.
    assert report["tensors"][name]["sign_conflicts"] == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_merge_goes_on_and_ends_in_the_same_bytes(
    models: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    """The child merges slowly, syncs after every tensor, and is killed when its journal has some lines."""
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from tests.combine.merge_configs import config_of\n"
        "from koine.combine.merging import runner as merging\n"
        "merging.SYNC_BYTES = 1\nslow = merging.merge_tensor\n"
        "merging.merge_tensor = lambda *given: (time.sleep(0.1), slow(*given))[1]\n"
        "folder = Path(sys.argv[1])\n"
        "models = {'base': folder / 'seed', 'a': folder / 'a', 'b': folder / 'b'}\n"
        "merging.run_merge(config_of('dare-ties', models), folder / 'out', threads=1)\n"
    )
    root = Path(__file__).resolve().parents[3]
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=root,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"},
    )
    journal = tmp_path / ".out.merge" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and len(journal.read_text().splitlines()) > 4):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(number)
    child.wait()
    assert not (tmp_path / "out").exists()
    named = {"base": tmp_path / "seed", "a": tmp_path / "a", "b": tmp_path / "b"}
    done = len(journal.read_text().splitlines()) - 1
    touched: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        real = merging.merge_tensor
        patch.setattr(
            merging,
            "merge_tensor",
            lambda job, writer: (touched.append(job.name), real(job, writer))[1],
        )
        run_merge(config_of("dare-ties", named), tmp_path / "out")
    assert len(touched) == len(tensors(tmp_path / "out")) - done
    run_merge(config_of("dare-ties", named), tmp_path / "fresh")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "fresh"))
    assert first == second
    assert not journal.parent.exists()


def test_work_of_another_merge_is_not_continued(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / ".out.merge").mkdir()
    (tmp_path / ".out.merge" / "journal.jsonl").write_text(
        '{"fingerprint": "another"}\n{"model.norm.weight": {}}\n'
    )
    run_merge(config_of("linear", models), tmp_path / "out")
    run_merge(config_of("linear", models), tmp_path / "fresh")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "fresh" / "model.safetensors"
    ).read_bytes()


def test_mixed_dtypes_integers_and_scalars(tmp_path: Path) -> None:
    for name, dtype in (("a", torch.bfloat16), ("b", torch.float32)):
        (tmp_path / name).mkdir()
        content = {
            "w": torch.full((3, 4), 1.0 if name == "a" else 2.0, dtype=dtype),
            "scale": torch.tensor(3.0, dtype=dtype),
            "steps": torch.tensor([1, 2]),
            "empty": torch.empty(0, 4, dtype=dtype),
        }
        save_file(content, tmp_path / name / "model.safetensors")
    config = MergeConfig(
        method="linear", models=(tmp_path / "a", tmp_path / "b"), weights=(0.5, 0.5), dtype="float32"
    )
    run_merge(config, tmp_path / "out")
    got = tensors(tmp_path / "out")
    assert got["w"].dtype == torch.float32
    assert torch.equal(got["w"], torch.full((3, 4), 1.5))
    assert float(got["scale"]) == 3.0
    assert torch.equal(got["steps"], torch.tensor([1, 2]))
    save_file({**got, "steps": torch.tensor([1, 3])}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(UserError, match="steps holds integers and differs"):
        run_merge(config, tmp_path / "other")
    assert not list(tmp_path.glob(".other*"))


def test_a_result_that_overflows_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """Finite options and models may give an infinite merge, in float32 or a narrower dtype."""
    for more in (
        {"weights": (1e30, 1e30), "options": {"scale": 1e30}},
        {"weights": (1e8, 1e8), "dtype": "float16"},
    ):
        with pytest.raises(UserError, match="the merged model.* holds NaN or infinity as float"):
            run_merge(config_of("task-arithmetic", models, **more), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("tail", ['{"model.norm.weight": {', '{"model.norm.weight": {}}', "\0\0\0\n"])
def test_a_cut_line_of_the_journal_is_dropped(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: str
) -> None:
    """A merge goes on after a last line that is cut, unterminated or zeros, and ends as a fresh one."""
    monkeypatch.setattr(merging, "SYNC_BYTES", 1)
    real = merging.merge_tensor
    journal = tmp_path / ".out.merge" / "journal.jsonl"

    def stop_after(count: int) -> None:
        left = iter(range(count))

        def some(*given: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*given)

        monkeypatch.setattr(merging, "merge_tensor", some)
        with pytest.raises(KeyboardInterrupt):
            run_merge(config_of("linear", models), tmp_path / "out", threads=1)
        with journal.open("a") as file:
            file.write(tail)

    stop_after(3)
    stop_after(3)
    lines = journal.read_text().splitlines()
    assert sum(len(json.loads(line)) for line in lines[1:-1]) == 6
    monkeypatch.setattr(merging, "merge_tensor", real)
    run_merge(config_of("linear", models), tmp_path / "out")
    run_merge(config_of("linear", models), tmp_path / "fresh")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "fresh"))
    assert first == second


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_wider_result_is_computed_in_its_dtype(
    method: str, dtype: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """bfloat16 models, a wider result: the same bytes as of the models stored in float32, rounded once."""
    wide: dict[str, Path] = {}
    for name, path in models.items():
        narrow = {
            key: tensor.to(torch.bfloat16) for key, tensor in load_file(path / "model.safetensors").items()
        }
        wide[name] = tmp_path / f"wide-{name}"
        shutil.copytree(path, wide[name])
        save_file({key: tensor.float() for key, tensor in narrow.items()}, wide[name] / "model.safetensors")
        save_file(narrow, path / "model.safetensors")
    run_merge(config_of(method, models, dtype=dtype), tmp_path / "narrow")
    run_merge(config_of(method, wide), tmp_path / "wide")
    got, wanted = tensors(tmp_path / "narrow"), tensors(tmp_path / "wide")
    kind = getattr(torch, dtype)
    assert all(tensor.dtype == kind for tensor in got.values())
    # SLERP's angle follows from dot products, whose last bit depends on memory alignment.
    ulp = torch.finfo(kind).eps if method == "slerp" else 0.0
    for name in wanted:
        largest = float(wanted[name].abs().max())
        torch.testing.assert_close(got[name], wanted[name].to(kind), rtol=0, atol=ulp * largest)
    # It holds numbers that bfloat16 has not.
    assert any(not torch.equal(tensor.to(torch.bfloat16).to(kind), tensor) for tensor in got.values())
    assert read_json(tmp_path / "narrow" / "config.json")["dtype"] == dtype
