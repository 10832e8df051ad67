"""FlexAttention and its block masks against a dense masked softmax, and against torch's own block masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from koine.model.attention.dispatch import document_starts_of
from koine.model.attention.flex import _window_mask, block_mask, flex_attend, visible
from tests.model.attention.test_dispatch import dense, inputs


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_attention_equals_the_dense_softmax(window: int | None, packed: bool) -> None:
    if window is None and not packed:
        pytest.skip("plain causal attention never goes through FlexAttention")
    documents = torch.tensor([[0] * 20 + [1] * 30 + [-1] * 14]) if packed else None
    starts = None if documents is None else document_starts_of(documents)
    q, k, v = (x.detach() for x in inputs(1, 64, 2, 2, torch.float32))
    heads = q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = flex_attend(*heads, window=window, document_starts=starts).transpose(1, 2).flatten(2)
    # float32, sums over at most 64 keys.
    assert torch.allclose(out, dense(q, k, v, window, documents), atol=1e-5)


@pytest.mark.parametrize("time", [1, 128, 300, 384, 513])
@pytest.mark.parametrize("window", [None, 1, 128, 130, 200])
@pytest.mark.parametrize("packed", [False, True])
def test_block_masks_equal_those_of_torch(time: int, window: int | None, packed: bool) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    starts = None
    if packed:
        documents = torch.randint(0, 6, (2, time)).sort(dim=1).values
        documents[0, time - time // 3 :] = -1
        starts = document_starts_of(documents)
    ours = block_mask(time, window, starts, torch.device("cpu"))
    batch = 2 if packed else None
    theirs = create_block_mask(visible(window, starts), batch, None, time, time, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    if time % 128 == 0:
        # Of a tile that reaches past the end torch says "in part"; for us it is whole if every position that
        # exists is seen.
        assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)


def test_a_cached_block_mask_from_inference_mode_can_be_trained_with() -> None:
    """The mask is cached, and tensors of inference mode cannot be saved for a backward pass."""
    _window_mask.cache_clear()
    with torch.inference_mode():
        mask = _window_mask(300, 5, torch.device("cpu"))
    tensors = [value for value in vars(mask).values() if isinstance(value, Tensor)]
    assert len(tensors) >= 8
    assert not any(tensor.is_inference() for tensor in tensors)
    _window_mask.cache_clear()
