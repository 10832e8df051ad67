"""Move a causal language model to another tokenizer: shared tokens keep their rows, new ones get a first guess."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from koine.errors import UserError, did_you_mean
from koine.files import write_json
from koine.model.checkpoint import save_model
from koine.model.decoder import Decoder
from koine.model.interop import CausalLM, load_causal_lm
from koine.model.mixture_files import carry_mixture_files
from koine.tokenizer import Tokenizer, load_tokenizer
from koine.tokenizer.foreign import open_tokenizer
from koine.tokenizer.initialise import METHODS, Method, auxiliary_vectors, initialise_rows
from koine.tokenizer.matching import VocabularyMatch, match_vocabularies

RECORD = "vocabulary.json"
"""Which old token each new one came from; beside the model, so that the move can be understood and taken back."""
TEXT_METHODS = ("focus", "distill")


@dataclass(frozen=True)
class Moved:
    """What moving a model to another tokenizer did."""

    shared: int
    spelled: int
    unspelled: int
    dropped: int
    rows: int

    @property
    def reversible(self) -> bool:
        """Whether moving the model back gives the old model again: nothing of the old vocabulary was dropped."""
        return self.dropped == 0


def move_model(
    model: Path,
    tokenizer: Path,
    out: Path,
    *,
    method: Method = "subword-mean",
    texts: Iterable[str] | None = None,
    seed: int = 0,
) -> Moved:
    """Write to `out` the model of `model` with the vocabulary of `tokenizer`, its files and its chat template.

    method: see `koine.tokenizer.initialise`; `focus` and `distill` learn from `texts`, in the languages that the new tokens are for.
    Tied embeddings stay tied; an untied head is initialised like the embedding, from its own rows.

    Raises `UserError` where the model has no tokenizer of its own, or a method lacks its text.
    """
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'", mend=did_you_mean(method, METHODS))
    if method in TEXT_METHODS and texts is None:
        raise UserError(f"the method '{method}' learns from text", mend="give some with --text FILE")
    before, after = load_tokenizer(model), load_tokenizer(tokenizer)
    match = match_tokenizers(model, tokenizer)
    loaded = load_causal_lm(model)
    assert isinstance(loaded, Decoder | CausalLM)
    inner = loaded.inner if isinstance(loaded, CausalLM) else loaded
    sample = list(texts) if texts is not None and method in TEXT_METHODS else []
    auxiliary = None
    if method == "focus":
        auxiliary = auxiliary_vectors((after.encode(text) for text in sample), match.new_size)
    generator = torch.Generator().manual_seed(seed)

    def rows(old: Tensor) -> Tensor:
        return initialise_rows(old.detach(), match, method=method, generator=generator, auxiliary=auxiliary)

    embedding, head = _matrices(inner)
    new_embedding = rows(embedding)
    new_head = None if head is None else rows(head)
    if method == "distill":
        from koine.model.distill import distill_rows

        new_embedding = distill_rows(loaded, before, after, match, new_embedding, sample, seed=seed)
    _write(inner, out, tokenizer, after, new_embedding, new_head, match)
    carry_mixture_files(model, out)
    write_json(
        out / RECORD,
        {
            "method": method,
            "seed": seed,
            "old_tokenizer": before.fingerprint,
            "new_tokenizer": after.fingerprint,
            "shared": {str(new): old for new, old in sorted(match.shared.items())},
            "dropped": list(match.dropped),
        },
    )
    return Moved(
        shared=len(match.shared),
        spelled=len(match.pieces),
        unspelled=len(match.unspelled),
        dropped=len(match.dropped),
        rows=match.new_size,
    )


def match_tokenizers(old: Path, new: Path) -> VocabularyMatch:
    """`match_vocabularies` of two folders, special tokens matched by name and by the part they play."""
    before, after = load_tokenizer(old), load_tokenizer(new)
    names = ("bos_id", "eos_id", "pad_id")
    return match_vocabularies(
        open_tokenizer(old),
        open_tokenizer(new),
        old_special=special_tokens(old),
        new_special=special_tokens(new),
        parts=[(getattr(after, name), getattr(before, name)) for name in names],
    )


def special_tokens(path: Path) -> dict[str, int]:
    """Special token -> id, of a folder with a `tokenizer.json`."""
    added = json.loads((path / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
    return {token["content"]: token["id"] for token in added if token.get("special")}


def _matrices(model: Any) -> tuple[Tensor, Tensor | None]:
    """The embedding, and the head's matrix where it is another one."""
    if isinstance(model, Decoder):
        return model.embedding.weight, None if model.config.tie_embeddings else model.head.weight
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    untied = head is not None and head.weight is not embedding
    return embedding, head.weight if untied else None


def _write(
    model: Any,
    out: Path,
    tokenizer_folder: Path,
    tokenizer: Tokenizer,
    embedding: Tensor,
    head: Tensor | None,
    match: VocabularyMatch,
) -> None:
    if isinstance(model, Decoder):
        config = replace(
            model.config,
            vocab_size=len(embedding),
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        )
        moved = Decoder(config).to(embedding.dtype)
        state = dict(model.state_dict())
        state["embedding.weight"] = embedding
        if head is not None:
            state["head.weight"] = head
        moved.load_state_dict(state)
        save_model(moved, out, tokenizer=tokenizer_folder)
        return
    out.mkdir(parents=True, exist_ok=True)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    new_bias = None if bias is None else _bias_rows(bias, match)
    model.resize_token_embeddings(len(embedding), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embedding)
        output = model.get_output_embeddings()
        if head is not None:
            output.weight.copy_(head)
        if new_bias is not None:
            output.bias.copy_(new_bias)
    for name, value in (
        ("bos_token_id", tokenizer.bos_id),
        ("eos_token_id", tokenizer.eos_id),
        ("pad_token_id", tokenizer.pad_id),
    ):
        setattr(model.config, name, value)
        if getattr(model, "generation_config", None) is not None:
            setattr(model.generation_config, name, value)
    model.save_pretrained(out)
    tokenizer.save(out)


def _bias_rows(bias: nn.Parameter, match: VocabularyMatch) -> Tensor:
    new = torch.full((match.new_size,), float(bias.detach().float().mean()), dtype=bias.dtype)
    for index, source in match.shared.items():
        new[index] = bias.detach()[source]
    return new
