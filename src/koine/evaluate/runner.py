"""Everything that `koine evaluate` measures of one model directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.allocator import keep_freed_memory
from koine.errors import UserError
from koine.evaluate.records import ReadOptions, Records
from koine.hardware import check_device

if TYPE_CHECKING:
    from koine.model import LanguageModel


def evaluate_model(
    path: str | Path,
    *,
    data: Sequence[str | Path] = (),
    questions: Sequence[str | Path] = (),
    batch_size: int = 16,
    max_length: int | None = None,
    limit: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    reading: ReadOptions | None = None,
) -> dict[str, Any]:
    """Bits per byte on the documents of `data` and accuracy on `questions`, for the model directory `path`.

    data, questions: files, folders or `hub:OWNER/NAME`, read as `reading` says (by default: all of each, and a folder of several splits is
        refused).
    limit: at most this many records of each language, from the start of what was given.
    Returns the results of `bits_per_byte`, those of `question_accuracy` under `"questions"`, and for a mixture of experts under `"routing"` where it sends the
    tokens of each domain (of each language, where the records name no domain).
    Raises `UserError` where neither is given, or a path or the model cannot be read.
    """
    import torch

    from koine.evaluate.bits import bits_per_byte
    from koine.evaluate.question_answering import question_accuracy
    from koine.generate.cpu.prepacked_linear import pack
    from koine.model import Decoder
    from koine.model.formats.weight_files import check_adapter
    from koine.tokenizer import load_tokenizer

    if not data and not questions:
        raise UserError("nothing to evaluate on", hint="give --data PATH, --questions PATH, or both")
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit}", hint="give at least 1")
    if seed < 0:
        raise UserError(f"the seed is {seed}", hint="it must not be negative")
    documents = Records(data, reading or ReadOptions())
    asked = Records(questions, reading or ReadOptions(), questions=True)
    check_device(device)
    keep_freed_memory()
    check_adapter(Path(path))
    tokenizer = load_tokenizer(path)
    model = open_model(Path(path), dtype=getattr(torch, dtype), device=device)
    check_vocabulary(model, tokenizer.vocab_size, path)
    if isinstance(model, Decoder):
        # Packing is for our own matrices. It is only read from here on, and float32 products are two to four times as fast packed.
        pack(model)
    result: dict[str, Any] = {}
    if data:
        result = bits_per_byte(
            model,
            tokenizer,
            first_of_each(documents, limit),
            batch_size=batch_size,
            max_length=max_length,
            device=device,
            seed=seed,
        )
        if isinstance(model, Decoder) and model.config.mixture is not None:
            result["routing"] = _routing(model, tokenizer, first_of_each(documents, limit))
    if questions:
        result["questions"] = question_accuracy(
            model,
            tokenizer,
            first_of_each(asked, limit),
            batch_size=batch_size,
            device=device,
            seed=seed,
        )
    for records in (documents, asked):
        records.note_bad()
    return result


def _routing(model: Any, tokenizer: Any, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    from koine.evaluate.expert_routing import routing_shares

    texts: dict[str, list[str]] = {}
    for record in records:
        if "text" in record:
            texts.setdefault(str(record.get("domain") or record["language"]), []).append(record["text"])
    return {name: routing_shares(model, tokenizer, part).to_json() for name, part in texts.items()}


def open_model(path: Path, *, dtype: Any, device: str) -> LanguageModel:
    """Our decoder where the configuration is one that it covers, else the causal LM of `transformers`."""
    from koine.model import load_causal_lm

    return load_causal_lm(path, dtype=dtype, device=device)


def first_of_each(records: Iterable[Mapping[str, Any]], limit: int | None) -> Iterator[Mapping[str, Any]]:
    """The first `limit` records of each language; all where there is no limit."""
    seen: dict[Any, int] = {}
    for record in records:
        count = seen.get(record.get("language"), 0)
        if limit is None or count < limit:
            seen[record.get("language")] = count + 1
            yield record


def check_vocabulary(model: LanguageModel, size: int, path: str | Path) -> None:
    """Raise `UserError` where a tokenizer of `size` ids has more than the model."""
    if size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {size} ids and the model {model.vocab_size}",
            where=path,
            hint="these are not a pair; put the tokenizer that the model was trained with into its folder",
        )
