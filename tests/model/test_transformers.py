"""What we save is Cohere2 or Cohere to `transformers`, and what it saves is a decoder to us."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from koine.errors import UserError
from koine.model import (
    CausalLM,
    Decoder,
    LayerSpec,
    ModelConfig,
    Sampling,
    generate,
    load_causal_lm,
    load_model,
    register_with_transformers,
    save_model,
)
from tests.model.drift import first_drifting_block, hidden_states

transformers = pytest.importorskip("transformers", reason="the comparison needs the extra [hf]")

# float32: sums of a few hundred terms in another order; the bound.
FLOAT32 = 1e-5


def opened(path: Path, **keywords: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **keywords).eval()


def tokens(batch: int = 2, time: int = 30) -> Tensor:
    return torch.randint(6, 98, (batch, time))


def assert_equal(ours: Decoder, theirs: Any, ids: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        drift = first_drifting_block(
            hidden_states(ours, ids), hidden_states(theirs, ids), tolerance=tolerance
        )
        assert drift is None, drift
        difference = (ours.logits(ours(ids)).float() - theirs(ids).logits.float()).abs().max()
    assert difference <= tolerance, f"logits differ by {difference:.2e} though every block agrees"


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        (None, "Cohere2ForCausalLM"),
        ((LayerSpec(),) * 3, "CohereForCausalLM"),
        ((LayerSpec(qk_norm=True),) * 3, "CohereForCausalLM"),
    ],
)
def test_saved_model_opens_in_transformers(
    tiny: ModelConfig, layers: tuple[LayerSpec, ...] | None, name: str, tmp_path: Path
) -> None:
    model = Decoder(tiny if layers is None else replace(tiny, layers=layers)).eval()
    save_model(model, tmp_path)
    theirs = opened(tmp_path)
    assert type(theirs).__name__ == name
    assert_equal(model, theirs, tokens(), FLOAT32)


def test_bfloat16(tiny: ModelConfig, tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits, so one rounding is up to 0.4 %; four blocks of residual sums of size ~10 that round at other places
    (our two matrices in place of seven, scores rounded before the softmax) differ by a few units in the last place, 0.06 at 8 to 16.
    The argument that nothing else differs is the float32 test; here the bound is 4 % of the largest value."""
    model = Decoder(tiny).eval()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    ours, theirs, ids = load_model(tmp_path), opened(tmp_path, dtype=torch.bfloat16), tokens()
    assert ours.embedding.weight.dtype == torch.bfloat16
    with torch.no_grad():
        states = hidden_states(theirs, ids)
        largest = max(float(state.abs().max()) for state in states)
        drift = first_drifting_block(hidden_states(ours, ids), states, tolerance=0.04 * largest)
    assert drift is None, drift


@pytest.mark.parametrize("kind", ["cohere2", "cohere", "cohere-qk-norm", "cohere2-untied"])
def test_transformers_checkpoints_open_in_ours(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "initializer_range": 0.15,
        "logit_scale": 0.5,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    }
    if kind.startswith("cohere2"):
        config = transformers.Cohere2Config(
            **sizes, sliding_window=5, head_dim=8, tie_word_embeddings=kind != "cohere2-untied"
        )
    else:
        config = transformers.CohereConfig(**sizes, use_qk_norm=kind == "cohere-qk-norm")
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    # Small shards, so that the index is read too.
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_equal(load_model(tmp_path), theirs, tokens(), FLOAT32)


def test_with_cache_past_the_window_and_left_padding(tiny: ModelConfig, tmp_path: Path) -> None:
    model = Decoder(tiny).eval()
    save_model(model, tmp_path)
    theirs = opened(tmp_path)
    ids, padded = tokens(2, 24), 3
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :padded] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    counts = mask.bool()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        whole = model.logits(model(ids, attention_mask=mask))
        assert (whole - expected)[counts].abs().max() <= FLOAT32
        # Prefill shorter than the window, a chunk that crosses it, then one by one.
        ours, theirs_cached, past = [], [], None
        cache = model.new_cache(2)
        cuts = [0, 5, 16, *range(17, 25)]
        for start, end in zip(cuts, cuts[1:], strict=False):
            part = model(ids[:, start:end], attention_mask=mask[:, :end] if start == 0 else None, cache=cache)
            ours.append(model.logits(part))
            out = theirs(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            theirs_cached.append(out.logits)
    assert (torch.cat(ours, 1) - expected)[counts].abs().max() <= FLOAT32
    assert (torch.cat(ours, 1) - torch.cat(theirs_cached, 1))[counts].abs().max() <= FLOAT32


def test_greedy_text_is_that_of_transformers(tiny: ModelConfig, tmp_path: Path) -> None:
    model = Decoder(tiny).eval()
    save_model(model, tmp_path)
    theirs = opened(tmp_path)
    prompts = [torch.randint(6, 98, (length,)).tolist() for length in (5, 13, 2)]
    ours = generate(model, prompts, Sampling(max_new_tokens=40), stop_ids=(98,))
    for prompt, answer in zip(prompts, ours, strict=True):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert [token for token in out[0, len(prompt) :].tolist() if token != 98] == answer


def test_a_planted_drift_is_named(tiny: ModelConfig, tmp_path: Path) -> None:
    model = Decoder(tiny).eval()
    save_model(model, tmp_path)
    theirs = opened(tmp_path)
    with torch.no_grad():
        theirs.model.layers[2].mlp.down_proj.weight[0, 0] += 0.5
        ids = tokens()
        drift = first_drifting_block(hidden_states(model, ids), hidden_states(theirs, ids), tolerance=FLOAT32)
    assert drift is not None
    assert drift.startswith("block 2 ")


def test_what_transformers_has_no_class_for_is_ours(tiny: ModelConfig, tmp_path: Path) -> None:
    layers = (LayerSpec(window=5, rope=False), LayerSpec(qk_norm=True), LayerSpec(window=3))
    model = Decoder(replace(tiny, layers=layers)).eval()
    save_model(model, tmp_path)
    register_with_transformers()
    theirs = opened(tmp_path)
    assert type(theirs).__name__ == "KoineForCausalLM"
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, model.logits(model(ids)))
        assert torch.equal(load_model(tmp_path)(ids), model(ids))


def test_any_other_causal_lm_opens(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    wrapped = load_causal_lm(tmp_path)
    assert isinstance(wrapped, CausalLM)
    ids = tokens()
    with torch.no_grad():
        assert torch.allclose(wrapped.logits(wrapped(ids)), theirs(ids).logits, atol=1e-6)
    with pytest.raises(UserError, match="packed documents"):
        wrapped(ids, document_ids=torch.arange(30).expand(2, 30))
    with pytest.raises(UserError, match="model_type 'llama'"):
        load_model(tmp_path)
