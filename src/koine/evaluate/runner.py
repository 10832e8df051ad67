"""Evaluation of one model directory by the table of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.allocator import keep_freed_memory
from koine.errors import UserError
from koine.evaluate.records import RecordOptions, Records
from koine.fields import check_integer
from koine.hardware import check_device

if TYPE_CHECKING:
    from koine.model import LanguageModel
    from koine.tokenizer import Tokenizer


def evaluate_model(
    path: str | Path,
    *,
    data: Sequence[str | Path] = (),
    questions: Sequence[str | Path] = (),
    training_questions: Sequence[str | Path] = (),
    batch_size: int = 16,
    max_length: int | None = None,
    limit: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    record_options: RecordOptions | None = None,
) -> dict[str, Any]:
    """Evaluate the model directory `path` on documents, on questions, or on both.

    Args:
        path: a model with its tokenizer.
        data: documents; files, folders or data sets of the hub (`OWNER/NAME`).
        questions: questions with answers, likewise.
        training_questions: questions that the model was trained on, for the majority baseline; of a folder of
            several splits its training split.
        batch_size: documents or questions at a time; results do not depend on it.
        max_length: tokens of a window; by default as many as the model's configuration allows.
        limit: at most this many records of each language, from the start.
        device: `cpu`, `cuda`, `cuda:1`, ...
        dtype: `float32` or `bfloat16`.
        seed: of the bootstrap intervals.
        record_options: how records are read. By default all of each source, and an error for several splits.

    Returns:
        The results of `bits_per_byte`; under `"questions"` those of `question_accuracy`; for a mixture of
        experts under `"routing"` the shares of experts by domain (by language, where records name no domain).

    Raises:
        UserError: where neither is given, or a source or the model cannot be read.
    """
    if not data and not questions:
        raise UserError("nothing to evaluate on", hint="give --data PATH, --questions PATH, or both")
    if training_questions and not questions:
        raise UserError("training questions without questions", hint="give --questions PATH too")
    check_integer("the seed", seed, low=0)
    options = record_options or RecordOptions()
    records: dict[str, Records] = {}
    if data:
        records["documents"] = Records(data, options, limit=limit)
    if questions:
        records["questions"] = Records(questions, options, limit=limit, questions=True)
    trained_on = Records(
        training_questions, replace(options, split=None), questions=True, preferred_split="train"
    )
    model, tokenizer = load_for_evaluation(path, device=device, dtype=dtype)
    from koine.evaluate.evaluation import EvaluationSetup
    from koine.evaluate.table import run_evaluations
    from koine.generate.cpu.prepacked_linear import prepack
    from koine.model import Decoder

    if isinstance(model, Decoder):
        # The weights do not change from here on, and float32 products are two to four times as fast packed.
        prepack(model)
    setup = EvaluationSetup(
        model=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        device=device,
        seed=seed,
        training_questions=list(trained_on),
    )
    result = run_evaluations(setup, records)
    for some in (*records.values(), trained_on):
        some.warn_of_bad()
    return result


def load_for_evaluation(path: str | Path, *, device: str, dtype: str) -> tuple[LanguageModel, Tokenizer]:
    """Load a model directory and its tokenizer.

    The model is our decoder where the configuration allows it, else the causal LM of `transformers`.
    Raises `UserError` where they cannot be loaded, do not fit together, or the device is not there.
    """
    import torch

    from koine.model import load_causal_lm
    from koine.model.formats.weight_files import check_adapter
    from koine.tokenizer import load_tokenizer

    check_device(device)
    keep_freed_memory()
    check_adapter(Path(path))
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(Path(path), dtype=getattr(torch, dtype), device=device)
    _check_vocabulary(model, tokenizer.vocab_size, path)
    return model, tokenizer


def _check_vocabulary(model: LanguageModel, size: int, path: str | Path) -> None:
    """Raise `UserError` where a tokenizer of `size` ids has more than the model."""
    if size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {size} ids and the model {model.vocab_size}",
            where=path,
            hint="these are not a pair; put the tokenizer that the model was trained with into its folder",
        )
