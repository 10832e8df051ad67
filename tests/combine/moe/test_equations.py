"""Mixtures against their papers' equations, computed with the modules of `transformers`.

arXiv 2408.08274, section 3: in a sequential block the attention experts are mixed first, by soft gates of
the normed input, then the feed-forward experts, by the gates of the top k of what comes out.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from koine.model import load_model
from koine.model.formats.directory import open_canonical
from tests.combine.moe.families import write_family
from tests.combine.moe.test_families import relative, upcycle

transformers = pytest.importorskip("transformers")

CLASSES = ("gemma2", "gemma3_text", "granite", "llama", "olmo2", "qwen2", "qwen3")
"""Sequential blocks: pre-norm, post-norm, both; biases; norms of q and k by head and over all heads."""
TOKENS = torch.randint(0, 200, (1, 6), generator=torch.Generator().manual_seed(3))


class Mixture:
    """The forward pass of a mixture, from the layers of its branches in `transformers`.

    TOKENS are fewer than any window, so the causal mask is that of every layer.
    """

    def __init__(self, branches: list[Path], mixture: Path, *, attention: str, top_k: int) -> None:
        # The other implementations have no soft cap of the scores.
        opened = [
            transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
            for path in branches
        ]
        self.models = [one.double().eval() for one in opened]
        self.average = copy.deepcopy(self.models[0])
        states = [one.state_dict() for one in self.models]
        self.average.load_state_dict(
            {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
        )
        self.stored = open_canonical(mixture, load_model(mixture).config)
        self.attention, self.top_k = attention, top_k
        if attention == "bam-shared-kv":
            for model in self.models:
                for layer, shared in zip(model.model.layers, self.average.model.layers, strict=True):
                    for name in ("k_proj", "v_proj", "k_norm"):
                        if hasattr(shared.self_attn, name):
                            setattr(layer.self_attn, name, getattr(shared.self_attn, name))

    def router(self, index: int, module: str, x: Tensor) -> Tensor:
        weight = self.stored[f"model.layers.{index}.{module}.router.weight"].double()
        return (x @ weight.t()).softmax(-1)

    def attend(self, index: int, x: Tensor, **given: Any) -> Tensor:
        if self.attention == "btx":
            out: Tensor = self.average.model.layers[index].self_attn(x, **given)[0]
            return out
        gates = self.router(index, "self_attn", x)
        parts = [model.model.layers[index].self_attn(x, **given)[0] for model in self.models]
        return sum(gates[..., [j]] * part for j, part in enumerate(parts))  # type: ignore[return-value]

    def feed_forward(self, index: int, x: Tensor) -> Tensor:
        gates = self.router(index, "mlp", x)
        top = gates.topk(self.top_k, dim=-1)
        kept = torch.zeros_like(gates).scatter(-1, top.indices, top.values)
        parts = [model.model.layers[index].mlp(x) for model in self.models]
        return sum(kept[..., [i]] * part for i, part in enumerate(parts))  # type: ignore[return-value]

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        model = self.average
        core, config = model.model, model.config
        positions = torch.arange(tokens.shape[1])[None]
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)[None, None]
        x = core.embed_tokens(tokens)
        x = x * getattr(config, "embedding_multiplier", 1.0)
        scale = getattr(config, "residual_multiplier", 1.0)
        for index, layer in enumerate(core.layers):
            if config.model_type == "gemma3_text":
                angles = core.rotary_emb(x, positions, config.layer_types[index])
            else:
                angles = core.rotary_emb(x, position_ids=positions)

            def norm(name: str, value: Tensor, layer: Any = layer) -> Tensor:
                out: Tensor = getattr(layer, name)(value) if hasattr(layer, name) else value
                return out

            around = hasattr(layer, "post_feedforward_layernorm")
            out = self.attend(
                index, norm("input_layernorm", x), position_embeddings=angles, attention_mask=mask
            )
            x = x + scale * (norm("post_attention_layernorm", out) if around else out)
            before = "pre_feedforward_layernorm" if around else "post_attention_layernorm"
            out = self.feed_forward(index, norm(before, x))
            x = x + scale * norm("post_feedforward_layernorm", out)
        found: Tensor = model.lm_head(core.norm(x)) / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return found if cap is None else torch.tanh(found / cap) * cap


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("method", ["btx", "bam", "bam-shared-kv"])
def test_sequential_blocks_are_those_of_the_papers(tmp_path: Path, family: str, method: str) -> None:
    seed, paths = write_family(tmp_path, family, ("code", "law"), spread=1.0, dtype=torch.float64)
    upcycle(method, seed, paths, tmp_path / "out", top_k=2)
    ours = load_model(tmp_path / "out", dtype=torch.float64)
    theirs = Mixture([seed, *paths.values()], tmp_path / "out", attention=method, top_k=2)
    with torch.no_grad():
        got = ours.logits(ours(TOKENS))
    # Norms and rotations of transformers are in float32.
    assert relative(got, theirs.logits(TOKENS)) < 3e-6
