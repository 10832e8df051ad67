"""Memory of a merge: blocks of some tensors, whatever the size of the model and the number of threads."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

from koine.combine.merging.budget import (
    LIBRARY_BYTES,
    RETAINED_BYTES,
    ByteBudget,
    estimate_merge,
    worker_count,
)
from koine.combine.merging.config import MergeConfig
from koine.combine.merging.methods import BLOCK
from koine.combine.merging.plan import plan_merge
from koine.model.formats.safetensors_stream import CheckpointWriter


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Merging two models of 200 MB takes less memory than half of one."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        layout = {f"layer.{number}": (torch.float32, (1024, 1024)) for number in range(50)}
        writer = CheckpointWriter(tmp_path / name, layout, max_shard_bytes=10**9)
        for number in range(50):
            writer.write(f"layer.{number}", torch.full((1024, 1024), float(number)))
        writer.close()
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from koine.combine import MergeConfig, run_merge\n"
        "folder = Path(sys.argv[1])\n"
        "config = MergeConfig(method='linear', models=(folder / 'a', folder / 'b'), weights=(0.5, 0.5))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run_merge(config, folder / 'out', threads=2)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = int(
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout
    )
    assert grown * 1024 < 100 * 2**20
    plan = plan_merge(
        MergeConfig(method="linear", models=(tmp_path / "a", tmp_path / "b"), weights=(0.5, 0.5))
    )
    assert estimate_merge(plan, 2).output_bytes == 50 * 4 * 2**20
    plan.close()


def test_rows_of_other_vocabularies_are_read_in_blocks(tmp_path: Path) -> None:
    """Merging two embeddings of 100 MB with opposite row orders takes less than half of one."""
    count = 25_600
    for index, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        writer = CheckpointWriter(
            tmp_path / name, {"embed_tokens.weight": (torch.float32, (count, 1024))}, max_shard_bytes=10**9
        )
        rows = torch.arange(float(count)) if not index else torch.arange(float(count)).flip(0)
        writer.write("embed_tokens.weight", rows[:, None].expand(count, 1024))
        writer.close()
        vocabulary = {f"t{int(row)}": place for place, row in enumerate(rows.tolist())}
        tokenizer = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": count}))
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from koine.combine import MergeConfig, run_merge\n"
        "folder = Path(sys.argv[1])\n"
        "config = MergeConfig(method='linear', models=(folder / 'a', folder / 'b'), weights=(0.5, 0.5),\n"
        "                     tokenizer='first', unrelated=True)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run_merge(config, folder / 'out', threads=2)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = 1024 * int(
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout
    )
    models = (tmp_path / "a", tmp_path / "b")
    plan = plan_merge(
        MergeConfig(method="linear", models=models, weights=(0.5, 0.5), tokenizer="first", unrelated=True)
    )
    assert grown < min(50 * 2**20, estimate_merge(plan, 2).peak_memory_bytes)
    plan.close()
    merged = load_file(tmp_path / "out" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(merged[:, 0], torch.arange(float(count)))


def test_workers_stay_within_the_byte_budget() -> None:
    """A job that does not fit waits; one larger than the whole budget waits until it is alone."""
    budget, held, most = ByteBudget(100), 0, 0
    lock = threading.Lock()

    def work(count: int) -> None:
        nonlocal held, most
        with budget.hold(count):
            with lock:
                held += count
                most = max(most, held if held > count else 0)
            time.sleep(0.002)
            with lock:
                held -= count

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [30, 60, 150, 40, 100, 10, 20] * 6))
    assert 0 < most <= 100
    assert held == 0


def test_passes_over_large_tensors_hold_blocks(tmp_path: Path) -> None:
    """TIES makes several passes over three tensors of 16 MB: a worker holds the result and blocks."""
    layout = {f"layer.{number}": (torch.float32, (2048, 2048)) for number in range(4)}
    for index, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        writer = CheckpointWriter(tmp_path / name, layout, max_shard_bytes=10**9)
        for number in range(4):
            generator = torch.Generator().manual_seed(100 * number + index)
            writer.write(f"layer.{number}", 1.0 + 0.1 * torch.randn(2048, 2048, generator=generator))
        writer.close()
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from koine.combine import MergeConfig, run_merge\nfolder = Path(sys.argv[1])\n"
        "config = MergeConfig(method='ties', models=(folder / 'a', folder / 'b'), base=folder / 'base',\n"
        "                     weights=(0.5, 0.5))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run_merge(config, folder / f'out-{sys.argv[2]}', threads=int(sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    config = MergeConfig(
        method="ties", models=(tmp_path / "a", tmp_path / "b"), base=tmp_path / "base", weights=(0.5, 0.5)
    )
    plan = plan_merge(config)
    each = plan.jobs["layer.0"].working_bytes
    assert each == 2048 * 2048 * 4 + BLOCK * 4 * (3 + 2 * 3 + 2)
    assert worker_count(plan, 2) == 2
    assert (
        estimate_merge(plan, 2).peak_memory_bytes - estimate_merge(plan, 1).peak_memory_bytes
        == each + RETAINED_BYTES
    )
    allowed = estimate_merge(plan, 2).peak_memory_bytes - LIBRARY_BYTES
    plan.close()
    grown = 1024 * int(
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), "2"], capture_output=True, text=True, check=True
        ).stdout
    )
    assert grown < allowed
