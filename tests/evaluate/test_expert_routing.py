"""Routing shares of routers that send everything to one expert, or to all alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from koine.errors import UserError
from koine.evaluate.expert_routing import routing_blocks, routing_shares
from koine.model import Decoder
from koine.model.config import MixtureConfig
from koine.plan.report.blocks import check_block
from koine.tokenizer import load_tokenizer
from tests.combine.models import small_config, write_branches


def test_shares_are_those_of_the_routers(tmp_path: Path) -> None:
    write_branches(tmp_path, ())
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    mixture = MixtureConfig(experts=("a", "b", "c"), attention="kv-experts")
    model = Decoder(replace(small_config(), mixture=mixture)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.experts.router.weight.zero_()
            block.attention_experts.router.weight.zero_()
    shares = routing_shares(model, tokenizer, ["ein Text", "und noch ein Text"])
    assert shares.tokens == 2 + len(tokenizer.encode("ein Text")) + len(tokenizer.encode("und noch ein Text"))
    assert torch.allclose(shares.probability, torch.full((4, 3), 1 / 3, dtype=torch.float64))
    assert shares.attention is not None
    assert torch.allclose(shares.attention, torch.full((4, 3), 1 / 3, dtype=torch.float64))
    assert torch.allclose(shares.chosen.sum(-1), torch.ones(4, dtype=torch.float64))
    # The router's weight for expert 2 is the input of the first token, scaled up: that token goes to it.
    seen: list[torch.Tensor] = []
    handle = model.blocks[1].norm.register_forward_hook(lambda _, __, out: seen.append(out))
    routing_shares(model, tokenizer, ["ein Text"])
    handle.remove()
    with torch.no_grad():
        model.blocks[1].experts.router.weight[2] = 1e4 * seen[0][0, 0]
    only = routing_shares(model, tokenizer, ["ein Text"], max_tokens=1)
    assert only.tokens == 1
    assert only.chosen[1].tolist() == [0.0, 0.0, 1.0]
    assert float(only.probability[1, 2]) == pytest.approx(1.0)
    for block in routing_blocks({"routing": {"one": shares.to_json(), "two": only.to_json()}}):
        check_block(block, "here")


def test_a_dense_model_routes_nothing(tmp_path: Path) -> None:
    write_branches(tmp_path, ())
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="the model is dense"):
        routing_shares(Decoder(small_config()), tokenizer, ["ein Text"])
    mixture = Decoder(replace(small_config(), mixture=MixtureConfig(experts=("a",))))
    with pytest.raises(UserError, match="no text to route"):
        routing_shares(mixture, tokenizer, [])
