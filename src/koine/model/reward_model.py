"""A reward model: a causal language model whose output matrix is replaced by a head with one output.

Shape suffixes: b batch, t time, d hidden size, n conversations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koine.errors import UserError
from koine.hub import model_folder
from koine.model.causal_lm import (
    CausalLM,
    load_as_stored,
    load_with_transformers,
    opens_as_decoder,
    quiet_transformers,
    require_transformers,
)
from koine.model.decoder import Decoder
from koine.model.formats.carried_files import copy_tokenizer
from koine.model.formats.checksum import write_checksums
from koine.model.formats.config_json import read_config
from koine.model.formats.eos_ids import eos_ids
from koine.model.formats.opening import check_fields, read_model_config
from koine.model.formats.reward_files import (
    SCORE,
    check_reward_model,
    finish_reward_folder,
    is_reward_model,
    padding_token,
    read_reward_state,
    save_reward_configs,
    save_reward_state,
    set_padding,
)
from koine.model.formats.weight_files import open_safetensors, weight_files
from koine.model.language_model import RemapIds, VocabularyTensors
from koine.model.lm_head import linear_head, probe_tokens
from koine.model.lora.adapter import add_lora, merged_weights
from koine.model.meta_device import meta_device
from koine.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from koine.model.language_model import LanguageModel
    from koine.model.lora.adapter import LoraAdapter
    from koine.model.lora.config import LoraConfig

BACKBONE = "backbone."
"""Prefix of the language model's parameters."""


class RewardModel(nn.Module):
    """A `LanguageModel` whose `logits` are one score at every position, `[..., 1]`.

    The score of a conversation is that at its last token (`koine.align.reward_scores`). It is saved as the
    class `...ForSequenceClassification` of the architecture.
    """

    def __init__(self, backbone: LanguageModel, score: Tensor | None = None, *, seed: int = 0) -> None:
        """Put a head on a language model, which loses its own.

        Args:
            backbone: our decoder, or a `CausalLM`.
            score: the head, `[1, d]`; None: drawn from a normal distribution with the standard deviation
                `1 / sqrt(d + 1)` (arXiv 2009.01325, appendix B.1).
            seed: of the head.
        """
        super().__init__()
        size = _drop_head(backbone)
        assert isinstance(backbone, Decoder | CausalLM)
        self.backbone = backbone
        weight = backbone.input_embedding.weight
        assert isinstance(weight, Tensor)
        if score is None:
            generator = torch.Generator().manual_seed(seed)
            score = torch.randn(1, size, generator=generator) / (size + 1) ** 0.5
        self.score = nn.Linear(size, 1, bias=False, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            self.score.weight.copy_(score)
        self.adapter: LoraAdapter | None = None
        """None: an adapter on `backbone` is merged when the model is saved."""

    # --- description ---

    @property
    def eos_ids(self) -> frozenset[int]:
        """EOS ids of the model's folder."""
        return self.backbone.eos_ids

    @eos_ids.setter
    def eos_ids(self, ids: frozenset[int]) -> None:
        self.backbone.eos_ids = ids

    @property
    def architecture(self) -> str:
        """Name of the class that computes the language model."""
        return self.backbone.architecture

    @property
    def context_length(self) -> int | None:
        """Most tokens of one sequence; None where the configuration names no limit."""
        return self.backbone.context_length

    @property
    def vocab_size(self) -> int:
        """Count of ids that the model embeds."""
        return len(self.backbone.input_embedding.weight)  # type: ignore[arg-type]

    @property
    def isolates_documents(self) -> bool:
        """Whether `document_ids` may name several documents in a row."""
        return self.backbone.isolates_documents

    @property
    def blocks(self) -> nn.ModuleList | None:
        """The layers of our decoder; None for a class of `transformers`."""
        return self.backbone.blocks if isinstance(self.backbone, Decoder) else None

    @property
    def input_embedding(self) -> nn.Module:
        """The embedding of the tokens."""
        return self.backbone.input_embedding

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.score.weight.device

    def describe(self) -> dict[str, Any]:
        """Return the fields of the configuration that determine the computation."""
        adapter = self.backbone.adapter
        lora = {} if adapter is None else {"lora": adapter.config.to_json(), "modules": list(adapter.modules)}
        return {**self.backbone.describe(), "head": "score", **lora}

    # --- computation ---

    def forward(self, tokens: Tensor, **attention: Any) -> Tensor:
        """Compute hidden states `[b, t, d]` for `[b, t]` ids; the arguments are those of the backbone."""
        hidden: Tensor = self.backbone(tokens, **attention)
        return hidden

    def scores(self, hidden: Tensor) -> Tensor:
        """Compute scores `[...]` from hidden states `[..., d]`, in float32 (float64 stays)."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(dtype), self.score.weight.to(dtype))[..., 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the score at every position, `[..., 1]`."""
        return self.scores(hidden)[..., None]

    @property
    def output_weight(self) -> Tensor:
        """The head, `[1, d]`."""
        return self.score.weight

    @property
    def logit_scale(self) -> float:
        """1: scores are not scaled."""
        return 1.0

    @property
    def logit_softcap(self) -> float | None:
        """None: scores are not capped."""
        return None

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass, or keep them."""
        self.backbone.set_gradient_checkpointing(enabled)

    def add_lora(self, config: LoraConfig, *, base: Path | None = None, seed: int = 0) -> None:
        """Put a LoRA adapter on the backbone (`koine.model.add_lora`); it and the head are then trained.

        Saving merges the adapter: the folder is a whole reward model.
        """
        add_lora(self.backbone, config, base=base, seed=seed)

    # --- storage ---

    def save(
        self, folder: Path, *, tokenizer: Path | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a reward model's folder, in which an adapter is merged into the weights.

        weights: by parameter name, in place of the model's own.
        """
        state: dict[str, Tensor] = {**self.state_dict(), **(weights or {})}
        score = state.pop(SCORE)
        state = {name.removeprefix(BACKBONE): tensor for name, tensor in state.items()}
        backbone = self.backbone
        if backbone.adapter is not None:
            state = merged_weights(backbone, state)
        if isinstance(backbone, Decoder):
            save_reward_state(
                state, score, backbone.config, folder, tokenizer=tokenizer, eos_ids=backbone.eos_ids
            )
        else:
            _save_with_transformers(state, score, backbone.inner.config, folder, tokenizer)

    def save_config(self, folder: Path, *, tokenizer: Path | None = None) -> None:
        """Write the configurations, as of float32 weights, and the tokenizer's files."""
        backbone = self.backbone
        if isinstance(backbone, Decoder):
            save_reward_configs(backbone.config, folder, tokenizer=tokenizer, eos_ids=self.eos_ids)
            return
        backbone.save_config(folder, tokenizer=tokenizer)
        finish_reward_folder(folder)

    def fixed_tensors(self) -> dict[str, Tensor]:
        """Return the saved tensors that are not trained, by their names in the state dict."""
        return {BACKBONE + name: tensor for name, tensor in self.backbone.fixed_tensors().items()}

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return the weights by their names in this module."""
        return self.state_dict()

    def load_stored_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the weights by tensors named as in this module."""
        self.load_state_dict(tensors)

    def vocabulary_tensors(self) -> VocabularyTensors:
        """Return the embedding: there is no output matrix."""
        weight = self.input_embedding.weight
        assert isinstance(weight, Tensor)
        return VocabularyTensors(weight)

    def set_vocabulary(
        self, tensors: VocabularyTensors, special_ids: Mapping[str, int], remap: RemapIds
    ) -> None:
        """Replace the embedding, and the ids of the configuration."""
        self.backbone.set_vocabulary(tensors, special_ids, remap)


def _drop_head(backbone: LanguageModel) -> int:
    """Remove the output matrix of our decoder, or freeze that of a class of `transformers`; return `d`.

    Raises `UserError` for a class whose last hidden states are not the input of one matrix.
    """
    if isinstance(backbone, Decoder):
        if hasattr(backbone, "head"):
            del backbone.head
        return backbone.config.hidden_size
    assert isinstance(backbone, CausalLM)
    module = linear_head(backbone.inner) if backbone.head.linear else None
    if module is None or not _gives_last_states(backbone):
        raise UserError(
            f"{backbone.architecture} has another head than one matrix after the last layer",
            hint="choose a model with such a head",
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight is not backbone.input_embedding.weight:
        module.requires_grad_(False)
        # It is not stored: the same for every opening, as the training's identity has it.
        with torch.no_grad():
            weight.zero_()
    return weight.shape[1]


@torch.no_grad()
def _gives_last_states(backbone: CausalLM) -> bool:
    """Return whether the input of the head is what the base model returns, which a classifier scores."""
    inner = backbone.inner
    training = inner.training
    inner.eval()
    tokens = probe_tokens(inner).to(inner.device)
    ours, theirs = backbone(tokens), inner.base_model(tokens).last_hidden_state
    inner.train(training)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def start_reward_model(path: Path, *, seed: int = 0) -> RewardModel:
    """Return a reward model to train: that of a folder, or a new head on the language model of a folder.

    seed: of a new head.
    """
    path = model_folder(path)
    return load_reward_model(path) if is_reward_model(path) else RewardModel(load_as_stored(path), seed=seed)


def load_reward_model(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> RewardModel:
    """Open a reward model with our own decoder where it computes the model, else with `transformers`.

    Args:
        path: folder of the model, or `OWNER/NAME` of the hub.
        dtype: of the weights; None: as stored.
        device: where they are loaded.

    Raises:
        UserError: the folder holds no reward model, or its files are damaged.
    """
    path = model_folder(path)
    value = read_model_config(path)
    check_reward_model(path)
    if opens_as_decoder(path):
        check_fields(value, path / "config.json")
        config = read_config(path)
        state, score = read_reward_state(path, config)
        with meta_device():
            decoder = Decoder(config)
        _drop_head(decoder)
        decoder.load_state_dict(state, assign=True)
        decoder.eos_ids = eos_ids(path)
        model = RewardModel(decoder, score)
    else:
        backbone = load_with_transformers(path, headless=SCORE)
        model = RewardModel(backbone, _read_score(path))
    return model.to(device=device, dtype=dtype).eval()


def _read_score(path: Path) -> Tensor:
    """Return the head in the weight files, `[1, d]`. Raises `UserError` where there is none."""
    for file in weight_files(path):
        opened = open_safetensors(file)
        if SCORE in opened.keys():  # noqa: SIM118  # it is no mapping
            score: Tensor = opened.get_tensor(SCORE)
            return score
    raise UserError(
        f"the weights lack {SCORE}", where=path, hint="config.json and the weights do not belong together"
    )


def _save_with_transformers(
    state: Mapping[str, Tensor], score: Tensor, config: Any, folder: Path, tokenizer: Path | None
) -> None:
    """Write the class of sequence classification; state: by the names in `CausalLM`."""
    from koine.model.formats.sequence_classification import build_classifier

    state = {name.removeprefix("inner."): tensor.detach().cpu() for name, tensor in state.items()}
    padding = None if tokenizer is None else padding_token(load_tokenizer(tokenizer))
    inner = build_classifier(config, state, score.detach().cpu(), padding=padding)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers(require_transformers()):
        inner.save_pretrained(folder)
    write_checksums(folder)
    copy_tokenizer(tokenizer, folder)
    set_padding(folder)


def write_reward_weights(
    weights: Mapping[str, Tensor], described: Path, folder: Path, *, dtype: torch.dtype | None = None
) -> None:
    """Write a reward model from the weights of a training checkpoint.

    Args:
        weights: by the names of `RewardModel`.
        described: folder with the configuration and the tokenizer.
        folder: made if needed.
        dtype: of the tensors; None: their own.
    """
    state = {name.removeprefix(BACKBONE): tensor for name, tensor in weights.items()}
    score = state.pop(SCORE)
    if not any(name.startswith("inner.") for name in state):
        config = read_config(described)
        save_reward_state(
            state, score, config, folder, tokenizer=described, dtype=dtype, eos_ids=eos_ids(described)
        )
        return
    transformers = require_transformers()
    config = transformers.AutoConfig.from_pretrained(
        described, local_files_only=True, trust_remote_code=False
    )
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    _save_with_transformers(state, score, config, folder, described)
