"""The feed-forward experts beside a loop over tokens, beside transformers' own, and beside finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from koine.model.moe import cpu_grouped as sorted_experts
from koine.model.moe import cpu_kernels as compiled_experts
from koine.model.moe.experts import Chosen, choose, feed_forward_experts


@pytest.fixture(params=["compiled", "torch"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with what was compiled on this machine, once as on a machine without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(compiled_experts, "library", lambda source: None)
    else:
        request.getfixturevalue("compiled_here")


def inputs(
    tokens: int = 23,
    experts: int = 5,
    k: int = 2,
    hidden: int = 8,
    width: int = 6,
    dtype: Any = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Chosen]:
    x = torch.randn(tokens, hidden, dtype=dtype)
    into = torch.randn(experts, 2 * width, hidden, dtype=dtype)
    out = torch.randn(experts, hidden, width, dtype=dtype)
    return x, into, out, choose(torch.randn(tokens, experts, dtype=dtype).softmax(-1), k)


def one_by_one(x: Tensor, into: Tensor, out: Tensor, chosen: Chosen) -> Tensor:
    rows = []
    for token in range(len(x)):
        said = torch.zeros_like(x[0])
        for expert, gate in zip(chosen.experts[token].tolist(), chosen.gates[token], strict=True):
            half, up = (into[expert] @ x[token]).chunk(2)
            said = said + gate * (out[expert] @ (F.silu(half) * up))
        rows.append(said)
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 23])
def test_equals_a_loop_over_tokens(tokens: int, k: int) -> None:
    x, into, out, chosen = inputs(tokens=tokens, k=k)
    leaves = [part.requires_grad_() for part in (x, into, out, chosen.gates)]
    results = []
    for function in (feed_forward_experts, one_by_one):
        y = function(x, into, out, chosen)
        weights = torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()
        results.append((y, torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert torch.allclose(ours, theirs, atol=1e-12)
    for got, wanted in zip(our_gradients, their_gradients, strict=True):
        assert got is not None
        assert torch.allclose(got, torch.zeros_like(got) if wanted is None else wanted, atol=1e-12)


def with_counts(
    counts: list[int], hidden: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Chosen]:
    """One expert a token, so many tokens each, in random order."""
    numbers = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    tokens = len(numbers)
    x = torch.randn(tokens, hidden).to(dtype)
    into = (torch.randn(len(counts), 2 * width, hidden) / hidden**0.5).to(dtype)
    out = (torch.randn(len(counts), hidden, width) / width**0.5).to(dtype)
    return x, into, out, Chosen(numbers[torch.randperm(tokens), None], torch.rand(tokens, 1).to(dtype))


def in_float64(
    x: Tensor, into: Tensor, out: Tensor, chosen: Chosen, grad: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The answers and gradients that all others are rounded from."""
    leaves = [part.detach().double().requires_grad_() for part in (x, into, out, chosen.gates)]
    said = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(len(into)):
        rows, place = torch.where(chosen.experts == expert)
        half, up = (leaves[0][rows] @ leaves[1][expert].t()).chunk(2, dim=1)
        part = (F.silu(half) * up) @ leaves[2][expert].t() * leaves[3][rows, place, None]
        said = said.index_add(0, rows, part)
    return said, list(torch.autograd.grad(said, leaves, grad.double()))


@pytest.mark.usefixtures("products")
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
def test_few_and_many_tokens_an_expert(
    counts: list[int], hidden: int, width: int, dtype: torch.dtype
) -> None:
    """Every size of group, filled up or not, and sizes that are no multiple of a vector's. float32: sums of some hundred numbers of about 1 in another order;
    bfloat16: up to a dozen roundings to 1 in 512 on the way, which torch's products have."""
    x, into, out, chosen = with_counts(counts, hidden, width, dtype)
    grad = torch.randn(x.shape).to(dtype)
    wanted, gradients = in_float64(x, into, out, chosen, grad)
    leaves = [part.requires_grad_() for part in (x, into, out, chosen.gates)]
    y = feed_forward_experts(x, into, out, chosen)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    tolerance = 2e-6 if dtype == torch.float32 else 2**-6
    for got, right in zip(found, [wanted, *gradients], strict=True):
        assert got.dtype == dtype
        assert (got.double() - right).abs().max() <= tolerance * right.abs().max()
    with torch.no_grad():
        read = feed_forward_experts(x, into, out, chosen)
    assert (read.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("fast", [True, False])
def test_many_tokens_in_bfloat16_are_float32_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """The matrices pass through float32 in pieces of 2^19 numbers, of which the larger here has several."""
    monkeypatch.setattr(sorted_experts, "bfloat16_is_fast", lambda: fast)
    monkeypatch.setattr(sorted_experts, "WIDENED", 1_000)
    x, into, out, chosen = with_counts([150, 20, 0, 90], 40, 56, torch.bfloat16)
    grad = torch.randn(x.shape).bfloat16()
    wanted, gradients = in_float64(x, into, out, chosen, grad)
    leaves = [part.requires_grad_() for part in (x, into, out, chosen.gates)]
    y = feed_forward_experts(x, into, out, chosen)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    for got, right in zip(found, [wanted, *gradients], strict=True):
        assert got.dtype == torch.bfloat16
        # One rounding to 1 in 512 at the end where all is float32, several on the way otherwise.
        assert (got.double() - right).abs().max() <= (2**-6 if fast else 2**-8) * right.abs().max()


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("counts", [[3, 20, 0], [100, 130, 90]])
def test_gradients_that_are_not_asked_for_are_not_made(
    monkeypatch: pytest.MonkeyPatch, counts: list[int], asked: tuple[int, ...]
) -> None:
    parts = with_counts(counts, 32, 24, torch.float32)
    grad = torch.randn(parts[0].shape)
    _, gradients = in_float64(*parts, grad)
    made: list[Any] = []
    gradients_of = sorted_experts._gradients
    monkeypatch.setattr(
        sorted_experts, "_gradients", lambda *given: made.append(gradients_of(*given)) or made[0]
    )
    leaves = parts[:3]
    for number in asked:
        leaves[number].requires_grad_()
    torch.autograd.backward(feed_forward_experts(*parts), grad)
    assert [one is not None for one in made[0]] == [number in asked for number in range(3)]
    for number in range(3):
        got = leaves[number].grad
        assert (got is not None) == (number in asked)
        if got is not None:
            assert torch.allclose(got.double(), gradients[number], atol=1e-4)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("counts", [[5, 9], [150, 130]])
def test_what_is_not_a_number_stays_so(counts: list[int]) -> None:
    """Of one token alone, and of its expert: nothing is made a number, and no other token or expert hears of it, also where groups are filled up."""
    x, into, out, chosen = with_counts(counts, 32, 24, torch.float32)
    x[0] = float("nan")
    leaves = [part.requires_grad_() for part in (x, into, out)]
    y = feed_forward_experts(*leaves, chosen)
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()
    torch.autograd.backward(y.sum())
    for leaf in leaves[1:]:
        assert leaf.grad is not None
        assert leaf.grad[chosen.experts[0]].isnan().any()
        assert not leaf.grad[1 - chosen.experts[0]].isnan().any()


@pytest.mark.usefixtures("compiled_here")
def test_few_tokens_an_expert_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of up to 64, beside others, whatever torch's default dtype and device are."""
    rows: list[int] = []
    forward = compiled_experts.forward

    def counted(*given: Any, **options: Any) -> Any:
        rows.extend((given[4][:, 2] - given[4][:, 1]).tolist())
        return forward(*given, **options)

    monkeypatch.setattr(compiled_experts, "forward", counted)
    x, into, out, chosen = with_counts([64, 65, 0, 1], 32, 24, torch.float32)
    grad = torch.randn(x.shape)
    wanted, _ = in_float64(x, into, out, chosen, grad)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            y = feed_forward_experts(x.requires_grad_(), into, out, chosen)
            y.backward(grad)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rows == [64, 1]
    assert torch.allclose(y.double(), wanted, atol=1e-5)


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("counts", [[64, 40, 5], [200, 210, 190]])
def test_threads_change_no_number(counts: list[int]) -> None:
    """Each number is one thread's, summed in one order. The products of many rows are torch's, which split them otherwise."""
    x, into, out, chosen = with_counts(counts, 80, 300, torch.float32)
    grad, found = torch.randn(x.shape), []
    leaves = [part.requires_grad_() for part in (x, into, out, chosen.gates)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = feed_forward_experts(x, into, out, chosen)
        found.append([y, *torch.autograd.grad(y, leaves, grad)])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two) if max(counts) <= 64 else torch.allclose(one, two, atol=1e-4)


@pytest.mark.usefixtures("products")
def test_what_does_not_fit_is_refused() -> None:
    x, into, out, chosen = with_counts([5, 9], 32, 24, torch.float32)
    for parts in ((x[:, :16], into, out), (x, into, out[..., :20]), (x, into[:1], out)):
        with pytest.raises(ValueError, match="do not fit"):
            feed_forward_experts(*parts, chosen)
    with pytest.raises(IndexError, match="expert 2 was chosen of 2"):
        feed_forward_experts(x, into, out, Chosen(chosen.experts + 1, chosen.gates))


@pytest.mark.usefixtures("products")
def test_a_second_derivative_is_refused() -> None:
    x, into, out, chosen = with_counts([5, 9], 32, 24, torch.float32)
    y = feed_forward_experts(x.requires_grad_(), into, out, chosen)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(grad.sum())


def test_more_experts_than_a_16_bit_number_says() -> None:
    count = 2**16 + 10
    x, into, out = torch.randn(3, 2), torch.randn(count, 2, 2), torch.randn(count, 2, 1)
    chosen = Chosen(torch.tensor([[3], [2**16 + 3], [3]]), torch.ones(3, 1))
    assert torch.allclose(
        feed_forward_experts(x, into, out, chosen), one_by_one(x, into, out, chosen), atol=1e-6
    )


def test_no_tokens_are_no_work() -> None:
    x, into, out, chosen = inputs(tokens=0)
    leaves = [part.requires_grad_() for part in (x, into, out, chosen.gates)]
    y = feed_forward_experts(x, into, out, chosen)
    assert y.shape == (0, 8)
    assert not any(part.any() for part in torch.autograd.grad(y.sum(), leaves))


def test_gradients_are_right_where_an_expert_has_no_tokens() -> None:
    x, into, out, chosen = inputs(tokens=4, experts=3, k=1, hidden=3, width=2)
    experts = torch.tensor([[0], [2], [2], [0]])
    assert torch.autograd.gradcheck(
        lambda x, into, out, gates: feed_forward_experts(x, into, out, Chosen(experts, gates)),
        tuple(part.requires_grad_() for part in (x, into, out, chosen.gates)),
    )


def test_only_what_is_asked_for_is_differentiated() -> None:
    x, into, out, chosen = inputs()
    x.requires_grad_()
    feed_forward_experts(x, into, out, chosen).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_equals_transformers(dtype: torch.dtype, implementation: str) -> None:
    """float32 within 1e-6 of the largest (rounding in another order); in bfloat16, where theirs rounds after every operation, within four of its units in
    the last place."""
    pytest.importorskip("transformers")
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = implementation
    theirs = MixtralExperts(config).to(dtype)
    x, into, out, chosen = inputs(tokens=64, experts=8, hidden=32, width=48, dtype=dtype)
    chosen = Chosen(chosen.experts, chosen.gates.to(dtype))
    with torch.no_grad():
        theirs.gate_up_proj.copy_(into)
        theirs.down_proj.copy_(out)
    grads = torch.randn(64, 32, dtype=dtype)
    x_theirs = x.clone().requires_grad_()
    wanted = theirs(x_theirs, chosen.experts, chosen.gates)
    wanted.backward(grads)
    leaves = [part.requires_grad_() for part in (x, into, out)]
    got = feed_forward_experts(x, into, out, chosen)
    got.backward(grads)  # type: ignore[no-untyped-call]
    pairs = [(got, wanted), (leaves[0].grad, x_theirs.grad), (leaves[1].grad, theirs.gate_up_proj.grad)]
    pairs.append((leaves[2].grad, theirs.down_proj.grad))
    for ours, other in pairs:
        assert ours is not None
        tolerance = 1e-6 if dtype == torch.float32 else 2**-6
        assert (ours - other).abs().max() <= tolerance * other.abs().max()


def test_gates_may_be_wider_than_the_tokens() -> None:
    x, into, out, chosen = inputs(dtype=torch.bfloat16)
    wide = Chosen(chosen.experts, chosen.gates.float().requires_grad_())
    y = feed_forward_experts(x, into.float(), out.float(), wide)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()  # type: ignore[no-untyped-call]
    assert wide.gates.grad is not None
    assert wide.gates.grad.dtype == torch.float32
