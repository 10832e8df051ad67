"""The steps that evaluate a model, and the evaluation that a training calls on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.allocator import keep_freed_memory
from koine.errors import UserError
from koine.files import write_json
from koine.languages import language
from koine.plan import step
from koine.steps import checks, estimates
from koine.steps.corpus_files import existing, load_roles, read_lines, write_step_report
from koine.steps.domain_corpora import documents_of

if TYPE_CHECKING:
    from koine.model import Decoder
    from koine.model.language_model import LanguageModel
    from koine.tokenizer import Tokenizer

LANGUAGE_TRACK = "languages.jsonl"
"""File of a trained model with every language's bits per byte at each evaluation."""


@step(
    version="2",
    estimate=estimates.evaluation,
    check=checks.evaluation,
    threads=0,
    formerly=("koine.recipes.evaluation:evaluate_model",),
)
def evaluate_model(
    corpus: Path,
    model: Path,
    *,
    documents_per_language: int,
    questions_per_language: int,
    seed: int,
    out: Path,
) -> None:
    """Run the evaluations of `koine.evaluate.table` on the corpus's held-out documents and test questions.

    Writes `evaluation.json`, `metrics.json`, and `samples.json` with one answered question of each language.
    """
    import torch

    from koine.evaluate.evaluation import EvaluationSetup
    from koine.evaluate.table import report_sections, run_evaluations
    from koine.model import load_model
    from koine.tokenizer import load_tokenizer

    keep_freed_memory()
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
    write_json(out / "metrics.json", {"bits_per_byte": results["overall"]["bits_per_byte"]})
    blocks = [block for _, section in report_sections(results) for block in section]
    write_step_report(out, "Evaluation", blocks)


def _samples(
    model: Decoder, tokenizer: Tokenizer, corpus: Path, codes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return one question of each language with the model's answer, for the report."""
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
    """Yield the first `limit` records of each file."""
    for path in paths:
        yield from islice(read_lines(path), limit)


def bits_per_byte_probe(
    corpus: Path,
    tokenizer: Path,
    groups: Mapping[str, tuple[str, ...]],
    *,
    documents: int = 3,
    max_bytes: int | None = None,
    tracked: Path | None = None,
) -> Callable[[LanguageModel, int], Mapping[str, float]]:
    """Return an `evaluate` for the training loop: bits per byte of held-out documents by group of languages.

    Args:
        corpus: folder of the corpus.
        tokenizer: folder of the tokenizer.
        groups: language codes of each figure `bits_per_byte_NAME`.
        documents: documents of each language.
        max_bytes: length to which a document is cut; None: all of it.
        tracked: JSON Lines file; each evaluation adds `{"step": ..., "bits_per_byte": {language: ...}}`.
    """
    from koine.evaluate import bits_per_byte
    from koine.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    codes = tuple(dict.fromkeys(code for members in groups.values() for code in members))
    records = [
        record if max_bytes is None else {**record, "text": truncate_text(record["text"], max_bytes)}
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


def truncate_text(text: str, max_bytes: int) -> str:
    """Return the first characters of a text that fit into `max_bytes` of UTF-8."""
    return text.encode("utf-8")[:max_bytes].decode("utf-8", errors="ignore")


def tracked_languages(path: Path) -> dict[int, dict[str, float]]:
    """Return step -> language -> bits per byte of a `tracked` file; a repeated step's last line counts."""
    return {line["step"]: line["bits_per_byte"] for line in read_lines(path)}


def forgetting_blocks(model: Path, primary: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return report blocks of a tracked training: a heat map by language and step, and the changes.

    Writes `forgetting.json` too.
    """
    tracked = tracked_languages(model / LANGUAGE_TRACK)
    if not tracked:
        return []
    steps = sorted(tracked)
    codes = list(tracked[steps[-1]])
    change = {code: tracked[steps[-1]][code] - tracked[steps[0]][code] for code in codes}
    write_json(model / "forgetting.json", {"steps": steps, "bits_per_byte": tracked, "change": change})
    return [
        {
            "kind": "heatmap",
            "title": "Bits per byte during training",
            "label": "bits per byte",
            "rows": codes,
            "columns": [str(max(step, 0)) for step in steps],
            "values": [[tracked[step][code] for step in steps] for code in codes],
        },
        {
            "kind": "table",
            "title": "From the first evaluation to the last",
            "caption": "Below 0: better than before. Above 0: forgotten.",
            "columns": ["language", "name", "role", "change in bits per byte"],
            "rows": [
                [
                    code,
                    language(code).name,
                    "primary" if code in primary else "adapted",
                    round(change[code], 4),
                ]
                for code in sorted(codes, key=lambda code: change[code])
            ],
        },
    ]


@step(
    version="1",
    estimate=estimates.domains,
    check=checks.evaluated_model,
    threads=0,
    formerly=("koine.recipes.domains:evaluate_domains",),
)
def evaluate_domains(
    model: Path, corpora: dict[str, Path], *, documents: int, characters: int, out: Path
) -> None:
    """Compute bits per byte on each domain's held-out documents, and a mixture's expert assignments.

    documents: documents of each domain. characters: length to which a document is cut.
    """
    import torch

    from koine.evaluate import bits_per_byte
    from koine.evaluate.expert_routing import routing_blocks, routing_shares
    from koine.model import load_model
    from koine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    decoder = load_model(model, dtype=torch.float32)
    found: dict[str, Any] = {"bits_per_byte": {}, "routing": {}}
    for name, corpus in corpora.items():
        records = [
            {"id": str(number), "text": text[:characters], "language": "und", "domain": name}
            for number, text in enumerate(documents_of(corpus, "heldout", documents))
        ]
        overall = bits_per_byte(decoder, tokenizer, records, batch_size=16)["overall"]
        found["bits_per_byte"][name] = overall["bits_per_byte"]
        if decoder.config.mixture is not None:
            shares = routing_shares(decoder, tokenizer, [record["text"] for record in records])
            found["routing"][name] = shares.to_json()
    values = list(found["bits_per_byte"].values())
    found["mean"] = sum(values) / len(values)
    write_json(out / "evaluation.json", found)
    write_json(out / "metrics.json", {"bits_per_byte": found["mean"]})
    if found["routing"]:
        write_step_report(out, "Expert routing", routing_blocks(found))


@step(
    version="2",
    estimate=estimates.long_evaluation,
    check=checks.evaluated_model,
    threads=0,
    formerly=("koine.recipes.lengths:evaluate_lengths",),
)
def evaluate_lengths(
    corpus: Path,
    model: Path,
    *,
    lengths: tuple[int, ...],
    documents: int,
    seed: int,
    out: Path,
) -> None:
    """Compute bits per byte of the longest held-out documents at each context length.

    A model that uses distant context needs fewer bits at longer lengths; one that fails there needs more.

    lengths: tokens of context. documents: documents in all.
    """
    import torch

    from koine.evaluate import bits_per_byte
    from koine.model import load_model
    from koine.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    decoder = load_model(model, dtype=torch.float32)
    paths = existing(corpus, "documents-heldout", load_roles(corpus).all).values()
    every = chain.from_iterable(read_lines(path) for path in paths)
    chosen = sorted(every, key=lambda record: (-len(record["text"].encode()), str(record["id"])))[:documents]
    if not chosen:
        raise UserError("holds no held-out document", where=corpus, hint="give more text")
    tokens = [len(tokenizer.encode(record["text"])) for record in chosen]
    found = {
        str(length): bits_per_byte(decoder, tokenizer, chosen, batch_size=4, max_length=length, seed=seed)[
            "overall"
        ]
        for length in lengths
    }
    write_json(
        out / "evaluation.json",
        {"lengths": found, "documents": len(chosen), "shortest": min(tokens), "longest": max(tokens)},
    )
    write_json(
        out / "metrics.json",
        {f"bits_per_byte_{length}": row["bits_per_byte"] for length, row in found.items()},
    )
