"""The interface of a causal language model: our decoder and any model of `transformers` implement it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from torch import Tensor, nn

if TYPE_CHECKING:
    from koine.model.lora.adapter import LoraAdapter

RemapIds = Callable[[int | Sequence[int] | None, int], int | list[int]]
"""`remap(ids, own)`: the ids of a field in the new vocabulary, whose own id for the field is `own`."""


@dataclass(frozen=True)
class VocabularyTensors:
    """The tensors with one row per token.

    embedding: `[vocab, hidden]`.
    head: `[vocab, hidden]`; None where it is tied to the embedding.
    bias: the head's, `[vocab]`; None where it has none.
    """

    embedding: Tensor
    head: Tensor | None = None
    bias: Tensor | None = None


class LanguageModel(Protocol):
    """A causal language model: `logits(model(tokens))` scores the next token at every position.

    `Decoder` and `CausalLM` implement it, both as `nn.Module`. A further model needs these members and no
    base class. An `isinstance` check of `Decoder` is left only where its own tensors are needed: its KV
    cache, its packed weights, its attention weights, its `ModelConfig`.
    """

    training: bool
    eos_ids: frozenset[int]
    """EOS ids of the model's folder (`koine.model.formats.eos_ids`)."""
    adapter: LoraAdapter | None
    """The LoRA adapter on it, which is all that training then changes and saves."""

    # --- description ---

    @property
    def architecture(self) -> str:
        """Name of the class that computes the model, for messages."""
        ...

    @property
    def context_length(self) -> int | None:
        """Most tokens of one sequence; None where the configuration names no limit."""
        ...

    @property
    def vocab_size(self) -> int:
        """Count of ids that the model both embeds and scores."""
        ...

    @property
    def isolates_documents(self) -> bool:
        """Whether `document_ids` may name several documents in a row; attention then stays inside each."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the fields of the configuration that determine the computation."""
        ...

    # --- computation ---

    def __call__(
        self, tokens: Tensor, *, document_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Compute the input of `logits` for `[batch, time]` ids.

        Args:
            tokens: `[batch, time]`.
            document_ids: `[batch, time]`, equal within a document, -1 for padding.
            attention_mask: `[batch, time]`, 0 for padding on the left or on the right.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits `[..., vocab]` from what the model returned, `[..., hidden]`."""
        ...

    @property
    def output_weight(self) -> Tensor | None:
        """`[vocab, hidden]` where the logits are this matrix times `logit_scale`, soft-capped; else None.

        With it the loss can be computed in chunks.
        """
        ...

    @property
    def logit_scale(self) -> float:
        """Factor on the logits."""
        ...

    @property
    def logit_softcap(self) -> float | None:
        """Cap of the scaled logits, which are then `cap * tanh(logits / cap)`; None without one."""
        ...

    @property
    def input_embedding(self) -> nn.Module:
        """The module that looks up the rows of `[batch, time]` ids; its `weight` is `[vocab, hidden]`."""
        ...

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass, or keep them.

        Raises `UserError` where the model cannot recompute them.
        """
        ...

    # --- storage ---

    def save(
        self, folder: Path, *, tokenizer: Path | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a model directory.

        Args:
            folder: made if needed.
            tokenizer: a folder whose tokenizer's files are copied.
            weights: by parameter name, written in place of the model's own.
        """
        ...

    def save_config(self, folder: Path, *, tokenizer: Path | None = None) -> None:
        """Write what a model directory holds besides the weights, into an existing folder."""
        ...

    def fixed_tensors(self) -> dict[str, Tensor]:
        """Return the saved tensors that are not trained, by their names in the state dict."""
        ...

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return the weights under the names and shapes of their file: nothing is fused."""
        ...

    def load_stored_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the weights by tensors named as `stored_tensors` names them."""
        ...

    def vocabulary_tensors(self) -> VocabularyTensors:
        """Return the tensors with one row per token."""
        ...

    def set_vocabulary(
        self, tensors: VocabularyTensors, special_ids: Mapping[str, int], remap: RemapIds
    ) -> None:
        """Replace the tensors with one row per token, in place, and the ids of the configuration.

        Args:
            tensors: of any number of rows.
            special_ids: the new tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`.
            remap: maps fields that hold a list of ids.
        """
        ...

    # --- of `nn.Module` ---

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def train(self, mode: bool = True) -> Self: ...
    def eval(self) -> Self: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...
