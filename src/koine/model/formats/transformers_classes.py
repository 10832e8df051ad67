"""`transformers` classes for models saved with `model_type` `koine`, for which the library has none.

Needs the extra `[hf]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from koine.model.decoder import Decoder
from koine.model.formats.config_json import from_json
from koine.model.meta_device import meta_device


class KoineConfig(PretrainedConfig):  # type: ignore[misc]
    """`config.json` with `model_type` `koine`; its fields are those of `config_json.to_json`."""

    model_type = "koine"


class KoineForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Our decoder as a `transformers` model: logits and loss; generation without a KV cache."""

    config_class = KoineConfig
    base_model_prefix = "decoder"

    def __init__(self, config: KoineConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(from_json(config.to_dict(), where=Path("config.json")))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the decoder initialises its weights."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> KoineForCausalLM:
        """Open a local directory through `koine.model.load_model`."""
        from koine.model.formats.directory import load_model

        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        decoder = load_model(Path(path), dtype=dtype if isinstance(dtype, torch.dtype) else None)
        config = kwargs.get("config") or KoineConfig.from_pretrained(path)
        with meta_device():
            model = cls(config)
        model.decoder = decoder
        model.eval()
        return model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as `koine.model.save_model` does."""
        from koine.model.formats.directory import save_model

        save_model(self.decoder, Path(save_directory))

    def get_output_embeddings(self) -> nn.Module:
        """Return the module whose weight scores the vocabulary."""
        decoder = self.decoder
        module = decoder.embedding if decoder.config.tie_embeddings else decoder.head
        assert isinstance(module, nn.Module)
        return module

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits `[batch, time, vocab]` for `[batch, time]` ids.

        With `labels` also the shifted cross-entropy.
        """
        logits = self.decoder.logits(self.decoder(input_ids, attention_mask=attention_mask))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Return the whole text at every step: `transformers` cannot use the decoder's own KV cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class KoineForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """A reward model of our decoder: the score of each row at its last token that is not padding."""

    config_class = KoineConfig
    base_model_prefix = "decoder"

    def __init__(self, config: KoineConfig) -> None:
        from koine.model.reward_model import RewardModel

        super().__init__(config)
        decoder = Decoder(from_json(config.to_dict(), where=Path("config.json")))
        self.reward_model = RewardModel(decoder)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the decoder initialises its weights."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> KoineForSequenceClassification:
        """Open a local directory through `koine.model.load_reward_model`."""
        from koine.model.reward_model import load_reward_model

        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        reward_model = load_reward_model(Path(path), dtype=dtype if isinstance(dtype, torch.dtype) else None)
        model = cls(kwargs.get("config") or KoineConfig.from_pretrained(path))
        model.reward_model = reward_model
        model.eval()
        return model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as `RewardModel.save` does."""
        self.reward_model.save(Path(save_directory))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Compute scores `[batch, 1]` for `[batch, time]` ids."""
        hidden = self.reward_model(input_ids, attention_mask=attention_mask)
        counted = (input_ids != self.config.pad_token_id).int()
        last = (torch.arange(input_ids.shape[1], device=input_ids.device) * counted).argmax(dim=1)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return SequenceClassifierOutput(logits=self.reward_model.logits(hidden[rows, last]))
