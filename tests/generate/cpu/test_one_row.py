"""The layout for one row computes what the matrix product does, whatever the number of parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from koine.generate.cpu import one_row
from koine.generate.cpu.one_row import OneRowWeight


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """A number of threads for the test alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("small", [0, 10**9], ids=["by inputs", "by outputs"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(48, 30), (7, 36), (5, 7)])
def test_products(
    monkeypatch: pytest.MonkeyPatch, threads: int, small: int, biased: bool, shape: tuple[int, int]
) -> None:
    """Written, and added with a factor. The last shape has no divisor but 1."""
    monkeypatch.setattr(one_row, "SMALL", small)
    monkeypatch.setattr(one_row, "SMALLEST_PART", 1)
    weight, x = torch.randn(shape), torch.randn(1, shape[1])
    bias = torch.randn(shape[0]) if biased else None
    layout = OneRowWeight(weight, bias)
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    out, stream = torch.full((1, shape[0]), torch.nan), torch.randn(1, shape[0])
    added = stream.double() + 0.3 * expected
    for operation in (*layout.write(x, out), *layout.add_to(x, stream, 0.3)):
        operation()
    for got, wanted in ((out, expected), (stream, added), (layout(x), expected)):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
