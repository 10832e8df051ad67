"""Feed-forward experts agree with a loop over tokens, with transformers, and with finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koine.model.config import Activation
from koine.model.moe import experts as experts_module
from koine.model.moe.experts import Assignments, assign_top_k, feed_forward_experts


@pytest.fixture(params=["grouped", "each"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts in one grouped matmul, where torch takes the dtype and sizes, or one at a time."""
    monkeypatch.setattr(experts_module, "GROUPED_ROWS", 1e9 if request.param == "grouped" else -1)


def inputs(
    tokens: int = 23,
    experts: int = 5,
    k: int = 2,
    hidden: int = 8,
    width: int = 6,
    dtype: Any = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Assignments]:
    x = torch.randn(tokens, hidden, dtype=dtype)
    w_in = torch.randn(experts, 2 * width, hidden, dtype=dtype)
    w_out = torch.randn(experts, hidden, width, dtype=dtype)
    return x, w_in, w_out, assign_top_k(torch.randn(tokens, experts, dtype=dtype).softmax(-1), k)


def loop_over_tokens(x: Tensor, w_in: Tensor, w_out: Tensor, assigned: Assignments) -> Tensor:
    rows = []
    for token in range(len(x)):
        output = torch.zeros_like(x[0])
        for expert, gate in zip(assigned.experts[token].tolist(), assigned.gates[token], strict=True):
            half, up = (w_in[expert] @ x[token]).chunk(2)
            output = output + gate * (w_out[expert] @ (F.silu(half) * up))
        rows.append(output)
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 23])
def test_equals_a_loop_over_tokens(tokens: int, k: int) -> None:
    x, w_in, w_out, assigned = inputs(tokens=tokens, k=k)
    leaves = [part.requires_grad_() for part in (x, w_in, w_out, assigned.gates)]
    results = []
    for function in (feed_forward_experts, loop_over_tokens):
        y = function(x, w_in, w_out, assigned)
        weights = torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()
        results.append((y, torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert torch.allclose(ours, theirs, atol=1e-12)
    for got, wanted in zip(our_gradients, their_gradients, strict=True):
        assert got is not None
        assert torch.allclose(got, torch.zeros_like(got) if wanted is None else wanted, atol=1e-12)


def with_counts(
    counts: list[int], hidden: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Assignments]:
    """One expert a token, so many tokens each, in random order."""
    numbers = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    tokens = len(numbers)
    x = torch.randn(tokens, hidden).to(dtype)
    w_in = (torch.randn(len(counts), 2 * width, hidden) / hidden**0.5).to(dtype)
    w_out = (torch.randn(len(counts), hidden, width) / width**0.5).to(dtype)
    return x, w_in, w_out, Assignments(numbers[torch.randperm(tokens), None], torch.rand(tokens, 1).to(dtype))


def in_float64(
    x: Tensor, w_in: Tensor, w_out: Tensor, assigned: Assignments, grad: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients in float64, which all others are compared with."""
    leaves = [part.detach().double().requires_grad_() for part in (x, w_in, w_out, assigned.gates)]
    output = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(len(w_in)):
        rows, place = torch.where(assigned.experts == expert)
        half, up = (leaves[0][rows] @ leaves[1][expert].t()).chunk(2, dim=1)
        part = (F.silu(half) * up) @ leaves[2][expert].t() * leaves[3][rows, place, None]
        output = output.index_add(0, rows, part)
    return output, list(torch.autograd.grad(output, leaves, grad.double()))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "width"), [(48, 32), (19, 37), (257, 300)])
@pytest.mark.parametrize(
    "counts",
    [
        [1, 2, 3],
        [4, 6, 7, 8],
        [16, 17, 0, 33],
        [64, 48, 65, 5],
        [200, 190, 210],
        [400, 3, 90],
        [130, 256, 100],
        [31] * 6,
    ],
)
def test_few_and_many_tokens_of_an_expert(
    counts: list[int], hidden: int, width: int, dtype: torch.dtype
) -> None:
    """Every number of rows, and sizes that are no multiple of a vector's.

    float32: sums of some hundred numbers of about 1 in another order. bfloat16: up to a dozen roundings to 1
    in 512 on the way.
    """
    x, w_in, w_out, assigned = with_counts(counts, hidden, width, dtype)
    grad = torch.randn(x.shape).to(dtype)
    wanted, gradients = in_float64(x, w_in, w_out, assigned, grad)
    leaves = [part.requires_grad_() for part in (x, w_in, w_out, assigned.gates)]
    y = feed_forward_experts(x, w_in, w_out, assigned)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    tolerance = 2e-6 if dtype == torch.float32 else 2**-6
    for got, right in zip(found, [wanted, *gradients], strict=True):
        assert got.dtype == dtype
        assert (got.double() - right).abs().max() <= tolerance * right.abs().max()
    with torch.no_grad():
        read = feed_forward_experts(x, w_in, w_out, assigned)
    assert (read.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(
    ("counts", "instructions", "float32"),
    [
        ([150, 20, 0, 90], {"avx512_bf16"}, True),
        ([5, 20, 0, 9], {"avx512_bf16"}, False),
        ([5, 20, 0, 9], set(), True),
        ([0, 1, 0, 0], set(), False),
    ],
)
def test_bfloat16_is_computed_in_float32_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, counts: list[int], instructions: set[str], float32: bool
) -> None:
    """With slow instructions for many rows, without instructions for all but a single token."""
    monkeypatch.setattr(experts_module, "bfloat16_is_fast", lambda: False)
    monkeypatch.setattr(experts_module, "processor_flags", lambda: instructions)
    x, w_in, w_out, assigned = with_counts(counts, 40, 56, torch.bfloat16)
    grad = torch.randn(x.shape).bfloat16()
    wanted, gradients = in_float64(x, w_in, w_out, assigned, grad)
    leaves = [part.requires_grad_() for part in (x, w_in, w_out, assigned.gates)]
    y = feed_forward_experts(x, w_in, w_out, assigned)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    for got, right in zip(found, [wanted, *gradients], strict=True):
        assert got.dtype == torch.bfloat16
        # One rounding to 1 in 512 at the end where all is float32, several on the way otherwise.
        assert (got.double() - right).abs().max() <= (2**-8 if float32 else 2**-6) * right.abs().max()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (3,), (0, 2)])
@pytest.mark.parametrize("counts", [[3, 20, 0], [100, 130, 90]])
def test_only_requested_gradients_are_computed(
    monkeypatch: pytest.MonkeyPatch, counts: list[int], asked: tuple[int, ...]
) -> None:
    x, w_in, w_out, assigned = with_counts(counts, 32, 24, torch.float32)
    grad = torch.randn(x.shape)
    _, gradients = in_float64(x, w_in, w_out, assigned, grad)
    weights: list[Any] = []
    weight_gradient = experts_module._weight_gradient
    monkeypatch.setattr(
        experts_module,
        "_weight_gradient",
        lambda *given: weights.append(given[-1].shape) or weight_gradient(*given),
    )
    leaves = x, w_in, w_out, assigned.gates
    for number in asked:
        leaves[number].requires_grad_()
    torch.autograd.backward(feed_forward_experts(x, w_in, w_out, assigned), grad)
    assert set(weights) == {leaves[number].shape for number in asked if number in (1, 2)}
    for number, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (number in asked)
        if leaf.grad is not None:
            assert torch.allclose(leaf.grad.double(), gradients[number], atol=1e-4)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("counts", [[5, 9], [150, 130]])
def test_nan_stays_with_its_token_and_expert(counts: list[int]) -> None:
    """Its output is NaN, and its expert's gradient; other tokens and experts are not affected."""
    x, w_in, w_out, assigned = with_counts(counts, 32, 24, torch.float32)
    x[0] = float("nan")
    leaves = [part.requires_grad_() for part in (x, w_in, w_out)]
    y = feed_forward_experts(*leaves, assigned)
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()
    torch.autograd.backward(y.sum())
    for leaf in leaves[1:]:
        assert leaf.grad is not None
        assert leaf.grad[assigned.experts[0]].isnan().any()
        assert not leaf.grad[1 - assigned.experts[0]].isnan().any()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("counts", [[64, 40, 5], [200, 210, 190]])
def test_the_number_of_threads_changes_rounding_only(counts: list[int]) -> None:
    """torch splits its matmuls by threads, so that sums are in another order."""
    x, w_in, w_out, assigned = with_counts(counts, 80, 304, torch.float32)
    grad, found = torch.randn(x.shape), []
    leaves = [part.requires_grad_() for part in (x, w_in, w_out, assigned.gates)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = feed_forward_experts(x, w_in, w_out, assigned)
        found.append([y, *torch.autograd.grad(y, leaves, grad)])
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "dtype"), [(24, torch.bfloat16), (20, torch.bfloat16), (24, torch.float64)]
)
def test_the_cuda_path_agrees(width: int, dtype: torch.dtype) -> None:
    """On CPU tensors: torch's grouped matmul, and a matmul for each expert where it does not take them."""
    x, w_in, w_out, assigned = with_counts([5, 0, 9], 32, width, dtype)
    grad = torch.randn(x.shape).to(dtype)
    wanted, gradients = in_float64(x, w_in, w_out, assigned, grad)
    leaves = [part.requires_grad_() for part in (x, w_in, w_out, assigned.gates)]
    y = experts_module._cuda_experts(x, w_in, w_out, assigned.experts, assigned.gates, "silu")
    tolerance = 1e-12 if dtype == torch.float64 else 2**-5
    for got, right in zip([y, *torch.autograd.grad(y, leaves, grad)], [wanted, *gradients], strict=True):
        assert (got.double() - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.usefixtures("path")
def test_shapes_and_experts_that_do_not_fit_are_refused() -> None:
    x, w_in, w_out, assigned = with_counts([5, 9], 32, 24, torch.float32)
    for parts in ((x[:, :16], w_in, w_out), (x, w_in, w_out[..., :20]), (x, w_in[:1], w_out)):
        with pytest.raises(ValueError, match="do not fit"):
            feed_forward_experts(*parts, assigned)
    with pytest.raises(IndexError, match="expert 2 was assigned, and there are 2"):
        feed_forward_experts(x, w_in, w_out, Assignments(assigned.experts + 1, assigned.gates))


@pytest.mark.usefixtures("path")
def test_a_second_derivative_is_refused() -> None:
    x, w_in, w_out, assigned = with_counts([5, 9], 32, 24, torch.float32)
    y = feed_forward_experts(x.requires_grad_(), w_in, w_out, assigned)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(grad.sum())


def test_more_experts_than_16_bits_count() -> None:
    count = 2**16 + 10
    x, w_in, w_out = torch.randn(3, 2), torch.randn(count, 2, 2), torch.randn(count, 2, 1)
    assigned = Assignments(torch.tensor([[3], [2**16 + 3], [3]]), torch.ones(3, 1))
    assert torch.allclose(
        feed_forward_experts(x, w_in, w_out, assigned), loop_over_tokens(x, w_in, w_out, assigned), atol=1e-6
    )


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("counts", [[3, 20, 0], [200, 130, 90]])
def test_other_activations_equal_torch(activation: Activation, counts: list[int]) -> None:
    """Output, gradients, and inference in place, against autograd through torch's own activations."""
    x, w_in, w_out, assigned = with_counts(counts, 48, 32, torch.float64)
    grad = torch.randn(x.shape, dtype=torch.float64)
    leaves = [part.requires_grad_() for part in (x, w_in, w_out, assigned.gates)]
    functions = {"gelu_tanh": nn.GELU("tanh"), "gelu": nn.GELU(), "relu": nn.ReLU()}
    wanted = torch.zeros_like(x)
    for expert in range(len(w_in)):
        rows, place = torch.where(assigned.experts == expert)
        gate, up = (x[rows] @ w_in[expert].t()).chunk(2, dim=1)
        part = (functions[activation](gate) * up) @ w_out[expert].t() * assigned.gates[rows, place, None]
        wanted = wanted.index_add(0, rows, part)
    expected = [wanted, *torch.autograd.grad(wanted, leaves, grad)]
    y = feed_forward_experts(x, w_in, w_out, assigned, activation)
    for got, right in zip([y, *torch.autograd.grad(y, leaves, grad)], expected, strict=True):
        assert torch.allclose(got, right, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(feed_forward_experts(x, w_in, w_out, assigned, activation), wanted, atol=1e-12)
    by_device = experts_module._cuda_experts(x, w_in, w_out, assigned.experts, assigned.gates, activation)
    assert torch.allclose(by_device, wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tokens(dtype: torch.dtype) -> None:
    x, w_in, w_out, assigned = inputs(tokens=0, width=8, dtype=dtype)
    leaves = [part.requires_grad_() for part in (x, w_in, w_out, assigned.gates)]
    y = feed_forward_experts(x, w_in, w_out, assigned)
    assert y.shape == (0, 8)
    assert not any(part.any() for part in torch.autograd.grad(y.sum(), leaves))


def test_gradients_are_right_where_an_expert_has_no_tokens() -> None:
    x, w_in, w_out, assigned = inputs(tokens=4, experts=3, k=1, hidden=3, width=2)
    experts = torch.tensor([[0], [2], [2], [0]])
    assert torch.autograd.gradcheck(
        lambda x, w_in, w_out, gates: feed_forward_experts(x, w_in, w_out, Assignments(experts, gates)),
        tuple(part.requires_grad_() for part in (x, w_in, w_out, assigned.gates)),
    )


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_equals_transformers(dtype: torch.dtype, implementation: str) -> None:
    """float32 within 1e-6 of the largest entry (rounding in another order).

    bfloat16, where theirs rounds after every operation: within four units in the last place.
    """
    pytest.importorskip("transformers")
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = implementation
    theirs = MixtralExperts(config).to(dtype)
    x, w_in, w_out, assigned = inputs(tokens=64, experts=8, hidden=32, width=48, dtype=dtype)
    assigned = Assignments(assigned.experts, assigned.gates.to(dtype))
    with torch.no_grad():
        theirs.gate_up_proj.copy_(w_in)
        theirs.down_proj.copy_(w_out)
    grads = torch.randn(64, 32, dtype=dtype)
    x_theirs = x.clone().requires_grad_()
    wanted = theirs(x_theirs, assigned.experts, assigned.gates)
    wanted.backward(grads)
    leaves = [part.requires_grad_() for part in (x, w_in, w_out)]
    got = feed_forward_experts(x, w_in, w_out, assigned)
    got.backward(grads)  # type: ignore[no-untyped-call]
    pairs = [(got, wanted), (leaves[0].grad, x_theirs.grad), (leaves[1].grad, theirs.gate_up_proj.grad)]
    pairs.append((leaves[2].grad, theirs.down_proj.grad))
    for ours, other in pairs:
        assert ours is not None
        tolerance = 1e-6 if dtype == torch.float32 else 2**-6
        assert (ours - other).abs().max() <= tolerance * other.abs().max()


def test_gates_may_be_wider_than_the_tokens() -> None:
    x, w_in, w_out, assigned = inputs(dtype=torch.bfloat16)
    wide = Assignments(assigned.experts, assigned.gates.float().requires_grad_())
    y = feed_forward_experts(x, w_in.float(), w_out.float(), wide)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()  # type: ignore[no-untyped-call]
    assert wide.gates.grad is not None
    assert wide.gates.grad.dtype == torch.float32
