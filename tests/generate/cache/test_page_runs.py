"""Decode attention over runs of pages equals attention over the text at once."""

from __future__ import annotations

import pytest
import torch

from koine.generate.cache.contexts import DecodeContext, PrefillContext
from koine.generate.cache.page_runs import find_page_runs, runs_for_fused_kernel
from koine.generate.cache.paged_cache import PagedCache
from koine.model import Decoder, ModelConfig
from tests.generate.prompts import prompt_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("few", [0, 100], ids=["long runs only", "any runs"])
def test_attention_by_runs_equals_attention_by_slabs(
    tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch, few: int, dtype: torch.dtype
) -> None:
    """Sequences whose pages were taken in turn lie in several runs; one shares its beginning with another."""
    model = Decoder(tiny).to(dtype).eval()
    cache = PagedCache.of_model(model, page=4)
    texts = [prompt_of(size, size) for size in (29, 3, 160, 24)]
    sequences = [cache.add() for _ in texts]
    with torch.inference_mode():
        for start in range(0, 160, 8):
            for text, sequence in zip(texts, sequences, strict=True):
                if part := text[start : start + 8]:
                    context = PrefillContext(cache, [sequence], [len(part)])
                    model(torch.tensor([part]), context=context)
        texts.append(texts[3])
        sequences.append(cache.add(cache.prefix(sequences[3])))
        runs = find_page_runs(cache, sequences)
        assert [sum(run.pages for run in runs if run.row == row) for row in range(5)] == [8, 1, 40, 6, 6]
        assert len(runs) > 5
        monkeypatch.setattr("koine.generate.cache.page_runs.FEW_RUNS", few)
        assert runs_for_fused_kernel(cache, sequences) == (runs if few == 100 else [])
        new = torch.tensor([[7], [9], [11], [5], [13]])
        got = model(new, context=DecodeContext(cache, sequences))[:, 0].float()
        expected = [
            model(torch.tensor([[*text, int(token)]]))[0, -1].float()
            for text, token in zip(texts, new, strict=True)
        ]
    # Hidden states of the order of 1, summed in another order; bfloat16 has 8 bits, four layers of them.
    assert torch.allclose(got, torch.stack(expected), atol=1e-5 if dtype == torch.float32 else 0.1)
