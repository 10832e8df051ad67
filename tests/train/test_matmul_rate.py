"""The rate of a matmul: plausible, and measurable for shapes that would not fit into memory."""

from __future__ import annotations

import torch

from koine.train.matmul_rate import measure_matmul_rate


def test_a_batch_of_a_large_model_is_timed_with_fewer_rows() -> None:
    # The whole left matrix would take 128 GiB.
    rate = measure_matmul_rate(2**23, 4096, 4096, torch.float32, "cpu", torch.get_num_threads(), 0.0)
    assert 1e8 < rate < 1e15
