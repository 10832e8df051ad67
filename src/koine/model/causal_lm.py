"""Any causal language model of `transformers` as a `LanguageModel`, and our own types behind `AutoModel`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from koine.errors import KoineWarning, UserError
from koine.extras import import_extra
from koine.files import read_json
from koine.hub import model_folder
from koine.model.families.reading import UnsupportedModelError
from koine.model.formats.carried_files import copy_tokenizer
from koine.model.formats.checksum import write_checksums
from koine.model.formats.config_json import decoder_types, read_config
from koine.model.formats.directory import load_model
from koine.model.formats.eos_ids import eos_ids
from koine.model.formats.opening import (
    check_described_size,
    check_fields,
    check_language_model,
    check_loaded_keys,
    check_model_class,
    check_tokenizer_hash,
    checked_weight_files,
    library_errors,
    read_model_config,
    stored_dtype,
)
from koine.model.formats.weight_files import has_only_pickled_weights, widest_dtype
from koine.model.language_model import LanguageModel, RemapIds, VocabularyTensors
from koine.model.lm_head import (
    LENGTH_FIELDS,
    LMHead,
    forward_arguments,
    forward_logits,
    head_hooks,
    inspect_head,
    linear_head,
)
from koine.model.packed_documents import DocumentIsolation, inspect_isolation, isolated_documents

if TYPE_CHECKING:
    from koine.model.lora.adapter import LoraAdapter

NOT_OF_THE_MODEL = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"})
"""Fields of a configuration that do not change the computation: versions, folders, precision."""


def require_transformers() -> Any:
    """Import `transformers`. Raises `UserError` where the extra is not, or only half, installed."""
    return import_extra("transformers", extra="hf", purpose="open this model")


class CausalLM(nn.Module):
    """A causal LM of `transformers` with the decoder's `forward` (hidden states) and `logits`.

    `logits(forward(tokens))` are the logits of the class's own forward pass. `koine.model.lm_head` finds out
    once, by experiment, whether they follow from the input of the output embedding. Where they do not,
    `forward` returns the logits themselves, and `logits` returns them unchanged. Whether `document_ids` may hold
    several documents in a row is found out by experiment too (`koine.model.packed_documents`).

    inner: the model of `transformers`; the name is part of the tensors' names in training checkpoints.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.eos_ids: frozenset[int] = frozenset()
        """EOS ids of the model's folder (`koine.model.formats.eos_ids`)."""
        self.adapter: LoraAdapter | None = None
        """The LoRA adapter that `koine.model.lora.adapter.add_lora` put on it."""
        self._arguments = forward_arguments(inner)
        self._head: LMHead | None = None
        self._isolation: DocumentIsolation | None = None

    @property
    def config(self) -> Any:
        """The text model's configuration, with the field names of `transformers`.

        `vocab_size` and `max_position_embeddings` are also names of our `ModelConfig`.
        """
        return self.inner.config.get_text_config()

    @property
    def head(self) -> LMHead:
        """The output head, from hidden states to logits; inspected at first use."""
        if self._head is None:
            self._head = inspect_head(self.inner)
        return self._head

    @property
    def architecture(self) -> str:
        """Name of the class in `transformers`."""
        return type(self.inner).__name__

    @property
    def context_length(self) -> int | None:
        """Most tokens of one sequence; None where the configuration names no limit.

        With RoPE of type `dynamic` it is `factor` times the context that the configuration names.
        """
        found = [getattr(self.config, name, None) for name in LENGTH_FIELDS]
        length = next((one for one in found if isinstance(one, int) and one > 0), None)
        rope = getattr(self.config, "rope_parameters", None) or {}
        dynamic = length is not None and rope.get("rope_type") == "dynamic"
        return int(length * rope["factor"]) if dynamic else length

    @property
    def isolation(self) -> DocumentIsolation:
        """How the class keeps packed documents apart; inspected at first use."""
        if self._isolation is None:
            self._isolation = inspect_isolation(self.inner)
        return self._isolation

    @property
    def isolates_documents(self) -> bool:
        """Whether `document_ids` may name several documents in a row; attention then stays inside each."""
        return self.isolation.way is not None

    @property
    def vocab_size(self) -> int:
        """Count of ids that the model both embeds and scores."""
        return min(self.head.vocab_size, int(self.inner.get_input_embeddings().weight.shape[0]))

    @property
    def input_embedding(self) -> nn.Module:
        """The embedding of the tokens."""
        module = self.inner.get_input_embeddings()
        assert isinstance(module, nn.Module)
        return module

    @property
    def output_weight(self) -> Tensor | None:
        """`[vocab, hidden]` where the logits are this matrix times `logit_scale`, soft-capped; else None.

        With it the loss can be computed in chunks. None where the model has a bias.
        """
        module = linear_head(self.inner)
        if not self.head.linear or type(module) is not nn.Linear:
            return None
        return None if module.bias is not None else module.weight

    @property
    def logit_scale(self) -> float:
        """Factor on the logits (Cohere multiplies, Granite divides)."""
        return self.head.scale

    @property
    def logit_softcap(self) -> float | None:
        """Soft cap of the scaled logits; None without one."""
        return self.head.cap if self.head.linear else None

    def forward(
        self, tokens: Tensor, *, document_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Compute the input of `logits` for `[batch, time]` ids.

        Returns hidden states `[batch, time, hidden]`, or the logits where the head is not linear.
        Raises `UserError` for several documents in a row if the class cannot keep them apart.
        """
        if document_ids is not None and attention_mask is not None:
            document_ids = torch.where(attention_mask != 0, document_ids, -1)
        if document_ids is not None and _several_documents(document_ids):
            way = self.isolation.way
            if way is None:
                raise UserError(
                    f"{self.architecture} cannot keep packed documents apart: {self.isolation.reason}",
                    hint="pack one document a row, or let attention cross documents",
                )
            with isolated_documents(self.inner, self._arguments, way, document_ids) as isolating:
                return self._forward({"input_ids": tokens, **isolating})
        if document_ids is not None:
            attention_mask = (document_ids >= 0).long()
        inputs: dict[str, Any] = {"input_ids": tokens}
        if attention_mask is not None and "attention_mask" in self._arguments:
            inputs["attention_mask"] = attention_mask
            if "position_ids" in self._arguments:
                # By default transformers counts padding on the left as positions.
                inputs["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return self._forward(inputs)

    def _forward(self, inputs: dict[str, Any]) -> Tensor:
        """Compute the input of `logits` from arguments of the class's forward."""
        if "use_cache" in self._arguments:
            inputs["use_cache"] = False
        module = linear_head(self.inner) if self.head.linear else None
        if module is None:
            return forward_logits(self.inner, inputs)
        states: list[Tensor] = []
        with head_hooks(module, states):
            self.inner(**inputs)
        return states[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the model's own logits `[..., vocab]` from the output of `forward`, `[..., hidden]`."""
        module = linear_head(self.inner) if self.head.linear else None
        if module is None:
            return hidden
        return self.head.apply(module(hidden))

    def describe(self) -> dict[str, Any]:
        """Return the fields of the configuration that determine the computation."""
        fields = self.inner.config.to_dict()
        return {name: value for name, value in fields.items() if name not in NOT_OF_THE_MODEL}

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass, as the class does it, or keep them.

        Raises `UserError` where the class cannot.
        """
        if enabled and not self.inner.supports_gradient_checkpointing:
            raise UserError(
                f"{self.architecture} has no gradient checkpointing in transformers",
                hint="leave it off, and choose a smaller micro batch",
            )
        # The newer name, where there is one: the older then warns.
        kind = "activation" if hasattr(self.inner, "activation_checkpointing_enable") else "gradient"
        if enabled:
            arguments = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(self.inner, f"{kind}_checkpointing_enable")(**arguments)
        else:
            getattr(self.inner, f"{kind}_checkpointing_disable")()

    def save(
        self, folder: Path, *, tokenizer: Path | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a model directory as `transformers` does, with checksums."""
        if weights is not None:
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    if name in weights:
                        parameter.copy_(weights[name])
        folder.mkdir(parents=True, exist_ok=True)
        with quiet_transformers(require_transformers()):
            self.inner.save_pretrained(folder)
        write_checksums(folder)
        copy_tokenizer(tokenizer, folder)

    def save_config(self, folder: Path, *, tokenizer: Path | None = None) -> None:
        """Write the configuration and the tokenizer's files."""
        self.inner.config.save_pretrained(folder)
        copy_tokenizer(tokenizer, folder)

    def fixed_tensors(self) -> dict[str, Tensor]:
        """Return nothing: `transformers` makes the buffers of its classes from the configuration."""
        return {}

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return the weights by their names in this module."""
        return self.state_dict()

    def load_stored_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the weights by tensors named as in this module."""
        self.load_state_dict(tensors)

    def vocabulary_tensors(self) -> VocabularyTensors:
        """Return the embedding, the head's matrix where it is not tied, and the head's bias."""
        embedding, head = self.inner.get_input_embeddings().weight, self.inner.get_output_embeddings()
        if head is None:
            return VocabularyTensors(embedding)
        tied = head.weight is embedding
        return VocabularyTensors(embedding, None if tied else head.weight, getattr(head, "bias", None))

    def set_vocabulary(
        self, tensors: VocabularyTensors, special_ids: Mapping[str, int], remap: RemapIds
    ) -> None:
        """Resize and replace the tensors with one row per token, and the ids of the configurations."""
        self.inner.resize_token_embeddings(len(tensors.embedding), mean_resizing=False)
        with torch.no_grad():
            self.inner.get_input_embeddings().weight.copy_(tensors.embedding)
            head = self.inner.get_output_embeddings()
            if tensors.head is not None:
                head.weight.copy_(tensors.head)
            if tensors.bias is not None:
                head.bias.copy_(tensors.bias)
        for holder in (self.inner.config, getattr(self.inner, "generation_config", None)):
            if holder is not None:
                for name, value in special_ids.items():
                    setattr(holder, name, remap(getattr(holder, name, None), value))
        self._head = None


def _several_documents(document_ids: Tensor) -> bool:
    """Return whether some row `[batch, time]` holds two documents; -1 is padding."""
    highest = document_ids.amax(dim=1, keepdim=True)
    return bool(((document_ids >= 0) & (document_ids != highest)).any())


def opens_as_decoder(path: Path) -> bool:
    """Return whether our decoder implements the model of the folder's `config.json`, and reads its weights."""
    if has_only_pickled_weights(path):
        return False
    value = read_json(path / "config.json")
    if not isinstance(value, dict) or value.get("model_type") not in decoder_types():
        return False
    try:
        read_config(path)
    except UnsupportedModelError:
        # For example a Phi-3 with LongRoPE, which transformers implements and our decoder does not.
        return False
    return True


def load_causal_lm(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LanguageModel:
    """Open our own decoder where it implements the model, else `AutoModelForCausalLM`.

    Args:
        path: folder of the model, or `OWNER/NAME` of the hub.
        dtype: of the weights; None: as stored.
        device: where they are loaded.

    Raises:
        UserError: the folder holds no causal LM that the installed `transformers` opens, or its weights are
            damaged, or the model is not causal.
    """
    path = model_folder(path)
    value = read_model_config(path)
    check_language_model(value, path)
    if opens_as_decoder(path):
        check_fields(value, path / "config.json")
        return load_model(path, dtype=dtype, device=device)
    return load_with_transformers(path, dtype=dtype, device=device)


def load_as_stored(path: Path) -> LanguageModel:
    """Load in the dtype that holds every stored weight without rounding, to train or rewrite the model."""
    path = model_folder(path)
    description = read_model_config(path)
    if opens_as_decoder(path) or description.get("quantization_config") is not None:
        return load_causal_lm(path)
    return load_causal_lm(path, dtype=widest_dtype(path))


def load_with_transformers(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    headless: str | None = None,
) -> CausalLM:
    """Open a folder with its class of `transformers`, also where our decoder implements it.

    Arguments and errors as in `load_causal_lm`.

    headless: name of a tensor that the folder has in place of the output matrix, which is then random; None:
        the folder is a causal LM's.
    """
    transformers = require_transformers()
    value = read_model_config(path)
    check_model_class(value, path, transformers)
    check_tokenizer_hash(path)
    files = checked_weight_files(path)
    quantised = value.get("quantization_config") is not None
    if not quantised:
        with quiet_transformers(transformers):
            check_described_size(path, value, files)
    wanted = dtype or (None if quantised else stored_dtype(files)) or "auto"
    inner, loaded = _open(path, wanted, transformers)
    if headless is not None:
        loaded = _without_head(loaded, headless)
    check_loaded_keys(path, loaded)
    unused = sorted(loaded.get("unexpected_keys") or ())
    if unused:
        warnings.warn(
            f"{path}: {len(unused)} tensors of the weights belong to no part of the model, "
            f"the first is {unused[0]}",
            KoineWarning,
            stacklevel=3,
        )
    if dtype == torch.float32 and not quantised:
        # Some classes load modules in another precision; they are computed in float32 too.
        inner.float()
    _check_finite(inner, path)
    model = CausalLM(inner).to(device).eval()
    model.eos_ids = eos_ids(path)
    _check_head(model, path)
    return model


def _open(path: Path, dtype: torch.dtype | str, transformers: Any) -> tuple[Any, dict[str, Any]]:
    """Open a folder as a causal LM; return the model and what `transformers` reports of its loading."""
    what = "transformers cannot open it as a causal LM"
    hint = "check config.json and the weights, or upgrade transformers"
    with library_errors(path, what, hint), quiet_transformers(transformers):
        inner, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return inner, loaded


def _without_head(loaded: dict[str, Any], other: str) -> dict[str, Any]:
    """Return what `transformers` reports of loading, but for the output matrix and the tensor in its place."""
    heads = ("lm_head.", "embed_out.", "output.")
    missing = [name for name in loaded.get("missing_keys") or () if not name.startswith(heads)]
    unexpected = [name for name in loaded.get("unexpected_keys") or () if name != other]
    return {**loaded, "missing_keys": missing, "unexpected_keys": unexpected}


def _check_head(model: CausalLM, path: Path) -> None:
    """Raise `UserError` for a model that cannot read text alone, gives NaN, or is an encoder."""
    with library_errors(
        path, f"{model.architecture} cannot read a text", "check config.json, or give a model of text"
    ):
        head = model.head
    if not head.finite:
        dtype = str(model.inner.dtype).removeprefix("torch.")
        raise UserError(
            f"{model.architecture} gives NaN or infinity for ordinary tokens in {dtype}",
            where=path,
            hint="check the numbers of config.json, or compute in float32",
        )
    if not head.causal:
        raise UserError(
            f"{model.architecture} is not causal (an encoder?): its earlier logits change with later tokens",
            where=path,
            hint="give a causal language model",
        )


def _check_finite(inner: Any, path: Path) -> None:
    for name, parameter in inner.named_parameters():
        if (
            parameter.is_floating_point()
            and parameter.dtype.itemsize > 1
            and not torch.isfinite(parameter).all()
        ):
            raise UserError(
                f"{name} holds NaN or infinity",
                where=path,
                hint="this checkpoint is broken; use an earlier one",
            )


@contextmanager
def quiet_transformers(transformers: Any) -> Iterator[None]:
    """Silence the progress bars and notes of `transformers` on standard error."""
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
    """Let the automatic classes of `transformers` open directories that it has no class for.

    `AutoConfig` and `AutoModelForCausalLM` open those whose `model_type` is `koine`;
    `AutoModelForSequenceClassification` opens reward models of every architecture of our decoder.
    """
    transformers = require_transformers()
    if "koine" in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        return
    from koine.model.formats.transformers_classes import KoineConfig, KoineForCausalLM

    transformers.AutoConfig.register("koine", KoineConfig)
    transformers.AutoModelForCausalLM.register(KoineConfig, KoineForCausalLM)
    from koine.model.formats.sequence_classification import register_classifiers

    register_classifiers()
