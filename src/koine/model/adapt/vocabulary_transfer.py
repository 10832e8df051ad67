"""Move a causal language model to another tokenizer: shared tokens keep their rows, others get new ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from koine.errors import KoineWarning, UserError, did_you_mean
from koine.files import atomic_directory, read_json, read_json_object, write_atomically, write_json
from koine.model.causal_lm import CausalLM, load_as_stored
from koine.model.formats.carried_files import TOKENIZER_FILES, carry_files
from koine.model.formats.library_config import skeleton
from koine.model.formats.model_card import ModelCard, Parent, write_model_card
from koine.model.formats.weight_files import check_adapter
from koine.model.language_model import LanguageModel, VocabularyTensors
from koine.tokenizer import Tokenizer, load_tokenizer
from koine.tokenizer.embedding_init import METHODS, Method, auxiliary_vectors, initialise_rows
from koine.tokenizer.loaders import open_tokenizer
from koine.tokenizer.tokenizer import TEMPLATE
from koine.tokenizer.vocabulary_match import VocabularyMatch, match_vocabularies

RECORD = "vocabulary.json"
"""File beside the model: the old id of each shared token, so that the move can be reversed."""
GENERATION = "generation_config.json"
OTHER_IDS = (
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids", "sequence_bias",
)  # fmt: skip
"""Fields of `generation_config.json` with ids of the old vocabulary; they are removed."""
TEXT_METHODS = ("focus", "distill")


@dataclass(frozen=True)
class Moved:
    """The result of moving a model to another tokenizer: counts of tokens."""

    shared: int
    spelled: int
    unspelled: int
    dropped: int
    rows: int
    padding: int
    """Rows beyond the old tokenizer's ids, kept beyond the new one's."""

    @property
    def reversible(self) -> bool:
        """Whether moving the model back restores the old weights: no old token was dropped."""
        return self.dropped == 0


def move_model(
    model: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    *,
    method: Method = "subword-mean",
    texts: Iterable[str] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Moved:
    """Write the model of a folder with the vocabulary of another tokenizer.

    Example:
        >>> from koine.model.adapt import move_model
        >>> moved = move_model("models/llama", "tokenizer", out="models/moved")
        >>> moved.shared, moved.reversible

    Tied embeddings stay tied. An untied head is initialised like the embedding, from its own rows. Rows
    beyond the tokenizer's ids (padding to a round number) stay beyond them, as many as before.

    Args:
        model: folder of the model with its tokenizer.
        tokenizer: folder of the new tokenizer. Where it has no chat template, the model keeps its own if the
            new vocabulary has the template's special tokens; otherwise a `KoineWarning` reports that it is
            dropped.
        out: folder to write.
        method: how new rows are initialised, see `koine.tokenizer.embedding_init`.
        texts: `focus` and `distill` learn from them, in the languages of the new tokens.
        seed: of random rows and of the order of training.
        overwrite: replace `out` if it exists.

    Raises:
        UserError: the model has no tokenizer or fewer rows than its tokenizer has ids, the method lacks
            texts, or `out` exists.
    """
    model, tokenizer = Path(model), Path(tokenizer)
    with atomic_directory(Path(out), overwrite=overwrite, reads=[model, tokenizer]) as folder:
        return write_moved_model(model, tokenizer, folder, method=method, texts=texts, seed=seed)


def write_moved_model(
    model: Path,
    tokenizer: Path,
    out: Path,
    *,
    method: Method = "subword-mean",
    texts: Iterable[str] | None = None,
    seed: int = 0,
) -> Moved:
    """Write what `move_model` writes into the folder `out`, file by file."""
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'", hint=did_you_mean(method, METHODS))
    sample = list(texts) if texts is not None and method in TEXT_METHODS else []
    if method in TEXT_METHODS and not any(text.strip() for text in sample):
        raise UserError(f"the method '{method}' learns from text", hint="give some with --text FILE")
    check_adapter(model)
    before, after = load_tokenizer(model), load_tokenizer(tokenizer)
    match = match_tokenizers(model, tokenizer)
    loaded = load_as_stored(model)
    if isinstance(loaded, CausalLM):
        # Our decoder has no other tables of tokens; a class of transformers may have one per layer.
        _check_other_tables(loaded, model)
    padding = len(loaded.vocabulary_tensors().embedding) - match.old_size
    if padding < 0:
        raise UserError(
            f"the model has {match.old_size + padding} rows and its tokenizer {match.old_size} ids",
            where=model,
            hint="give the model its own tokenizer",
        )
    tensors = _initialised_tensors(loaded, before, after, match, method, sample, seed)
    loaded.set_vocabulary(
        tensors,
        {"bos_token_id": after.bos_id, "eos_token_id": after.eos_id, "pad_token_id": after.pad_id},
        partial(_moved_ids, match=match),
    )
    loaded.save(out, tokenizer=tokenizer)
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
    moved = Moved(
        shared=len(match.shared),
        spelled=len(match.pieces),
        unspelled=len(match.unspelled),
        dropped=len(match.dropped),
        rows=match.new_size,
        padding=padding,
    )
    write_model_card(out, _card(model, tokenizer, moved, method, seed))
    return moved


def _card(model: Path, tokenizer: Path, moved: Moved, method: Method, seed: int) -> ModelCard:
    return ModelCard(
        title=f"{model.absolute().name} with another tokenizer",
        summary=f"Moved to the tokenizer `{tokenizer.absolute().name}` of {moved.rows:,} tokens: {moved.shared:,} "
        f"keep their embeddings, {moved.spelled + moved.unspelled:,} have new ones (`{method}`), and "
        f"{moved.dropped:,} tokens of the old vocabulary are gone. The new embeddings are not trained.",
        parents=(Parent(path=model, role="model before"),),
        relation="finetune",
        parameters={"method": method, "seed": seed},
        tags=("vocabulary-transfer",),
    )


def _initialised_tensors(
    loaded: LanguageModel,
    before: Tokenizer,
    after: Tokenizer,
    match: VocabularyMatch,
    method: Method,
    texts: Sequence[str],
    seed: int,
) -> VocabularyTensors:
    """Return embedding, head and bias in the new vocabulary; rows beyond the old tokenizer's ids follow."""
    auxiliary = None
    if method == "focus":
        auxiliary = auxiliary_vectors((after.encode(text) for text in texts), match.new_size)
    generator = torch.Generator().manual_seed(seed)

    def initialised(matrix: Tensor) -> Tensor:
        new = initialise_rows(matrix.detach(), match, method=method, generator=generator, auxiliary=auxiliary)
        return torch.cat((new, matrix.detach()[match.old_size :].cpu()))

    old = loaded.vocabulary_tensors()
    embedding = initialised(old.embedding)
    head = None if old.head is None else initialised(old.head)
    if method == "distill":
        from koine.model.adapt.token_distillation import distill_rows

        embedding = distill_rows(loaded, before, after, match, embedding, texts, seed=seed)
    return VocabularyTensors(embedding, head, None if old.bias is None else _bias_rows(old.bias, match))


def _check_other_tables(loaded: CausalLM, model: Path) -> None:
    """Raise `UserError` for a model with more token tables than embedding and head.

    Such tables (one per layer, for example) would keep the old order of rows.
    """
    about = skeleton(read_json(model / "config.json"), where=model / "config.json")
    inner = loaded.inner
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
    """Map the ids of `generation_config.json` to the new vocabulary; settings of sampling stay."""
    settings = read_json_object(source, hint="correct or remove it")
    for name, own in (
        ("bos_token_id", tokenizer.bos_id),
        ("eos_token_id", tokenizer.eos_id),
        ("pad_token_id", tokenizer.pad_id),
    ):  # fmt: skip
        settings[name] = _moved_ids(settings.get(name), own, match)
    for name in [name for name in settings if name in OTHER_IDS]:
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
    """Match two folders' vocabularies, special tokens by name and by role (BOS, EOS, padding)."""
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
    """Return the ids of the special tokens of a folder's `tokenizer.json`."""
    added = read_json_object(path / "tokenizer.json").get("added_tokens", [])
    return {token["content"]: token["id"] for token in added if token.get("special")}


def _moved_ids(old: int | Sequence[int] | None, own: int, match: VocabularyMatch) -> int | list[int]:
    """Map the ids of a field, a single id or a list (several tokens may end a text).

    A single id becomes `own`. A list becomes those of its ids that the new vocabulary has, and `own`.
    """
    if old is None or isinstance(old, int):
        return own
    new_of = {source: new for new, source in sorted(match.shared.items(), reverse=True)}
    return list(dict.fromkeys([*(new_of[one] for one in old if one in new_of), own]))


def _bias_rows(bias: Tensor, match: VocabularyMatch) -> Tensor:
    new = torch.full((match.new_size,), float(bias.detach().float().mean()), dtype=bias.dtype)
    for index, source in match.shared.items():
        new[index] = bias.detach()[source]
    return torch.cat((new, bias.detach()[match.old_size :].cpu()))
