"""Move a causal language model to another tokenizer: shared tokens keep their rows, new ones get a first guess."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from koine.errors import KoineWarning, UserError, did_you_mean
from koine.files import read_json, read_json_object, write_atomically, write_json
from koine.model.causal_lm import CausalLM, load_as_stored, quiet, require_transformers
from koine.model.decoder import Decoder
from koine.model.formats.carried_files import TOKENIZER_FILES, carry_files
from koine.model.formats.checksum import seal_folder
from koine.model.formats.directory import save_model
from koine.model.formats.library_config import skeleton
from koine.model.formats.weight_files import check_adapter
from koine.tokenizer import Tokenizer, load_tokenizer
from koine.tokenizer.embedding_init import METHODS, Method, auxiliary_vectors, initialise_rows
from koine.tokenizer.loaders import open_tokenizer
from koine.tokenizer.tokenizer import TEMPLATE
from koine.tokenizer.vocabulary_match import VocabularyMatch, match_vocabularies

RECORD = "vocabulary.json"
"""Which old token each new one came from; beside the model, so that the move can be understood and taken back."""
GENERATION = "generation_config.json"
OTHER_IDS = (
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "forced_decoder_ids", "sequence_bias",
)  # fmt: skip
TEXT_METHODS = ("focus", "distill")


@dataclass(frozen=True)
class Moved:
    """What moving a model to another tokenizer did."""

    shared: int
    spelled: int
    unspelled: int
    dropped: int
    rows: int
    padding: int
    """Rows beyond the old tokenizer's ids; they stand beyond the new one's ids too."""

    @property
    def reversible(self) -> bool:
        """Whether moving the model back gives the old weights again: nothing of the old vocabulary was dropped."""
        return self.dropped == 0


def move_model(
    model: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    *,
    method: Method = "subword-mean",
    texts: Iterable[str] | None = None,
    seed: int = 0,
) -> Moved:
    """Write to `out` the model of `model` with the vocabulary of `tokenizer`, its files and its chat template.

    Example:
        >>> from koine.model.adapt import move_model
        >>> moved = move_model("models/llama", "tokenizer", out="models/moved")
        >>> moved.shared, moved.reversible

    method: see `koine.tokenizer.embedding_init`; `focus` and `distill` learn from `texts`, in the languages that the new tokens are for.
    Tied embeddings stay tied; an untied head is initialised like the embedding, from its own rows. Rows beyond the tokenizer's ids (padding to
    a round number) stay beyond them, as many as there were. Where the new tokenizer has no chat template, the model keeps its own if the
    new vocabulary has its special tokens; otherwise a `KoineWarning` says that it is left behind.

    Raises `UserError` where the model has no tokenizer of its own or fewer rows than that has ids, or a method lacks its text.
    """
    model, tokenizer, out = Path(model), Path(tokenizer), Path(out)
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'", hint=did_you_mean(method, METHODS))
    sample = list(texts) if texts is not None and method in TEXT_METHODS else []
    if method in TEXT_METHODS and not any(text.strip() for text in sample):
        raise UserError(f"the method '{method}' learns from text", hint="give some with --text FILE")
    check_adapter(model)
    before, after = load_tokenizer(model), load_tokenizer(tokenizer)
    match = match_tokenizers(model, tokenizer)
    loaded = load_as_stored(model)
    assert isinstance(loaded, Decoder | CausalLM)
    inner = loaded.inner if isinstance(loaded, CausalLM) else loaded
    if isinstance(loaded, CausalLM):
        _refuse_other_tables(inner, model)
    auxiliary = None
    if method == "focus":
        auxiliary = auxiliary_vectors((after.encode(text) for text in sample), match.new_size)
    generator = torch.Generator().manual_seed(seed)

    def rows(old: Tensor) -> Tensor:
        new = initialise_rows(old.detach(), match, method=method, generator=generator, auxiliary=auxiliary)
        return torch.cat((new, old.detach()[match.old_size :].cpu()))

    embedding, head = _matrices(inner)
    padding = len(embedding) - match.old_size
    if padding < 0:
        raise UserError(
            f"the model has {len(embedding)} rows and its tokenizer {match.old_size} ids",
            where=model,
            hint="give the model its own tokenizer",
        )
    new_embedding = rows(embedding)
    new_head = None if head is None else rows(head)
    if method == "distill":
        from koine.model.adapt.token_distillation import distill_rows

        new_embedding = distill_rows(loaded, before, after, match, new_embedding, sample, seed=seed)
    _write(inner, out, tokenizer, after, new_embedding, new_head, match)
    carry_files(model, out, but=(*TOKENIZER_FILES, GENERATION), keep=True)
    if (model / GENERATION).is_file():
        _move_generation(model / GENERATION, out / GENERATION, match, after)
    _keep_template(before, after, model, tokenizer, out)
    write_json(
        out / RECORD,
        {
            "method": method,
            "seed": seed,
            "old_tokenizer": before.fingerprint,
            "new_tokenizer": after.fingerprint,
            "shared": {str(new): old for new, old in sorted(match.shared.items())},
            "dropped": list(match.dropped),
            "padding": padding,
        },
    )
    return Moved(
        shared=len(match.shared),
        spelled=len(match.pieces),
        unspelled=len(match.unspelled),
        dropped=len(match.dropped),
        rows=match.new_size,
        padding=padding,
    )


def _refuse_other_tables(inner: Any, model: Path) -> None:
    """Raise `UserError` for a model with more token tables than embedding and head.

    Such tables (one a layer, say) would keep the old order.
    """
    about = skeleton(read_json(model / "config.json"), where=model / "config.json")
    head = inner.get_output_embeddings()
    moved = [inner.get_input_embeddings().weight, *(() if head is None else head.parameters())]
    known = {
        name
        for name, one in inner.named_parameters(remove_duplicate=False)
        if any(one is other for other in moved)
    }
    others = sorted(set(about.vocabulary if about else ()) & set(inner.state_dict()) - known)
    if others:
        raise UserError(
            f"has another table of tokens than embedding and head ({others[0]}), which cannot be moved",
            where=model,
            hint="keep its tokenizer, or choose a model without one",
        )


def _move_generation(source: Path, target: Path, match: VocabularyMatch, tokenizer: Tokenizer) -> None:
    """Carry the model's settings of generation to the new ids.

    Several tokens may end an answer, and sampling has nothing to do with the tokenizer.
    """
    settings = read_json_object(source, hint="correct or remove it")
    for name, own in (
        ("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id), ("pad_token_id", tokenizer.pad_id),
    ):  # fmt: skip
        settings[name] = _moved_ids(settings.get(name), own, match)
    for name in [name for name in settings if name in OTHER_IDS]:
        # Of the old vocabulary, and no part that every tokenizer has.
        del settings[name]
    write_json(target, settings)


def _keep_template(before: Tokenizer, after: Tokenizer, model: Path, tokenizer: Path, out: Path) -> None:
    if before.chat_template is None or after.chat_template is not None:
        return
    template = before.chat_template
    lacking = [
        token
        for token in special_tokens(model)
        if token in template and token not in special_tokens(tokenizer)
    ]
    if not lacking:
        write_atomically(out / TEMPLATE, template)
        return
    warnings.warn(
        f"the model's chat template is left behind: the new tokenizer has none, and lacks '{lacking[0]}'"
        + (f" and {len(lacking) - 1} other special tokens of it" if len(lacking) > 1 else ""),
        KoineWarning,
        stacklevel=3,
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
    added = read_json_object(path / "tokenizer.json").get("added_tokens", [])
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
        ends = _moved_ids(sorted(model.end_ids), tokenizer.eos_id, match)
        moved.end_ids = frozenset(ends if isinstance(ends, list) else [ends])
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
        for holder in (model.config, getattr(model, "generation_config", None)):
            if holder is not None:
                setattr(holder, name, _moved_ids(getattr(holder, name, None), value, match))
    with quiet(require_transformers()):
        model.save_pretrained(out)
    seal_folder(out)
    tokenizer.save(out)


def _moved_ids(old: int | Sequence[int] | None, own: int, match: VocabularyMatch) -> int | list[int]:
    """What a list of ids (several tokens end an answer) becomes: those that the new vocabulary has, and its `own`; a single id becomes `own`."""
    if old is None or isinstance(old, int):
        return own
    new_of = {source: new for new, source in sorted(match.shared.items(), reverse=True)}
    return list(dict.fromkeys([*(new_of[one] for one in old if one in new_of), own]))


def _bias_rows(bias: nn.Parameter, match: VocabularyMatch) -> Tensor:
    new = torch.full((match.new_size,), float(bias.detach().float().mean()), dtype=bias.dtype)
    for index, source in match.shared.items():
        new[index] = bias.detach()[source]
    return torch.cat((new, bias.detach()[match.old_size :].cpu()))
