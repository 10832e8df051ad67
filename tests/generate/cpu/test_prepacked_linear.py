"""A packed model computes what it did before packing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from koine.generate import generate
from koine.generate.cpu.prepacked_linear import (
    PrepackedLinear,
    TransposedLinear,
    best_layout,
    can_prepack,
    prepack,
)
from koine.generate.sampling import Sampling
from koine.hardware import is_intel
from koine.model import Decoder, ModelConfig


@pytest.mark.parametrize("layout", [PrepackedLinear, TransposedLinear])
@pytest.mark.parametrize("tied", [True, False])
def test_prepacking_keeps_logits_and_text(
    tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch, tied: bool, layout: type[torch.nn.Module]
) -> None:
    monkeypatch.setattr("koine.generate.cpu.prepacked_linear.best_layout", lambda dtype: layout)
    model = Decoder(replace(tiny, tie_embeddings=tied)).eval()
    if not can_prepack(model):
        pytest.skip("this build of torch packs no weights")
    ids, prompts = torch.randint(6, 98, (2, 33)), [[5, 9, 12], [7] * 20]
    with torch.inference_mode():
        before = model.logits(model(ids))
    written = [one.tokens for one in generate(model, prompts, Sampling(max_new_tokens=30, temperature=0))]
    assert prepack(model) is model
    with torch.inference_mode():
        # float32, summed in another order: logits here are of the order of 1.
        assert (model.logits(model(ids)) - before).abs().max() <= 1e-5
    assert [
        one.tokens for one in generate(model, prompts, Sampling(max_new_tokens=30, temperature=0))
    ] == written
    # The matrices are not held twice: what is left as parameters is the embedding and the norms.
    left = {name for name, _ in model.named_parameters()}
    assert left == {"embedding.weight", "norm.weight", *(f"blocks.{index}.norm.weight" for index in range(4))}


def test_prepacked_bfloat16_is_as_close_to_float32(tiny: ModelConfig) -> None:
    model = Decoder(tiny).bfloat16().eval()
    if not can_prepack(model):
        pytest.skip("this processor or build of torch packs no bfloat16")
    exact, ids = Decoder(tiny).eval(), torch.randint(6, 98, (2, 33))
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    with torch.inference_mode():
        truth = exact.logits(exact(ids))
        before = (model.logits(model(ids)).float() - truth).square().mean().sqrt()
        after = (prepack(model).logits(model(ids)).float() - truth).square().mean().sqrt()
    assert after <= 2 * before


@pytest.mark.parametrize(
    ("processor", "dtype", "layout"),
    [
        ("Intel(R) Xeon(R) Processor", torch.float32, TransposedLinear),
        ("Intel(R) Xeon(R) Processor", torch.bfloat16, PrepackedLinear),
        ("AMD EPYC", torch.float32, PrepackedLinear),
        ("Neoverse-V2", torch.float32, PrepackedLinear),
    ],
)
def test_the_layout_is_the_processor_s(
    monkeypatch: pytest.MonkeyPatch, processor: str, dtype: torch.dtype, layout: type[torch.nn.Module]
) -> None:
    monkeypatch.setattr("koine.hardware.processor_name", lambda: processor)
    is_intel.cache_clear()
    assert best_layout(dtype) is layout
    is_intel.cache_clear()
