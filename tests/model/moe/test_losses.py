"""Router losses: their formulas, their weight in the objective, and the totals of a step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from koine.model import Decoder, load_model
from koine.model.config import MixtureConfig
from koine.model.moe.experts import assign_top_k
from koine.model.moe.losses import (
    count_step,
    load_balancing_loss,
    router_loss,
    router_z_loss,
    use_totals,
)
from koine.model.moe.routers import Routing
from koine.train import LanguageModelling, SupervisedFineTuning, TrainSettings, train
from koine.train.distributed import Ranks
from koine.train.optimiser import Optimiser
from tests.train.fakes import FakeBatch, FakeOrder, fake_order
from tests.train.models import small_config, small_model

MIXTURE = MixtureConfig(
    experts=("a", "b", "c"), attention="kv-experts", load_balancing=0.02, z_loss=0.003, top_k=2
)


def mixture_model(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(replace(small_config(), mixture=MIXTURE))


def test_losses_in_closed_form_and_beside_transformers() -> None:
    """transformers divides the assignments by the tokens, so its loss is `k` times ours."""
    even = torch.full((12, 4), 0.25)
    experts = torch.arange(12)[:, None] % 4
    assert float(load_balancing_loss(even, experts)) == pytest.approx(1.0)
    sure = F.one_hot(torch.zeros(12, dtype=torch.long), 4).float()
    assert float(load_balancing_loss(sure, torch.zeros(12, 1, dtype=torch.long))) == pytest.approx(4.0)
    assert float(router_z_loss(torch.zeros(5, 4))) == pytest.approx(float(torch.tensor(4.0).log() ** 2))
    counted = torch.tensor([True] * 6 + [False] * 6)
    mixed = torch.cat((even[:6], sure[:6]))
    assert float(load_balancing_loss(mixed, experts, counted)) == pytest.approx(1.0)
    assert float(router_z_loss(torch.zeros(2, 4), torch.tensor([False, False]))) == 0.0
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(40, 4)
    probabilities = logits.softmax(-1)
    theirs = modeling.load_balancing_loss_func((logits,), num_experts=4, top_k=2)
    ours = load_balancing_loss(probabilities, assign_top_k(probabilities, 2).experts)
    assert float(theirs) == pytest.approx(2 * float(ours), rel=1e-5)


def test_router_loss_by_hand() -> None:
    """`L_LB = N sum f_i P_i` and `L_z = mean(logsumexp^2)`, summed over layers, without padding."""
    logits = torch.randn(1, 4, 3)
    probabilities = logits.softmax(-1)
    experts = probabilities.topk(2, dim=-1).indices
    attention = torch.randn(1, 4, 3)
    counted = torch.tensor([[True, True, True, False]])
    routing = Routing(logits, probabilities, experts, attention)
    loss, metrics = router_loss([routing, routing], MIXTURE, counted)
    share = torch.tensor([float((experts[0, :3] == expert).sum()) / 6 for expert in range(3)])
    balance = 3 * float((share * probabilities[0, :3].mean(0)).sum())
    z = sum(float(one[0, :3].exp().sum(-1).log().square().mean()) for one in (logits, attention))
    assert metrics["load_balancing_loss"] == pytest.approx(balance, rel=1e-5)
    assert metrics["router_z_loss"] == pytest.approx(z, rel=1e-5)
    assert float(loss) == pytest.approx(2 * (0.02 * balance + 0.003 * z), rel=1e-5)


def test_the_objective_adds_the_losses_to_the_mean_of_units(tmp_path: Path) -> None:
    model = mixture_model()
    batch = fake_order(tmp_path, steps=(1,)).batch(0)
    with_losses, metrics = LanguageModelling()(model, batch)
    model.config = replace(model.config, mixture=replace(MIXTURE, load_balancing=0.0, z_loss=0.0))
    without, _ = LanguageModelling()(model, batch)
    units = metrics["units"]
    expected = 2 * (0.02 * metrics["load_balancing_loss"] / units + 0.003 * metrics["router_z_loss"] / units)
    assert float(with_losses - without) / units == pytest.approx(expected, rel=1e-3)


def test_training_reports_the_losses_and_learns(tmp_path: Path) -> None:
    settings = TrainSettings(dtype="bfloat16", threads=1, learning_rate=1e-2, schedule="constant")
    train(
        mixture_model(),
        LanguageModelling(),
        fake_order(tmp_path / "s", steps=(12,)),
        settings,
        out=tmp_path / "out",
        progress=False,
        device="cpu",
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    # 1 where every expert has the same share and the same probability; 3 where one has all.
    assert all(0.9 < line["load_balancing_loss"] < 3.0 for line in lines)
    before, after = mixture_model(), load_model(tmp_path / "out")
    for name, parameter in after.named_parameters():
        assert not torch.equal(parameter, before.get_parameter(name)), name


# -- totals of a step --------------------------------------------------------------------------------------


def padded(folder: Path, **sizes: int) -> PaddedOrder:
    """Return rows with different numbers of tokens and of targets."""
    return PaddedOrder(fake_order(folder, steps=(2,), batch_size=8, **sizes).mixture)


class PaddedOrder(FakeOrder):
    def batch(
        self, step: int, *, rank: int = 0, world_size: int = 1, micro_batch: slice | None = None
    ) -> FakeBatch:
        found = super().batch(step)
        time = found.tokens.shape[1]
        # Row r has 2 (r + 1) tokens; the last row has no target, and row 0 has the fewest tokens.
        lengths = torch.arange(1, len(found.tokens) + 1)[:, None] * 2
        ids = torch.where(torch.arange(time)[None] < lengths, 0, -1)
        targets = found.targets.masked_fill(ids < 0, -100)
        targets[-1] = -100
        share = len(ids) // world_size
        keep = list(range(share * rank, share * (rank + 1))[micro_batch or slice(None)])
        return FakeBatch(found.tokens[keep], targets[keep], ids[keep], [found.documents[row] for row in keep])


def gradients_of_a_step(
    folder: Path, micro: int, mixture: MixtureConfig
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the gradients that the optimiser gets in the first step, and its metrics."""
    seen: list[dict[str, torch.Tensor]] = []

    class RecordingOptimiser(Optimiser):
        def step(self, learning_rate: float) -> None:
            seen.append(
                {name: one.grad.clone() for name, one in self.masters.items() if one.grad is not None}
            )
            super().step(learning_rate)

    torch.manual_seed(0)
    model = Decoder(replace(small_config(), mixture=mixture))
    # Sharp routers: the load is uneven, and different in every row.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.mul_(100.0 if name.endswith("router.weight") else 2.0)
    settings = TrainSettings(dtype="float32", threads=1, micro_batch_size=micro, clip_norm=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("koine.train.loop.Optimiser", RecordingOptimiser)
        out = folder / f"out-{micro}"
        train(
            model, LanguageModelling(), padded(folder / "s"), settings, out=out, progress=False, device="cpu"
        )
    return seen[0], json.loads((out / "metrics.jsonl").read_text().splitlines()[0])


MIXTURES = {
    "btx": MixtureConfig(experts=("a", "b", "c"), load_balancing=0.5, z_loss=0.05, top_k=2),
    "bam": replace(MIXTURE, load_balancing=0.5, z_loss=0.05),
    "nexus": MixtureConfig(
        experts=("a", "b", "c"), shared_expert=True, domain_size=6, load_balancing=0.5, z_loss=0.05
    ),
}


@pytest.mark.parametrize("method", MIXTURES)
def test_micro_batches_change_rounding_only(tmp_path: Path, method: str) -> None:
    """float32: the same sums in another order, 1e-5 of the largest entry of each gradient.

    When each micro batch balanced its own load, router gradients were off by 30 %.
    """
    whole, expected_metrics = gradients_of_a_step(tmp_path, 0, MIXTURES[method])
    assert expected_metrics["load_balancing_loss"] > 1.03  # away from 1, where the shares do not matter
    for micro in (1, 2, 3, 4, 8):
        found, metrics = gradients_of_a_step(tmp_path, micro, MIXTURES[method])
        assert found.keys() == whole.keys()
        for name, gradient in found.items():
            bound = 1e-5 * float(whole[name].abs().max())
            assert torch.allclose(gradient, whole[name], rtol=0, atol=bound), (micro, name)
        for name in ("loss", "load_balancing_loss", "router_z_loss", "gradient_norm"):
            assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-5), (micro, name)


def test_micro_batches_sum_to_the_router_loss_of_the_step(tmp_path: Path) -> None:
    """Divided by the units, it is the router loss of all tokens at once."""
    order = padded(tmp_path)
    model = mixture_model()
    routings: list[Routing] = []
    batch = order.batch(0)
    model(batch.tokens, document_ids=batch.document_ids, routings=routings)
    assert batch.document_ids is not None
    expected, _ = router_loss(routings, MIXTURE, batch.document_ids >= 0)
    parts = [order.batch(0, micro_batch=slice(row, row + 1)) for row in range(8)]
    totals = count_step(model, LanguageModelling(), parts, len(parts), Ranks(0, 1, torch.device("cpu")))
    assert totals is not None
    assert (totals.tokens, totals.units) == (
        16 + 14 + 12 + 10 + 8 + 6 + 4 + 2,
        float((batch.targets != -100).sum()),
    )
    total = 0.0
    with use_totals(totals):
        for part in parts:
            with_losses, _ = LanguageModelling()(model, part)  # type: ignore[arg-type]
            model.config = replace(model.config, mixture=replace(MIXTURE, load_balancing=0.0, z_loss=0.0))
            without, _ = LanguageModelling()(model, part)  # type: ignore[arg-type]
            model.config = replace(model.config, mixture=MIXTURE)
            total += float((with_losses - without).detach())
    assert total / totals.units == pytest.approx(float(expected.detach()), rel=1e-4)


def test_a_dense_model_needs_no_totals(tmp_path: Path) -> None:
    """No second forward pass without experts, or with one micro batch."""

    def refused(*_: object) -> None:
        raise AssertionError

    alone = Ranks(0, 1, torch.device("cpu"))
    assert count_step(mixture_model(), refused, [1], 1, alone) is None  # type: ignore[arg-type]
    totals = count_step(small_model(), refused, [1, 2], 2, alone)  # type: ignore[arg-type]
    assert totals is not None
    assert totals.assignments is None


def test_a_micro_batch_without_completion_is_no_error(tmp_path: Path) -> None:
    """Only a step without any completion is refused, whatever the size of its micro batches."""
    settings = TrainSettings(dtype="float32", threads=1, micro_batch_size=1)
    for model in (small_model(), mixture_model()):
        out = tmp_path / type(model.blocks[0]).__name__
        train(
            model, SupervisedFineTuning(), padded(tmp_path / "s"), settings, out=out, progress=False,
            device="cpu",
        )  # fmt: skip
        assert (out / "training.json").exists()
