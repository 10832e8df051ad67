"""Merge methods against mergekit's recorded output, in closed form, and by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from koine.combine.merging import methods
from koine.combine.merging.methods import (
    METHODS,
    dare_linear,
    dare_ties,
    linear,
    model_stock,
    slerp,
    task_arithmetic,
    ties,
    trim_threshold,
)
from tests.combine.merge_configs import required_options
from tests.combine.merging.record_mergekit import CASES, NAMES

RECORDED = Path(__file__).parent / "recorded"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", [None, 37])
def test_equals_mergekit(case: str, block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 within 3e-7 of entries below 1: the same sums in another order. TIES keeps the same entries."""
    if block is not None:
        monkeypatch.setattr(methods, "BLOCK", block)
    inputs, wanted = load_file(RECORDED / "models.safetensors"), load_file(RECORDED / f"{case}.safetensors")
    about = CASES[case]
    name = about["merge_method"].replace("_", "-")
    method = METHODS[name]
    options: dict[str, Any] = {
        {"lambda": "scale"}.get(key, key): value for key, value in about.get("parameters", {}).items()
    }
    if method.takes("weights"):
        options["weights"] = about["weights"]
    if method.takes("generator"):
        options["generator"] = torch.Generator().manual_seed(0)
    for key, theirs in wanted.items():
        models = [inputs[f"{model}/{key}"] for model in (NAMES[1:3] if name == "slerp" else NAMES[1:])]
        if method.takes("base"):
            options["base"] = inputs[f"base/{key}"]
        ours = method.function(models, **options)
        assert (ours - theirs).abs().max() < 3e-7, key


@pytest.mark.parametrize("name", METHODS)
def test_a_merge_of_identical_models_is_the_model(name: str) -> None:
    method = METHODS[name]
    tensor, count = torch.randn(7, 5), 2
    options: dict[str, Any] = required_options(name)
    if method.takes("weights"):
        options["weights"] = (0.4, 0.6)
    if method.takes("base"):
        options["base"] = tensor.clone()
    if method.takes("generator"):
        options["generator"] = torch.Generator()
    assert torch.allclose(method.function([tensor] * count, **options), tensor, atol=1e-6)


def test_slerp_divides_the_angle_in_proportion() -> None:
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        at = slerp([first, second], t=t)
        assert torch.allclose(
            at, torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)]), atol=1e-6
        )
    near = second + 1e-4
    assert torch.allclose(slerp([second, near], t=0.5), (second + near) / 2)


def test_ties_by_hand() -> None:
    """Keep the two largest of each difference, elect the sign of their sum, average those that agree."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    first = base + torch.tensor([4.0, -2.0, 0.1, 0.0])
    second = base + torch.tensor([2.0, 3.0, 0.2, 0.0])
    # Kept: (4, -2) and (2, 3). Signs: +, +. First entry: (4 + 2) / 2; second: 3 alone.
    merged = ties([first, second], (1.0, 1.0), base, density=0.5)
    assert torch.allclose(merged, base + torch.tensor([3.0, 3.0, 0.0, 0.0]))
    summed = ties([first, second], (1.0, 1.0), base, density=0.5, normalize=False)
    assert torch.allclose(summed, base + torch.tensor([6.0, 3.0, 0.0, 0.0]))


@pytest.mark.parametrize("count", [1, 5, 1_000, 100_003])
@pytest.mark.parametrize("density", [1e-6, 0.1, 0.5, 0.999, 1.0])
def test_the_threshold_is_the_kth_magnitude(count: int, density: float) -> None:
    tensor, base = torch.randn(count) ** 3, torch.randn(count)
    kept = max(1, int(density * count))
    wanted = (tensor - base).abs().sort(descending=True).values[kept - 1]
    found = trim_threshold(tensor, base, density)
    assert found == (0.0 if density == 1.0 else float(wanted))
    # Many entries of one size, as bfloat16 has them.
    coarse = (tensor * 2).round()
    wanted = coarse.abs().sort(descending=True).values[kept - 1]
    assert trim_threshold(coarse, torch.zeros(count), density) == (0.0 if density == 1.0 else float(wanted))


def test_dare_keeps_its_share_and_its_expectation() -> None:
    base = torch.zeros(200_000)
    tensor = base + 1.0
    generator = torch.Generator().manual_seed(1)
    merged = dare_linear([tensor], (1.0,), base, density=0.25, generator=generator)
    kept = merged != 0
    # Five standard deviations of a binomial share.
    assert abs(float(kept.float().mean()) - 0.25) < 5 * (0.25 * 0.75 / 200_000) ** 0.5
    assert torch.allclose(merged[kept], torch.tensor(4.0))
    again = dare_linear([tensor], (1.0,), base, density=0.25, generator=torch.Generator().manual_seed(1))
    assert torch.equal(merged, again)
    agreeing = dare_ties([tensor, -tensor], (2.0, 1.0), base, density=1.0, generator=generator)
    assert torch.allclose(agreeing, torch.tensor(2.0))


def test_task_arithmetic_and_linear_agree_where_weights_sum_to_one() -> None:
    base, tensors = torch.randn(50), [torch.randn(50) for _ in range(3)]
    weights = (0.2, 0.3, 0.5)
    assert torch.allclose(task_arithmetic(tensors, weights, base), linear(tensors, weights), atol=1e-6)
    assert torch.allclose(linear(tensors, (2.0, 3.0, 5.0)), linear(tensors, weights), atol=1e-6)
    assert torch.allclose(linear(tensors, (2.0, 0.0, 0.0), normalize=False), 2 * tensors[0])


def test_model_stock_in_closed_form() -> None:
    base = torch.zeros(4)
    a, b = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, -1.0, 0.0, 0.0])
    # Orthogonal differences: a share of 0. At 60 degrees: 2 * 0.5 / 1.5.
    assert torch.allclose(model_stock([a, b], base), base)
    c = torch.tensor([math.cos(math.pi / 3), math.sin(math.pi / 3), 0.0, 0.0])
    first = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert torch.allclose(model_stock([first, c], base), (first + c) / 2 * (2 / 3), atol=1e-6)
    assert torch.allclose(model_stock([first, -first], base), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_maths_are_float32_and_the_result_has_the_models_dtype(dtype: torch.dtype) -> None:
    tensors: list[Tensor] = [torch.randn(1000).to(dtype) for _ in range(4)]
    merged = linear(tensors, (1.0,) * 4)
    assert merged.dtype == dtype
    wide = torch.stack([tensor.double() for tensor in tensors]).mean(0)
    exact = 0.0 if dtype != torch.float64 else 1e-15
    if dtype == torch.float64:
        assert (merged - wide).abs().max() <= exact
    else:
        # One rounding, at the end.
        assert torch.equal(merged, wide.float().to(dtype))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_of_nearly_opposite_models_is_a_line(t: float) -> None:
    """At a cosine of -0.9999995 SLERP would divide by a sine of 0.001; it is linear there, as in mergekit."""
    first, second = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([-1.0, 1e-3, 0.0])
    assert torch.allclose(slerp([first, second], t=t), (1 - t) * first + t * second, atol=1e-7)


@pytest.mark.parametrize("cosine", [-0.999, -0.5, 0.0, 0.5, 0.999])
@pytest.mark.parametrize("sizes", [(1.0, 1.0), (2.0, 0.5)])
def test_slerp_in_closed_form(cosine: float, sizes: tuple[float, float]) -> None:
    """The arc is used up to nearly opposite models; norms are not interpolated apart."""
    angle, t = math.acos(cosine), 0.3
    first = sizes[0] * torch.tensor([1.0, 0.0], dtype=torch.float64)
    second = sizes[1] * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    wanted = (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)
    # At a cosine of 0.999 the sine loses three digits of sixteen.
    assert torch.allclose(slerp([first, second], t=t), wanted, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_tie_of_signs_is_positive(normalize: bool) -> None:
    """Of differences that cancel out, TIES and DARE-TIES take the positive ones, as mergekit does."""
    base = torch.zeros(3)
    tensors = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-1.0, 2.0, -3.0])]
    wanted = torch.tensor([1.0, 2.0, 3.0])
    options: dict[str, Any] = {"density": 1.0, "normalize": normalize}
    assert torch.equal(ties(tensors, (1.0, 1.0), base, **options), wanted)
    assert torch.equal(dare_ties(tensors, (1.0, 1.0), base, **options, generator=torch.Generator()), wanted)


def test_ties_with_a_negative_weight() -> None:
    """The sign of the weighted difference counts; the sum is divided by the weights that took part."""
    base = torch.zeros(1)
    two, one = torch.tensor([2.0]), torch.tensor([1.0])
    # 2 - 1 is positive: the first alone agrees.
    assert torch.equal(ties([two, one], (1.0, -1.0), base, density=1.0), two)
    assert torch.equal(ties([two, one], (1.0, -1.0), base, density=1.0, normalize=False), two)
    # -2 is all there is: divided by -1.
    assert torch.equal(ties([two], (-1.0,), base, density=1.0), two)
    assert torch.equal(ties([two], (-1.0,), base, density=1.0, normalize=False), -two)


def test_ties_keeps_entries_as_large_as_the_threshold() -> None:
    """Entries are kept by magnitude, those equal to the threshold too; the scale is on the difference."""
    base = torch.full((4,), 10.0)
    tensor = base + torch.tensor([-4.0, 2.0, -2.0, 1.0])
    wanted = base + 0.5 * torch.tensor([-4.0, 2.0, -2.0, 0.0])
    assert torch.equal(ties([tensor], (1.0,), base, density=0.5, scale=0.5), wanted)


def test_normalised_changes_are_divided_by_the_sum_of_the_weights() -> None:
    base = torch.full((3,), 10.0)
    tensors = [base + 1.0, base + 3.0]
    wanted = base + 2.0 * (0.5 * 1.0 + 1.5 * 3.0) / 2.0
    assert torch.allclose(task_arithmetic(tensors, (0.5, 1.5), base, scale=2.0, normalize=True), wanted)
    options: dict[str, Any] = {
        "density": 1.0,
        "scale": 2.0,
        "normalize": True,
        "generator": torch.Generator(),
    }
    assert torch.allclose(dare_linear(tensors, (0.5, 1.5), base, **options), wanted)
    # With TIES, by the weights of those that agree, which are both.
    assert torch.allclose(dare_ties(tensors, (0.5, 1.5), base, **options), wanted)
    # Weights of both signs: their sum, not that of their magnitudes.
    assert torch.allclose(linear(tensors, (2.0, -1.0)), 2 * tensors[0] - tensors[1])


def test_the_threshold_with_a_misleading_sample() -> None:
    """Every seventh entry is sampled and all large ones lie between: the wrong bracket is noticed."""
    count = 100_003
    tensor = torch.zeros(count)
    tensor[1::7] = torch.arange(1.0, len(tensor[1::7]) + 1)
    kept = int(0.1 * count)
    wanted = tensor.sort(descending=True).values[kept - 1]
    assert trim_threshold(tensor, torch.zeros(count), 0.1) == float(wanted)


def test_model_stock_of_models_that_pull_apart() -> None:
    base = torch.full((2,), 10.0)
    east = torch.tensor([1.0, 0.0])
    apart = torch.tensor([math.cos(2 * math.pi / 3), math.sin(2 * math.pi / 3)])
    # At 120 degrees: 2 * -0.5 / 0.5 = -2, away from the mean.
    wanted = -2.0 * (base + (east + apart) / 2) + 3.0 * base
    assert torch.allclose(model_stock([base + east, base + apart], base), wanted, atol=1e-5)
    # Opposite: no estimate, the base stays, though the mean is not the base.
    assert torch.equal(model_stock([base + east, base - 2 * east], base), base)
    # Three: the mean cosine of the three pairs, none of a model with itself.
    up = torch.tensor([0.0, 1.0])
    cosine = (0.0 + math.cos(2 * math.pi / 3) + math.cos(math.pi / 6)) / 3
    share = 3 * cosine / (1 + 2 * cosine)
    mean = base + (east + up + apart) / 3
    got = model_stock([base + east, base + up, base + apart], base)
    assert torch.allclose(got, share * mean + (1 - share) * base, atol=1e-5)
