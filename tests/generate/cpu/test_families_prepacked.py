"""Every family prepacked: hidden states and logits are those of `Decoder.forward` without a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from koine.generate.cache.contexts import DecodeContext, PrefillContext
from koine.generate.cache.paged_cache import PagedCache
from koine.generate.cpu.prepacked_decoder import build_prepacked_decoder
from koine.generate.cpu.prepacked_linear import PrepackedLinear, TransposedLinear, can_prepack, prepack
from koine.model import Decoder, load_model
from tests.model.families.cases import CASES, Case, first_case, model_types
from tests.model.families.conftest import checkpoint as checkpoint

PREFILLED, LONGEST = 6, 30
"""Tokens of a prompt, and of a text: windows of 8 and 9 fill while decoding, then wrap."""

DENSE = tuple(
    kind
    for kind in model_types()
    if not {"num_experts", "num_local_experts"} & first_case(kind).fields().keys()
)
"""Mixtures go through `Decoder.forward`."""
FIXED = [case for case in CASES if not case.dynamic and case.model_type in DENSE]
"""With dynamic RoPE the cached keys keep the angles of their time: see tests/generate/test_dynamic_rope.py."""


@pytest.mark.parametrize("layout", [PrepackedLinear, TransposedLinear])
@pytest.mark.parametrize("case", FIXED, ids=str)
@torch.inference_mode()
def test_float32(
    case: Case,
    layout: type[torch.nn.Module],
    checkpoint: Callable[[Case, torch.dtype], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("koine.generate.cpu.prepacked_linear.best_layout", lambda dtype: layout)
    for got, expected in decoded(checkpoint(case, torch.float32)):
        # The same sums in another order.
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", [first_case(kind) for kind in DENSE], ids=str)
@torch.inference_mode()
def test_bfloat16(case: Case, checkpoint: Callable[[Case, torch.dtype], Path]) -> None:
    for got, expected in decoded(checkpoint(case, torch.bfloat16)):
        # Rounded to 8 bits after other operations.
        assert (got - expected).float().norm() <= 0.05 * expected.float().norm()


def decoded(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Return logits of texts decoded alone and together, each beside those without a cache."""
    model = load_model(folder).eval()
    assert isinstance(model, Decoder)
    if not can_prepack(model):
        pytest.skip("this processor or build of torch packs no such weights")
    texts = torch.randint(3, model.config.vocab_size, (3, LONGEST))
    expected = model.logits(model(texts))[:, PREFILLED - 1 :]
    forward = build_prepacked_decoder(prepack(model))
    assert forward is not None
    pairs = []
    for rows in (1, 3):
        cache = PagedCache.of_model(model, page=4)
        sequences = [cache.add() for _ in range(rows)]
        hidden = forward(
            texts[:rows, :PREFILLED].flatten(), PrefillContext(cache, sequences, [PREFILLED] * rows)
        )
        steps, last = [hidden.view(rows, PREFILLED, -1)[:, -1]], None
        for place in range(PREFILLED, LONGEST):
            last = DecodeContext(cache, sequences, last)
            steps.append(forward(texts[:rows, place], last))
        pairs.append((model.logits(torch.stack(steps, dim=1)), expected[:rows]))
    return pairs
