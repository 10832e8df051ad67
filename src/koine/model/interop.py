"""Any causal language model of `transformers` behind the decoder's interface, and our own types behind `AutoModel`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from koine.errors import KoineWarning, UserError, first_line
from koine.extras import import_extra
from koine.files import read_json
from koine.model.checkpoint import load_model
from koine.model.config_json import OWN_TYPES, UnsupportedModelError, read_config


def require_transformers() -> Any:
    """The `transformers` module; raises `UserError` where the extra is not installed or only half installed."""
    return import_extra("transformers", extra="hf", purpose="open this model")


class CausalLM(nn.Module):
    """A `transformers` causal LM with the decoder's `forward` (hidden states) and `logits`.

    Documents cannot be kept apart inside a row: `document_ids` other than one document and right padding are refused.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self._takes_positions = "position_ids" in inspect.signature(inner.base_model.forward).parameters

    @property
    def config(self) -> Any:
        """The configuration of the text model, by the names of transformers: those for the vocabulary and the context
        (`vocab_size`, `max_position_embeddings`) are also the decoder's."""
        return self.inner.config.get_text_config()

    @property
    def output_weight(self) -> Tensor | None:
        """`[vocab, hidden]` where the logits are this matrix times `logit_scale`, so that the loss can be computed in chunks;
        `None` where the model does more (a bias, soft-capping)."""
        head = self.inner.get_output_embeddings()
        if getattr(head, "bias", None) is not None or getattr(
            self.inner.config, "final_logit_softcapping", None
        ):
            return None
        weight = head.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def logit_scale(self) -> float:
        """Factor on the logits (Cohere multiplies, Granite divides)."""
        config = self.inner.config
        return float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )

    def forward(
        self, tokens: Tensor, *, document_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """`[batch, time]` ids to hidden states after the final norm, `[batch, time, hidden]`."""
        if document_ids is not None:
            if _several_documents(document_ids):
                raise UserError(
                    "this model cannot keep packed documents apart",
                    mend="pack one document a row, or let attention cross documents",
                )
            seen = document_ids >= 0
            attention_mask = (seen if attention_mask is None else seen & (attention_mask != 0)).long()
        inputs = {"input_ids": tokens, "attention_mask": attention_mask, "use_cache": False}
        if attention_mask is not None and self._takes_positions:
            # transformers counts padding on the left as positions unless it is told not to.
            inputs["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        out = self.inner.base_model(**inputs)
        hidden = out.last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., vocab]`, with the model's own scale and soft-capping."""
        logits = self.inner.get_output_embeddings()(hidden) * self.logit_scale
        cap = getattr(self.inner.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        assert isinstance(logits, Tensor)
        return logits


def _several_documents(document_ids: Tensor) -> bool:
    """Whether some row `[batch, time]` holds two documents; -1 is padding."""
    highest = document_ids.amax(dim=1, keepdim=True)
    return bool(((document_ids >= 0) & (document_ids != highest)).any())


def opens_as_decoder(path: Path) -> bool:
    """Whether the `config.json` of a folder says a model that our decoder implements."""
    value = read_json(path / "config.json")
    if not isinstance(value, dict) or value.get("model_type") not in OWN_TYPES:
        return False
    try:
        read_config(path)
    except UnsupportedModelError:
        # A Cohere with biases, say: transformers has the maths that ours lack.
        return False
    return True


def load_causal_lm(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Our own decoder where it implements the model, else `AutoModelForCausalLM` behind the same interface.

    Raises `UserError` where the directory holds no causal LM that the installed transformers can open.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise UserError("holds no config.json", where=path, mend="give the folder of a model")
    if (path / "checkpoint.json").exists():
        raise UserError(
            "is a checkpoint of a training",
            where=path,
            mend=f"make a model of it: koine model export {path} --format safetensors --out MODEL",
        )
    if opens_as_decoder(path):
        return load_model(path, dtype=dtype, device=device)
    transformers = require_transformers()
    try:
        with quiet(transformers):
            inner, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
            )
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"transformers cannot open it as a causal LM ({first_line(error)})",
            where=path,
            mend="check config.json and the weights, or upgrade transformers",
        ) from None
    missing = sorted(loaded["missing_keys"])
    if missing:
        warnings.warn(
            f"{path}: the weights lack {len(missing)} tensors, the first is {missing[0]}; they are random",
            KoineWarning,
            stacklevel=2,
        )
    return CausalLM(inner).to(device).eval()


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the bars and notes of `transformers` on standard error; what a user should know of, we say ourselves."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def register_with_transformers() -> None:
    """Let `AutoConfig` and `AutoModelForCausalLM` open directories whose `model_type` is `koine`."""
    transformers = require_transformers()
    if "koine" in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        return
    from koine.model.hf import KoineConfig, KoineForCausalLM

    transformers.AutoConfig.register("koine", KoineConfig)
    transformers.AutoModelForCausalLM.register(KoineConfig, KoineForCausalLM)
