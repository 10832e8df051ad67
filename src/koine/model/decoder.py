"""The decoder: an embedding, blocks (`koine.model.block` or `koine.model.moe.block`), a norm and a head.

Shape suffixes: b batch, t time, e hidden_size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from koine.model.attention.context import AttentionContext
from koine.model.attention.dispatch import document_starts_of
from koine.model.block import Block, ParallelBlock, SequentialBlock, rope_angles
from koine.model.config import LayerSpec, ModelConfig
from koine.model.language_model import RemapIds, VocabularyTensors
from koine.model.layer_patterns import reconfigure
from koine.model.moe.block import ParallelMixtureBlock, SequentialMixtureBlock
from koine.model.moe.routers import DomainRouter, LinearRouter, Routing
from koine.model.norm import HeadNorm, Norm

if TYPE_CHECKING:
    from koine.model.lora.adapter import LoraAdapter


def _block(config: ModelConfig, spec: LayerSpec) -> Block:
    parallel = config.arrangement == "parallel"
    if config.mixture is None:
        return (ParallelBlock if parallel else SequentialBlock)(config, spec)
    return (ParallelMixtureBlock if parallel else SequentialMixtureBlock)(config, spec, config.mixture)


RESIDUAL_WRITERS = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts_out")
"""Ends of the names of the matrices that write to the residual stream."""


class Decoder(nn.Module):
    """A causal language model over `config.layers`: `logits(model(tokens))`.

    With `gradient_checkpointing`, the backward pass in training recomputes each block's activations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(_block(config, spec) for spec in config.layers)
        self.norm = Norm(config.hidden_size, config)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.eos_ids: frozenset[int] = frozenset()
        """EOS ids of the model's folder (`koine.model.formats.eos_ids`)."""
        self.adapter: LoraAdapter | None = None
        """The LoRA adapter that `koine.model.lora.adapter.add_lora` put on it."""
        self.packed_head: nn.Module | None = None
        """The output projection of a model packed by `koine.generate.cpu.prepacked_linear`."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise matrices from a normal distribution with `initializer_range`, norms as the identity.

        Biases are 0. The matrices that write to the residual stream are divided by `sqrt(2 * layers)` (GPT-2).
        """
        std = self.config.initializer_range
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:
                    continue
                if "bias" in name:
                    parameter.zero_()
                elif name.endswith(RESIDUAL_WRITERS):
                    parameter.normal_(0.0, std / (2 * len(self.config.layers)) ** 0.5)
                else:
                    parameter.normal_(0.0, std)
            for module in self.modules():
                if isinstance(module, LinearRouter):
                    module.reset_parameters(std)
                elif isinstance(module, DomainRouter | Norm | HeadNorm):
                    module.reset_parameters()

    @property
    def architecture(self) -> str:
        """Name of the class."""
        return type(self).__name__

    @property
    def context_length(self) -> int:
        """Most tokens of one sequence."""
        return self.config.context_length

    @property
    def vocab_size(self) -> int:
        """Count of ids that the model embeds and scores."""
        return self.config.vocab_size

    @property
    def isolates_documents(self) -> bool:
        """True: attention stays inside each document of `document_ids`."""
        return True

    @property
    def input_embedding(self) -> nn.Embedding:
        """The embedding of the tokens."""
        return self.embedding

    @property
    def output_weight(self) -> Tensor:
        """The output projection, `[vocab, hidden]`; the embedding itself where tied."""
        weight = self.embedding.weight if self.config.tie_embeddings else self.head.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def logit_scale(self) -> float:
        """Factor on the logits."""
        return self.config.logit_scale

    @property
    def logit_softcap(self) -> float | None:
        """Soft cap of the scaled logits; None without one."""
        return self.config.logit_softcap

    def forward(
        self,
        tokens: Tensor,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        context: AttentionContext | None = None,
        block_outputs: list[Tensor] | None = None,
        routings: list[Routing] | None = None,
    ) -> Tensor:
        """Compute hidden states after the final norm.

        Args:
            tokens: `[batch, time]` ids.
            document_ids: `[batch, time]`, equal within a document, -1 for padding: attention stays inside a
                document.
            positions: `[batch, time]` or `[time]`, for RoPE; default 0, 1, ... (padding not counted).
            attention_mask: `[batch, time]`, 0 for padding on the left or on the right.
            context: the KV cache of this pass, or the segments of its rows, with positions and visibility.
            block_outputs: receives the input of the first block and each block's output.
            routings: receives the routing of each layer's tokens; nothing without experts.

        Returns:
            `[batch, time, hidden]`.

        Raises:
            ValueError: `document_ids`, `positions` or `attention_mask` together with a context.
        """
        given = positions is not None or attention_mask is not None
        positions, document_ids = self._placed(tokens, document_ids, positions, attention_mask, context)
        document_starts = None if document_ids is None else document_starts_of(document_ids)
        if document_starts is not None and self._is_dynamic and not given:
            # Its frequencies depend on the length of each document, which its positions tell.
            positions = torch.arange(tokens.shape[1], device=tokens.device) - document_starts
        lengths = context.lengths if context is not None and self._is_dynamic else None
        angles = rope_angles(positions, self.config, lengths)
        x_bte = self.embed(tokens)
        if block_outputs is not None:
            block_outputs.append(x_bte)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            own = None if block.rope is None else angles[block.rope]
            attention = None if context is None else partial(context.attend, index)
            if self.gradient_checkpointing and self.training:
                x_bte, routing = checkpoint(
                    block, x_bte, own, document_starts, attention, use_reentrant=False
                )
            else:
                x_bte, routing = block(x_bte, own, document_starts, attention)
            if routings is not None and routing is not None:
                routings.append(routing)
            if block_outputs is not None:
                block_outputs.append(x_bte)
        if context is not None:
            context.finish()
        out_bte = self.norm(x_bte)
        assert isinstance(out_bte, Tensor)
        return out_bte

    @property
    def _is_dynamic(self) -> bool:
        scaling = self.config.rope_scaling
        return scaling is not None and scaling.kind == "dynamic"

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the rows of `tokens`, times `embedding_scale`, `[..., hidden]`."""
        x: Tensor = self.embedding(tokens)
        scale = self.config.embedding_scale
        # Gemma rounds the factor to the dtype of the weights.
        return x if scale == 1.0 else x * torch.tensor(scale, dtype=x.dtype, device=x.device)

    def _placed(
        self,
        tokens: Tensor,
        document_ids: Tensor | None,
        positions: Tensor | None,
        attention_mask: Tensor | None,
        context: AttentionContext | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return positions `[batch or 1, time]`, and document ids with padding as -1."""
        if context is not None:
            if document_ids is not None or positions is not None or attention_mask is not None:
                raise ValueError("a context has positions, documents and padding itself")
            return context.positions, None
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            if attention_mask is not None:
                positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        elif positions.dim() == 1:
            positions = positions[None]
        if attention_mask is not None:
            documents = torch.zeros_like(tokens) if document_ids is None else document_ids
            document_ids = documents.masked_fill(attention_mask == 0, -1)
        return positions, document_ids

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits `[..., vocab]` from hidden states `[..., hidden]`, scaled and capped."""
        scale, cap = self.config.logit_scale, self.config.logit_softcap
        if self.packed_head is not None:
            logits: Tensor = self.packed_head(hidden)
            if scale != 1.0:
                logits.mul_(scale)
        else:
            logits = F.linear(hidden, self.output_weight)
            if scale != 1.0:
                logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def describe(self) -> dict[str, Any]:
        """Return the fields of the configuration that determine the computation."""
        compared = {field.name for field in fields(self.config) if field.compare}
        return {name: value for name, value in asdict(self.config).items() if name in compared}

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass, or keep its activations."""
        self.gradient_checkpointing = enabled

    def save(
        self, folder: Path, *, tokenizer: Path | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a model directory (see `koine.model.formats.directory.save_state`)."""
        from koine.model.formats.directory import save_state

        state = self.state_dict() if weights is None else {**weights, **self.fixed_tensors()}
        save_state(state, self.config, folder, tokenizer=tokenizer, eos_ids=self.eos_ids)

    def save_config(self, folder: Path, *, tokenizer: Path | None = None) -> None:
        """Write the configurations, as of float32 weights, and the tokenizer's files."""
        from koine.model.formats.directory import save_configs

        save_configs(self.config, folder, dtype="float32", tokenizer=tokenizer, eos_ids=self.eos_ids)

    def fixed_tensors(self) -> dict[str, Tensor]:
        """Return the buffers: the domain embeddings of a mixture's router are fixed."""
        return {name: buffer.detach() for name, buffer in self.named_buffers()}

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return the weights under the names of `transformers`, fused projections split."""
        from koine.model.formats.directory import to_transformers

        return to_transformers(self.state_dict(), self.config)

    def load_stored_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the weights by tensors under the names of `transformers`."""
        from koine.model.formats.directory import from_transformers

        self.load_state_dict(from_transformers(tensors, self.config))

    def vocabulary_tensors(self) -> VocabularyTensors:
        """Return the embedding, and the head's matrix where it is not tied."""
        head = None if self.config.tie_embeddings else self.head.weight
        return VocabularyTensors(self.embedding.weight, head)

    def set_vocabulary(
        self, tensors: VocabularyTensors, special_ids: Mapping[str, int], remap: RemapIds
    ) -> None:
        """Replace embedding and head, and the ids of the configuration."""
        rows = len(tensors.embedding)
        ids: dict[str, Any] = dict(special_ids)
        reconfigure(self, replace(self.config, vocab_size=rows, **ids))
        self.embedding = nn.Embedding(rows, self.config.hidden_size, _weight=tensors.embedding.detach())
        if tensors.head is not None:
            self.head.weight = nn.Parameter(tensors.head.detach())
            self.head.out_features = rows
        ends = remap(sorted(self.eos_ids), special_ids["eos_token_id"])
        self.eos_ids = frozenset(ends if isinstance(ends, list) else [ends])
