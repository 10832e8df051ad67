"""The long-context suite: tasks by length and depth, loss per position, attention, as one JSON value."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.data.piped import is_piped
from koine.errors import KoineWarning, UserError, did_you_mean
from koine.evaluate.long_context import ruler
from koine.evaluate.long_context.haystack import (
    Haystack,
    document_texts,
    read_haystack,
    sample_haystack,
    sample_texts,
)
from koine.evaluate.long_context.prompts import Material, Prompt, make_material
from koine.evaluate.long_context.summary import Scored, by_group, by_task, examples, grids
from koine.evaluate.long_context.tasks import (
    ATTENTION,
    MEASURES,
    POSITIONS,
    TASKS,
    Cell,
    LeftOut,
    make_prompt,
    plan_cells,
)
from koine.fields import check_integer

if TYPE_CHECKING:
    from koine.tokenizer import Tokenizer

DEFAULT_LENGTHS = (512, 2048)
DEFAULT_DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
ATTENTION_DEPTH = 0.5
"""Depth of the needle when attention is measured, as in arXiv 2501.18795."""
# Length of the haystack in longest prompts, so that prompts differ.
_VARIETY = 4
# A model of `transformers` returns whole attention matrices: at most this many float32 values (4 GiB).
_MOST_WEIGHTS = 2**30

Progress = Callable[[int, int, str], None]
"""Called with the number of finished prompts, of all prompts, and what comes next."""


def _no_progress(done: int, total: int, current: str) -> None:
    """Ignore progress."""


@dataclass(frozen=True, kw_only=True)
class LongContextOptions:
    """Settings of the suite: tasks, lengths, depths and texts.

    Attributes:
        lengths: tokens of a prompt with its answer; by default `DEFAULT_LENGTHS` as far as the model allows.
        depths: places of the needles of `DEPTH_TASKS`, in per cent.
        tasks: names from `MEASURES`; by default all that the language and the lengths allow.
        samples: prompts of a task at each length and depth; tasks without a depth have as many in all.
        language: of names, phrases and haystack; by default the haystack's, or English.
        haystack: files or folders of text; by default the built-in sample world.
        questions: records with `context`, `question`, `answers`; by default the sample world's.
        chat: prompts in the chat template.
        documents: number of documents for the loss per position.
        seed: of prompts and intervals.
    """

    lengths: Sequence[int] | None = None
    depths: Sequence[float] = DEFAULT_DEPTHS
    tasks: Sequence[str] | None = None
    samples: int = 4
    language: str | None = None
    haystack: Sequence[str | Path] = ()
    questions: str | Path | None = None
    chat: bool = False
    documents: int = 8
    seed: int = 0

    @property
    def measures(self) -> list[str]:
        """The chosen measures, in the order of `MEASURES`."""
        return [name for name in MEASURES if self.tasks is None or name in self.tasks]

    def check(self) -> None:
        """Raise `UserError` for an unknown task, an impossible number, or a source that does not exist."""
        for task in self.tasks or ():
            if task not in MEASURES:
                raise UserError(f"unknown task '{task}'", where="--tasks", hint=did_you_mean(task, MEASURES))
        if self.tasks is not None and not self.tasks:
            raise UserError("no task is named", where="--tasks", hint=f"known: {', '.join(MEASURES)}")
        if not self.depths or not all(0.0 <= depth <= 100.0 for depth in self.depths):
            raise UserError(
                f"the depths are {', '.join(f'{depth:g}' for depth in self.depths) or 'missing'}",
                where="--depths",
                hint="give per cents from 0 (the beginning) to 100 (just before the question)",
            )
        check_integer("samples", self.samples, low=1, where="--samples")
        check_integer("documents", self.documents, low=1, where="--documents")
        for source in (*self.haystack, *([] if self.questions is None else [self.questions])):
            if not (is_piped(source) or Path(source).exists()):
                raise UserError("no such file or folder", where=source)


@dataclass(frozen=True)
class _Inputs:
    """Text for prompts, and the prompts to score."""

    lengths: list[int]
    material: Material
    questions: ruler.QuestionSet | None
    cells: list[Cell]
    attention_prompts: dict[int, list[Prompt]]
    left_out: list[LeftOut]


def evaluate_long_context(
    path: str | Path,
    options: LongContextOptions | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress = _no_progress,
) -> dict[str, Any]:
    """Evaluate the model directory `path` on long texts; the same arguments give the same result.

    A task that has no room at a length is null there, with the reason as `why`. Where the task was named, a
    `KoineWarning` says so before any prompt runs.

    Returns:
        `{"settings", "tasks": {task: {length: {"value", "interval", "exact", "logprob", "samples"}}},
        "groups": {group: {length: value}}, "grid": {task: {"lengths", "depths", "score" | "exact" |
        "logprob": [[...] a row a depth]}}, "positions", "attention": {length: ...}, "left_out": [...],
        "examples": [...]}`; see docs/how-to/evaluate.md.

    Raises:
        UserError: for lengths beyond the model's, unknown tasks, a missing haystack, a task that was
            named and has room at no length.
    """
    from koine.evaluate.long_context.scores import score_prompt
    from koine.evaluate.runner import load_for_evaluation
    from koine.languages import language as find_language

    options = options or LongContextOptions()
    options.check()
    language = options.language
    if language is not None and language != "und":
        language = find_language(language).code
    model, tokenizer = load_for_evaluation(path, device=device, dtype=dtype)
    lengths = _checked_lengths(options.lengths, model.context_length, path)
    inputs = _prepare(options, tokenizer, lengths, language)
    _warn_of_named(inputs.left_out, options)
    scored: list[Scored] = []
    for number, cell in enumerate(inputs.cells):
        progress(number, len(inputs.cells), f"{cell.task}, {cell.length:,} tokens")
        prompt = make_prompt(cell, seed=options.seed, material=inputs.material, questions=inputs.questions)
        scored.append(Scored(cell, prompt, score_prompt(model, tokenizer, prompt, device=device)))
    left_out_tasks = [one for one in inputs.left_out if one["task"] in TASKS]
    result: dict[str, Any] = {
        "settings": _settings(options, inputs, dtype),
        "tasks": by_task(scored, left_out_tasks, seed=options.seed),
        "groups": by_group(scored),
        "grid": grids(scored, lengths, options.depths),
        "left_out": inputs.left_out,
        "examples": examples(scored, tokenizer),
    }
    if POSITIONS in options.measures:
        progress(len(scored), len(scored), "loss per position")
        texts = _document_texts(options, language, inputs.material)
        result["positions"] = _positions(
            model, tokenizer, path, texts, lengths, options.documents, seed=options.seed, device=device
        )
    if ATTENTION in options.measures:
        progress(len(scored), len(scored), "attention")
        result["attention"] = _attention(model, inputs.attention_prompts)
    return result


def _prepare(
    options: LongContextOptions, tokenizer: Tokenizer, lengths: list[int], language: str | None
) -> _Inputs:
    """Read haystack and questions, and plan the prompts."""
    haystack = _haystack(tokenizer, options.haystack, language, at_least=_VARIETY * max(lengths))
    material = make_material(tokenizer, haystack, language=language, chat=options.chat)
    strict = options.tasks is not None
    needed = "question-answering" in (options.tasks or ())
    questions = _question_set(options.questions, material, needed=needed)
    cells, left_out = plan_cells(
        options.measures,
        lengths,
        options.depths,
        options.samples,
        seed=options.seed,
        material=material,
        questions=questions,
        strict=strict,
    )
    attention_prompts: dict[int, list[Prompt]] = {}
    if ATTENTION in options.measures:
        attention_prompts, without_room = _attention_prompts(
            material, lengths, options.samples, seed=options.seed, strict=strict
        )
        left_out += without_room
    return _Inputs(lengths, material, questions, cells, attention_prompts, left_out)


def _warn_of_named(left_out: Sequence[LeftOut], options: LongContextOptions) -> None:
    if options.tasks is None:
        return
    for one in left_out:
        warnings.warn(
            f"{one['task']} is left out at {one['length']} tokens: {one['why']}", KoineWarning, stacklevel=3
        )


def _settings(options: LongContextOptions, inputs: _Inputs, dtype: str) -> dict[str, Any]:
    material = inputs.material
    haystack = material.haystack
    return {
        "lengths": inputs.lengths,
        "depths": list(options.depths),
        "samples": options.samples,
        "language": material.language,
        "phrases": material.phrases.code,
        "haystack": {"source": haystack.source, "language": haystack.language, "tokens": haystack.tokens},
        "questions": None if inputs.questions is None else inputs.questions.source,
        "chat": options.chat,
        "seed": options.seed,
        "dtype": dtype,
    }


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
            hint=f"give --lengths up to {longest}, "
            "or raise max_position_embeddings in its config.json to measure beyond",
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
    """Read the questions; `None` where the language has none and the task was not named (`needed`)."""
    if path is not None:
        return ruler.read_questions(path, language=material.language)
    try:
        return ruler.sample_questions(material.language)
    except UserError:
        if needed:
            raise
        return None


def _document_texts(options: LongContextOptions, language: str | None, material: Material) -> Iterator[str]:
    """Yield the documents for the loss per position, in the language of the prompts."""
    if not options.haystack:
        yield from sample_texts(material.haystack.language)
        return
    wanted = (None, "und", material.language)
    for text, code in document_texts(options.haystack):
        if language in (None, "und") or code in wanted:
            yield text


def _positions(
    model: Any,
    tokenizer: Tokenizer,
    path: str | Path,
    texts: Iterator[str],
    lengths: Sequence[int],
    count: int,
    *,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Measure the loss per position on `count` documents of the greatest length."""
    from koine.evaluate.long_context.positions import long_documents, loss_by_position
    from koine.tokenizer.loaders import open_tokenizer

    documents, joined = long_documents(
        texts, tokenizer.encode, bos=tokenizer.bos_id, length=max(lengths), count=count
    )
    opened = open_tokenizer(path)
    losses = loss_by_position(
        model,
        documents,
        token_bytes=lambda token: len(opened.token_bytes(token)),
        lengths=lengths,
        device=device,
        seed=seed,
    )
    return {**losses, "joined": joined}


def _attention_prompts(
    material: Material, lengths: Sequence[int], samples: int, *, seed: int, strict: bool
) -> tuple[dict[int, list[Prompt]], list[LeftOut]]:
    """Make the prompts for the attention by length, and list lengths without room; see `plan_cells`."""
    cells, left_out = plan_cells(
        ["single"],
        lengths,
        [100 * ATTENTION_DEPTH],
        samples,
        seed=seed,
        material=material,
        questions=None,
        strict=strict,
    )
    prompts: dict[int, list[Prompt]] = {}
    for cell in cells:
        prompts.setdefault(cell.length, []).append(make_prompt(cell, seed=seed, material=material))
    without_room: list[LeftOut] = [{**one, "task": ATTENTION} for one in left_out]
    return prompts, without_room


def _attention(model: Any, prompts: Mapping[int, list[Prompt]]) -> dict[str, Any]:
    from koine.evaluate.long_context.attention import attention_of_prompts, describe

    result: dict[str, Any] = {}
    for length, of_length in prompts.items():
        if _attention_weights(model, length) > _MOST_WEIGHTS:
            warnings.warn(
                f"attention is not measured at {length} tokens: this model's weights would not fit in memory",
                KoineWarning,
                stacklevel=2,
            )
            continue
        attention = attention_of_prompts(model, of_length)
        result[str(length)] = describe(model, attention, prompts=len(of_length))
    return result


def _attention_weights(model: Any, length: int) -> int:
    """Count the attention weights in memory at once for a model of `transformers`; 0 for our decoder."""
    inner = getattr(model, "inner", None)
    if inner is None:
        return 0
    config = inner.config.get_text_config()
    return int(config.num_hidden_layers * config.num_attention_heads * length**2)
