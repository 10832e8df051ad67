"""What we save is Cohere2 or Cohere to `transformers`, and what it saves is a decoder to us."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from koine.errors import UserError
from koine.generate import generate
from koine.generate.cache.contexts import DecodeContext, PrefillContext
from koine.generate.cache.paged_cache import PagedCache
from koine.generate.sampling import Sampling
from koine.model import (
    CausalLM,
    Decoder,
    LayerSpec,
    ModelConfig,
    load_causal_lm,
    load_model,
    register_with_transformers,
    save_model,
)
from koine.model.formats.config_json import from_json
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
        ((LayerSpec(qk_norm="heads"),) * 3, "CohereForCausalLM"),
        ((LayerSpec(window=4),) * 3, "Cohere2ForCausalLM"),
        ((LayerSpec(rope=False),) * 3, "Cohere2ForCausalLM"),
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


def test_bfloat16_is_as_close_to_float32_as_transformers(tiny: ModelConfig, tmp_path: Path) -> None:
    """Our error against float32 is at most twice that of transformers (root mean square).

    The two round at other places (two matrices in place of seven, scores rounded before the softmax), so they
    are not equal in bfloat16. Checked block by block and in the logits: at once, past the window, with
    padding and with a KV cache.
    """
    truth = Decoder(tiny).eval()
    save_model(truth, tmp_path, dtype=torch.bfloat16)
    truth = load_model(tmp_path, dtype=torch.float32)
    ours, theirs, ids = load_model(tmp_path), opened(tmp_path, dtype=torch.bfloat16), tokens(4, 30)
    assert ours.embedding.weight.dtype == torch.bfloat16
    mask = torch.ones(4, 30, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    counts = mask.bool()

    def error(a: Tensor, b: Tensor) -> float:
        return float((a.float() - b)[counts].square().mean().sqrt())

    with torch.no_grad():
        states = [
            hidden_states(truth, ids, attention_mask=mask),
            hidden_states(ours, ids, attention_mask=mask),
            hidden_states(theirs, ids, attention_mask=mask, position_ids=positions),
        ]
        for index, (exact, a, b) in enumerate(zip(*states, strict=True)):
            assert error(a, exact) <= 2 * error(b, exact), f"state {index}"
        exact = truth.logits(truth(ids, attention_mask=mask))
        bound = 2 * error(theirs(ids, attention_mask=mask, position_ids=positions).logits, exact)
        assert error(ours.logits(ours(ids, attention_mask=mask)), exact) <= bound
        cache = PagedCache.of_model(ours, page=8)
        sequences = [cache.add() for _ in range(4)]
        starts = [5, 0, 0, 0]
        read = torch.zeros(4, 30, 32, dtype=torch.bfloat16)
        for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            context = PrefillContext(cache, [sequence], [13 - start])
            read[row, start:13] = ours(ids[row : row + 1, start:13], context=context)[0]
        for t in range(13, 30):
            read[:, t] = ours(ids[:, t : t + 1], context=DecodeContext(cache, sequences))[:, 0]
        assert error(ours.logits(read), exact) <= bound


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
        blocks = hidden_states(theirs, ids, attention_mask=mask, position_ids=positions)
        ours_whole = hidden_states(model, ids, attention_mask=mask)
        assert first_drifting_block(ours_whole, blocks, tolerance=FLOAT32, where=counts) is None
        whole = model.logits(model(ids, attention_mask=mask))
        assert (whole - expected)[counts].abs().max() <= FLOAT32
        # Prefill shorter than the window, a chunk that crosses it, then one by one; ours has no padding to
        # step over.
        ours, theirs_cached, past = torch.zeros_like(expected), [], None
        cached = [torch.zeros_like(state) for state in blocks]
        cache = PagedCache.of_model(model, page=4)
        sequences = [cache.add(), cache.add()]
        cuts = [0, 5, 16, *range(17, 25)]
        for start, end in zip(cuts, cuts[1:], strict=False):
            if end - start > 1:
                for row, first in ((0, max(start, padded)), (1, start)):
                    context = PrefillContext(cache, [sequences[row]], [end - first])
                    states: list[Tensor] = []
                    part = model(ids[row : row + 1, first:end], context=context, block_outputs=states)
                    ours[row, first:end] = model.logits(part)[0]
                    for kept, state in zip(cached, states, strict=True):
                        kept[row, first:end] = state[0]
            else:
                states = []
                reader = DecodeContext(cache, sequences)
                step = model(ids[:, start:end], context=reader, block_outputs=states)
                ours[:, start:end] = model.logits(step)
                for kept, state in zip(cached, states, strict=True):
                    kept[:, start:end] = state
            out = theirs(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            theirs_cached.append(out.logits)
    # Block by block first, so that a failure names the first block that drifts.
    assert first_drifting_block(cached, blocks, tolerance=FLOAT32, where=counts) is None
    assert (ours - expected)[counts].abs().max() <= FLOAT32
    assert (ours - torch.cat(theirs_cached, 1))[counts].abs().max() <= FLOAT32


def test_greedy_generation_equals_transformers(tiny: ModelConfig, tmp_path: Path) -> None:
    model = Decoder(tiny).eval()
    save_model(model, tmp_path)
    theirs = opened(tmp_path)
    prompts = [torch.randint(6, 98, (length,)).tolist() for length in (5, 13, 2)]
    ours = generate(model, prompts, Sampling(max_new_tokens=40, temperature=0), stop_ids=(98,))
    for prompt, answer in zip(prompts, ours, strict=True):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert out[0, len(prompt) :].tolist() == answer.tokens


def test_the_first_drifting_block_is_named(tiny: ModelConfig, tmp_path: Path) -> None:
    model = Decoder(tiny).eval()
    save_model(model, tmp_path)
    theirs = opened(tmp_path)
    with torch.no_grad():
        theirs.model.layers[2].mlp.down_proj.weight[0, 0] += 0.5
        ids = tokens()
        drift = first_drifting_block(hidden_states(model, ids), hidden_states(theirs, ids), tolerance=FLOAT32)
    assert drift is not None
    assert drift.startswith("block 2 ")


def test_models_without_a_transformers_class_are_saved_as_koine(tiny: ModelConfig, tmp_path: Path) -> None:
    layers = (LayerSpec(window=5, rope=False), LayerSpec(qk_norm="heads"), LayerSpec(window=3))
    model = Decoder(replace(tiny, layers=layers)).eval()
    save_model(model, tmp_path)
    register_with_transformers()
    theirs = opened(tmp_path)
    assert type(theirs).__name__ == "KoineForCausalLM"
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, model.logits(model(ids)))
        assert torch.equal(load_model(tmp_path)(ids), model(ids))


def test_our_own_type_generates_through_transformers(tiny: ModelConfig, tmp_path: Path) -> None:
    model = Decoder(
        replace(tiny, layers=(LayerSpec(window=5, rope=False), LayerSpec(qk_norm="heads")))
    ).eval()
    save_model(model, tmp_path)
    register_with_transformers()
    theirs = opened(tmp_path)
    prompt = torch.randint(6, 98, (11,)).tolist()
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, 11:].tolist()
    ours = generate(model, [prompt], Sampling(max_new_tokens=12, temperature=0), stop_ids=(98,))[0]
    assert out == ours.tokens
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again")(torch.tensor([prompt])), model(torch.tensor([prompt])))


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    """Missing fields of config.json: the default theta of Cohere is 500,000, of Cohere2 10,000."""
    for kind, config_class in (
        ("cohere", transformers.CohereConfig),
        ("cohere2", transformers.Cohere2Config),
    ):
        sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
        config = from_json(sizes | {"model_type": kind, "num_hidden_layers": 5}, where=tmp_path)
        reference = config_class(**sizes, num_hidden_layers=5)
        assert config.rope_theta == reference.rope_parameters["rope_theta"]
        assert config.logit_scale == reference.logit_scale
        assert config.norm_eps == reference.layer_norm_eps
        assert config.max_position_embeddings == reference.max_position_embeddings
        assert config.num_kv_heads == reference.num_key_value_heads
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 5, 255_001)
        if kind == "cohere2":
            assert [layer.window for layer in config.layers] == [4096, 4096, 4096, None, 4096]


def test_an_unsupported_cohere_opens_through_transformers(tmp_path: Path) -> None:
    config = transformers.CohereConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="mish",
        logit_scale=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    theirs = transformers.CohereForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="hidden_act is 'mish'"):
        load_model(tmp_path)
    wrapped = load_causal_lm(tmp_path)
    assert isinstance(wrapped, CausalLM)
    ids = tokens()
    with torch.no_grad():
        assert torch.allclose(wrapped.logits(wrapped(ids)), theirs(ids).logits, atol=1e-6)
        assert torch.allclose(
            torch.nn.functional.linear(wrapped(ids), wrapped.output_weight) * wrapped.logit_scale,
            theirs(ids).logits,
            atol=1e-6,
        )


def test_padding_of_another_causal_lm_is_not_counted_as_positions(tmp_path: Path) -> None:
    """GPT-2 has learned positions, so left padding that is counted changes the output."""
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path)
    ids, mask = tokens(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        alone = model(ids[:, 5:])
        assert torch.allclose(model(ids, attention_mask=mask)[:, 5:], alone, atol=1e-5)
        padded = torch.where(mask == 1, 3, -1)
        assert torch.allclose(model(ids, document_ids=padded)[:, 5:], alone, atol=1e-5)


def test_without_transformers_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="to open this model, the package 'transformers' is needed"):
        load_causal_lm(tmp_path)


def test_any_other_causal_lm_opens(tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=99, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    theirs = transformers.GPTNeoXForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    wrapped = load_causal_lm(tmp_path)
    assert isinstance(wrapped, CausalLM)
    ids = tokens()
    with torch.no_grad():
        assert torch.allclose(wrapped.logits(wrapped(ids)), theirs(ids).logits, atol=1e-6)
    with pytest.raises(UserError, match="model_type 'gpt_neox'"):
        load_model(tmp_path)
