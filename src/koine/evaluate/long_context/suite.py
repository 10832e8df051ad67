"""The whole suite for one model directory, as one JSON value: tasks by length and depth, loss per position, attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.errors import KoineWarning, UserError, did_you_mean
from koine.evaluate.long_context import ruler
from koine.evaluate.long_context.haystack import (
    Haystack,
    document_texts,
    read_haystack,
    sample_haystack,
    sample_texts,
)
from koine.evaluate.long_context.prompts import Material, Prompt, material_of
from koine.evaluate.long_context.summary import Scored, by_group, by_task, examples, grids
from koine.evaluate.long_context.tasks import (
    ATTENTION,
    MEASURES,
    POSITIONS,
    TASKS,
    LeftOut,
    make_prompt,
    plan_cells,
)

if TYPE_CHECKING:
    from koine.tokenizer import Tokenizer

DEFAULT_LENGTHS = (512, 2048)
DEFAULT_DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
ATTENTION_DEPTH = 0.5
"""Where the needle is when attention is measured, as in arXiv 2501.18795."""
_DOCUMENTS = 8
# The haystack is so many times as long as the longest prompt, so that prompts differ.
_VARIETY = 4
# A model of transformers gives whole matrices of attention weights: no more float32 values than these at once (4 GiB).
_WHOLE_WEIGHTS = 2**30

Progress = Callable[[int, int, str], None]


def _say_nothing(done: int, total: int, what: str) -> None:
    """Progress that nobody watches."""


def evaluate_long_context(
    path: str | Path,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEFAULT_DEPTHS,
    tasks: Sequence[str] | None = None,
    samples: int = 4,
    language: str | None = None,
    haystack: Sequence[str | Path] = (),
    questions: str | Path | None = None,
    chat: bool = False,
    documents: int = _DOCUMENTS,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    say: Progress = _say_nothing,
) -> dict[str, Any]:
    """Measure the model directory `path` on long texts.

    Args:
        lengths: tokens of a prompt with its answer; by default `DEFAULT_LENGTHS` as far as the model's configuration allows.
        depths: per cent, where the needles of `DEPTH_TASKS` stand.
        tasks: of `MEASURES`; by default all that the language and the lengths allow.
        samples: prompts of a task at each length and depth; tasks without a depth have as many in all.
        language: of names and phrases, and of the haystack's records; by default the haystack's, English without one.
        haystack: files or folders of text; by default the built-in sample world.
        questions: records with `context`, `question`, `answers`; by default the sample world's.
        chat: prompts in the chat template.
        documents: for the loss per position.
        say: called with (prompts done, prompts in all, what is next).

    Returns:
        `{"settings", "tasks": {task: {length: {"value", "interval", "exact", "logprob", "samples"}}}, "groups": {group: {length: value}},
        "grid": {task: {"lengths", "depths", "score" | "exact" | "logprob": [[...] a row a depth]}}, "positions", "attention": {length:
        ...}, "left_out": [...], "examples": [...]}`; see docs/how-to/evaluate.md. The same arguments give the same result. A task that has no room
        at a length is null there, with the reason as "why"; where it was named, a `KoineWarning` says so before anything is run.

    Raises:
        UserError: for lengths beyond the model's, unknown tasks, a missing haystack, a task that was named and has room at no length.
    """
    import torch

    from koine.allocator import keep_freed_memory
    from koine.evaluate.long_context.scores import score_prompt
    from koine.evaluate.runner import check_vocabulary, open_model
    from koine.hardware import check_device
    from koine.languages import language as find_language
    from koine.model.formats.weight_files import check_adapter
    from koine.tokenizer import load_tokenizer

    chosen = _checked_tasks(tasks)
    _check_numbers(depths, samples, documents)
    for source in (*haystack, *([] if questions is None else [questions])):
        if not Path(source).exists():
            raise UserError("no such file or folder", where=source)
    if language is not None and language != "und":
        language = find_language(language).code
    check_device(device)
    keep_freed_memory()
    check_adapter(Path(path))
    tokenizer = load_tokenizer(Path(path))
    model = open_model(Path(path), dtype=getattr(torch, dtype), device=device)
    check_vocabulary(model, tokenizer.vocab_size, path)
    sizes = _checked_lengths(lengths, model.context_length, path)
    hay = _haystack(tokenizer, haystack, language, at_least=_VARIETY * max(sizes))
    material = material_of(tokenizer, hay, language=language, chat=chat)
    asked_questions = _question_set(questions, material, needed="question-answering" in (tasks or ()))
    cells, left_out = plan_cells(
        chosen,
        sizes,
        depths,
        samples,
        seed=seed,
        material=material,
        questions=asked_questions,
        strict=tasks is not None,
    )
    looks: dict[int, list[Prompt]] = {}
    if ATTENTION in chosen:
        looks, without = _attention_prompts(material, sizes, samples, seed=seed, strict=tasks is not None)
        left_out += without
    if tasks is not None:
        for one in left_out:
            warnings.warn(
                f"{one['task']} is left out at {one['length']} tokens: {one['why']}",
                KoineWarning,
                stacklevel=2,
            )
    scored: list[Scored] = []
    for number, cell in enumerate(cells):
        say(number, len(cells), f"{cell.task}, {cell.length:,} tokens")
        prompt = make_prompt(cell, seed=seed, material=material, questions=asked_questions)
        scored.append(Scored(cell, prompt, score_prompt(model, tokenizer, prompt, device=device)))
    result: dict[str, Any] = {
        "settings": {
            "lengths": sizes,
            "depths": list(depths),
            "samples": samples,
            "language": material.language,
            "phrases": material.phrases.code,
            "haystack": {"source": hay.source, "language": hay.language, "tokens": hay.tokens},
            "questions": None if asked_questions is None else asked_questions.source,
            "chat": chat,
            "seed": seed,
            "dtype": dtype,
        },
        "tasks": by_task(scored, [one for one in left_out if one["task"] in TASKS], seed=seed),
        "groups": by_group(scored),
        "grid": grids(scored, sizes, depths),
        "left_out": left_out,
        "examples": examples(scored, tokenizer),
    }
    if POSITIONS in chosen:
        say(len(cells), len(cells), "loss per position")
        result["positions"] = _positions(
            model, tokenizer, path, haystack, language, material, sizes, documents, seed=seed, device=device
        )
    if ATTENTION in chosen:
        say(len(cells), len(cells), "attention")
        result["attention"] = _attention(model, looks)
    return result


def _checked_tasks(tasks: Sequence[str] | None) -> list[str]:
    for task in tasks or ():
        if task not in MEASURES:
            raise UserError(f"unknown task '{task}'", where="--tasks", hint=did_you_mean(task, MEASURES))
    if tasks is not None and not tasks:
        raise UserError("no task is named", where="--tasks", hint=f"known: {', '.join(MEASURES)}")
    return [task for task in MEASURES if tasks is None or task in tasks]


def _check_numbers(depths: Sequence[float], samples: int, documents: int) -> None:
    if not depths or not all(0.0 <= depth <= 100.0 for depth in depths):
        raise UserError(
            f"the depths are {', '.join(f'{depth:g}' for depth in depths) or 'missing'}",
            where="--depths",
            hint="give per cents from 0 (the beginning) to 100 (just before the question)",
        )
    for name, number in (("samples", samples), ("documents", documents)):
        if number < 1:
            raise UserError(f"{name} is {number}", where=f"--{name}", hint="give at least 1")


def _checked_lengths(lengths: Sequence[int] | None, longest: int | None, path: str | Path) -> list[int]:
    if lengths is None:
        fitting = [length for length in DEFAULT_LENGTHS if longest is None or length <= longest]
        return fitting or [int(longest or 0)]
    if not lengths or min(lengths) < 16:
        raise UserError(
            f"the lengths are {', '.join(map(str, lengths)) or 'missing'}",
            where="--lengths",
            hint="give numbers of tokens, 16 or more",
        )
    if longest is not None and max(lengths) > longest:
        raise UserError(
            f"a length of {max(lengths)} is beyond the {longest} positions of the model",
            where=path,
            hint=f"give --lengths up to {longest}, or raise max_position_embeddings in its config.json to measure beyond",
        )
    return sorted(set(lengths))


def _haystack(
    tokenizer: Tokenizer, paths: Sequence[str | Path], language: str | None, *, at_least: int
) -> Haystack:
    if paths:
        known = None if language == "und" else language
        return read_haystack(paths, tokenizer.encode, at_least=at_least, language=known)
    return sample_haystack(
        tokenizer.encode, at_least=at_least, language="en" if language in (None, "und") else str(language)
    )


def _question_set(path: str | Path | None, material: Material, *, needed: bool) -> ruler.QuestionSet | None:
    """The questions; None where the language has none and the task was not asked for by name."""
    if path is not None:
        return ruler.read_questions(path, language=material.language)
    try:
        return ruler.sample_questions(material.language)
    except UserError:
        if needed:
            raise
        return None


def _positions(
    model: Any,
    tokenizer: Tokenizer,
    path: str | Path,
    haystack: Sequence[str | Path],
    language: str | None,
    material: Material,
    lengths: Sequence[int],
    documents: int,
    *,
    seed: int,
    device: str,
) -> dict[str, Any]:
    from koine.evaluate.long_context.positions import long_documents, loss_by_position
    from koine.tokenizer.loaders import open_tokenizer

    texts: Iterator[str]
    if haystack:
        wanted = (None, "und", material.language)
        texts = (
            text for text, code in document_texts(haystack) if language in (None, "und") or code in wanted
        )
    else:
        texts = sample_texts(material.haystack.language)
    found, joined = long_documents(
        texts, tokenizer.encode, bos=tokenizer.bos_id, length=max(lengths), count=documents
    )
    spelled = open_tokenizer(path)
    return {
        **loss_by_position(
            model,
            found,
            token_bytes=lambda token: len(spelled.token_bytes(token)),
            lengths=lengths,
            device=device,
            seed=seed,
        ),
        "joined": joined,
    }


def _attention_prompts(
    material: Material, lengths: Sequence[int], samples: int, *, seed: int, strict: bool
) -> tuple[dict[int, list[Prompt]], list[LeftOut]]:
    """The prompts whose attention is measured, by length, and the lengths that have no room; see `plan_cells`."""
    cells, left_out = plan_cells(
        ["single"], lengths, [100 * ATTENTION_DEPTH], samples, seed=seed, material=material, questions=None,
        strict=strict,
    )  # fmt: skip
    prompts: dict[int, list[Prompt]] = {}
    for cell in cells:
        prompts.setdefault(cell.length, []).append(make_prompt(cell, seed=seed, material=material))
    without: list[LeftOut] = [{**one, "task": ATTENTION} for one in left_out]
    return prompts, without


def _attention(model: Any, prompts: Mapping[int, list[Prompt]]) -> dict[str, Any]:
    from koine.evaluate.long_context.attention import attention_of_prompts, describe

    result: dict[str, Any] = {}
    for length, some in prompts.items():
        if _whole_weights(model, length) > _WHOLE_WEIGHTS:
            warnings.warn(
                f"attention is not measured at {length} tokens: this model's weights would not fit in memory",
                KoineWarning,
                stacklevel=2,
            )
            continue
        result[str(length)] = describe(model, attention_of_prompts(model, some), prompts=len(some))
    return result


def _whole_weights(model: Any, length: int) -> int:
    """Attention weights that are in memory at once where a model of transformers gives them whole; 0 for our decoder."""
    inner = getattr(model, "inner", None)
    if inner is None:
        return 0
    config = inner.config.get_text_config()
    return int(config.num_hidden_layers * config.num_attention_heads * length**2)
