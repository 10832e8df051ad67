"""The step that evaluates a model, and the probe that a training calls on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.allocator import keep_freed_memory
from koine.files import write_json
from koine.plan import step
from koine.steps import estimates
from koine.steps.corpus_files import existing, load_roles, read_lines

if TYPE_CHECKING:
    from koine.model import Decoder
    from koine.model.language_model import LanguageModel
    from koine.tokenizer import Tokenizer


@step(version="2", estimate=estimates.evaluation)
def evaluate_model(
    corpus: Path,
    model: Path,
    *,
    documents_per_language: int,
    questions_per_language: int,
    seed: int,
    threads: int,
    out: Path,
) -> None:
    """Bits per byte on held-out documents, and accuracy on the test questions where the corpus has some."""
    import torch

    from koine.evaluate.evaluation import EvaluationSetup
    from koine.evaluate.table import run_evaluations
    from koine.model import load_model
    from koine.tokenizer import load_tokenizer

    keep_freed_memory()
    torch.set_num_threads(threads)
    roles = load_roles(corpus)
    tokenizer = load_tokenizer(model)
    decoder = load_model(model, dtype=torch.float32)
    heldout = existing(corpus, "documents-heldout", roles.all)
    records = {"documents": list(_first(heldout.values(), documents_per_language))}
    questions = existing(corpus, "questions/test", roles.chat)
    if questions and questions_per_language:
        records["questions"] = list(_first(questions.values(), questions_per_language))
    setup = EvaluationSetup(model=decoder, tokenizer=tokenizer, seed=seed)
    results = run_evaluations(setup, records)
    write_json(out / "samples.json", _samples(decoder, tokenizer, corpus, roles.chat))
    write_json(out / "evaluation.json", results)
    metrics = {"bits_per_byte": results["overall"]["bits_per_byte"]}
    write_json(out / "metrics.json", metrics)


def _samples(
    model: Decoder, tokenizer: Tokenizer, corpus: Path, codes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """One question a language with the model's own answer, for the report."""
    from koine.generate import generate
    from koine.generate.sampling import Sampling

    folder = "questions/test" if existing(corpus, "questions/test", codes) else "questions/train"
    records = list(_first(existing(corpus, folder, codes).values(), 1))
    asked = [
        record["messages"][:-1] if record["messages"][-1]["role"] == "assistant" else record["messages"]
        for record in records
    ]
    prompts = [tokenizer.encode_messages(messages, generation_prompt=True)[0] for messages in asked]
    if not prompts:
        return []
    stops = (tokenizer.end_of_turn_id, tokenizer.eos_id, *model.eos_ids)
    answers = generate(model, prompts, Sampling(max_new_tokens=60, temperature=0), stop_ids=stops)
    return [
        {
            "title": record["language"]
            + (f", right answer: {record['answer']}" if record.get("answer") else ""),
            "messages": [*messages, {"role": "assistant", "content": tokenizer.decode(answer.tokens)}],
        }
        for record, messages, answer in zip(records, asked, answers, strict=True)
    ]


def _first(paths: Iterable[Path], limit: int) -> Iterator[dict[str, Any]]:
    """The first `limit` records of each file."""
    for path in paths:
        yield from islice(read_lines(path), limit)


def bits_per_byte_probe(
    corpus: Path,
    tokenizer: Path,
    groups: Mapping[str, tuple[str, ...]],
    *,
    documents: int = 3,
    most_bytes: int | None = None,
    tracked: Path | None = None,
) -> Callable[[LanguageModel, int], Mapping[str, float]]:
    """An `evaluate` for the training loop: bits per byte of a few held-out documents of each group of languages.

    most_bytes: of each document, its beginning.
    tracked: a JSON Lines file that receives a line `{"step": ..., "bits_per_byte": {language: ...}}` each time: what is forgotten, and when.
    """
    from koine.evaluate import bits_per_byte
    from koine.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    codes = tuple(dict.fromkeys(code for members in groups.values() for code in members))
    records = [
        record if most_bytes is None else {**record, "text": beginning(record["text"], most_bytes)}
        for record in _first(existing(corpus, "documents-heldout", codes).values(), documents)
    ]

    def probe(model: LanguageModel, step: int) -> Mapping[str, float]:
        scored = bits_per_byte(model, loaded, records, resamples=1)["languages"]
        found = {code: scored[code] for code in codes if code in scored}
        if tracked is not None:
            line = {
                "step": step,
                "bits_per_byte": {code: row["bits_per_byte"] for code, row in found.items()},
            }
            with tracked.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        result = {}
        for name, members in groups.items():
            rows = [found[code] for code in members if code in found]
            if rows:
                bits = sum(row["bits_per_byte"] * row["bytes"] for row in rows)
                result[f"bits_per_byte_{name}"] = bits / sum(row["bytes"] for row in rows)
        return result

    return probe


def beginning(text: str, most_bytes: int) -> str:
    """The first characters of a text that fit into `most_bytes` of UTF-8."""
    return text.encode("utf-8")[:most_bytes].decode("utf-8", errors="ignore")


def tracked_languages(path: Path) -> dict[int, dict[str, float]]:
    """Step -> language -> bits per byte of a `tracked` file; a step that was done again after a kill counts once."""
    return {line["step"]: line["bits_per_byte"] for line in read_lines(path)}
