"""The steps that evaluate a model, and the evaluation that a training calls on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from koine.allocator import keep_freed_memory
from koine.errors import UserError
from koine.files import write_atomically, write_json
from koine.languages import language
from koine.plan import step
from koine.steps import checks, estimates
from koine.steps.corpus_files import existing, load_roles, read_lines, write_step_report
from koine.steps.domain_corpora import documents_of

if TYPE_CHECKING:
    from koine.model import Decoder
    from koine.model.language_model import LanguageModel
    from koine.tokenizer import Tokenizer

Record = dict[str, Any]
LANGUAGE_TRACK = "languages.jsonl"
"""File of a trained model with every language's bits per byte at each evaluation."""
EXAMPLES = 5
"""Example questions that an evaluation chooses."""


@step(
    version="3",
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
    max_document_bytes: int | None = None,
    seed: int,
    out: Path,
) -> None:
    """Run the evaluations of `koine.evaluate.table` on the corpus's held-out documents and test questions.

    Writes `evaluation.json`, `metrics.json`, and `samples.json` with one answered question of each language.
    Where questions are asked, every answer goes to `answers.jsonl`, a few right ones to
    `example_questions.json`. The majority baseline's answers are those of the corpus's training questions.

    max_document_bytes: length to which a document is cut; None: all of it.
    """
    import torch

    from koine.evaluate.evaluation import EvaluationSetup
    from koine.evaluate.table import report_sections, run_evaluations
    from koine.generate.cpu.prepacked_linear import prepack
    from koine.model import load_model
    from koine.tokenizer import load_tokenizer

    keep_freed_memory()
    roles = load_roles(corpus)
    tokenizer = load_tokenizer(model)
    decoder = load_model(model, dtype=torch.float32)
    # The weights do not change from here on, and float32 products are about twice as fast packed.
    prepack(decoder)
    records = {"documents": heldout_documents(corpus, roles.all, documents_per_language, max_document_bytes)}
    questions = existing(corpus, "questions/test", roles.chat)
    training: list[dict[str, Any]] = []
    if questions and questions_per_language:
        records["questions"] = list(_first(questions.values(), questions_per_language))
        training = list(_first(existing(corpus, "questions/train", roles.chat).values(), None))
    answers: list[tuple[Mapping[str, Any], str | None, bool]] = []
    setup = EvaluationSetup(
        model=decoder,
        tokenizer=tokenizer,
        seed=seed,
        on_answer=lambda *answer: answers.append(answer),
        training_questions=training,
    )
    results = run_evaluations(setup, records)
    if answers:
        _write_answers(out, answers, decoder, tokenizer, roles.chat)
    write_json(out / "samples.json", _samples(decoder, tokenizer, corpus, roles.chat))
    write_json(out / "evaluation.json", results)
    metrics = {"bits_per_byte": results["overall"]["bits_per_byte"]}
    for kind, measured in results.get("questions", {}).get("overall", {}).items():
        metrics |= {kind: measured["value"], f"{kind}_majority_baseline": measured["majority_baseline"]}
    write_json(out / "metrics.json", metrics)
    blocks = [block for _, section in report_sections(results) for block in section]
    write_step_report(out, "Evaluation", blocks)


def _write_answers(
    out: Path,
    answers: Sequence[tuple[Mapping[str, Any], str | None, bool]],
    model: Decoder,
    tokenizer: Tokenizer,
    codes: tuple[str, ...],
) -> None:
    """Write every answer to `answers.jsonl`, and a few right ones to `example_questions.json`."""
    from koine.evaluate.example_questions import (
        Examples,
        candidates,
        choose,
        example_of,
        with_probabilities,
    )

    answers = sorted(answers, key=lambda answer: str(answer[0].get("id", "")))
    lines = [
        json.dumps({**record, "model_answer": text, "is_right": right}, ensure_ascii=False)
        for record, text, right in answers
    ]
    write_atomically(out / "answers.jsonl", "".join(f"{line}\n" for line in lines))
    right = [example_of(record, text) for record, text, is_right in answers if is_right and text is not None]
    stops = (tokenizer.end_of_turn_id, tokenizer.eos_id, *model.eos_ids)
    sure = with_probabilities(candidates(one for one in right if one), model, tokenizer, stops)
    Examples(len(answers), len(right), choose(sure, codes, EXAMPLES)).save(out)


def _samples(
    model: Decoder, tokenizer: Tokenizer, corpus: Path, codes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return the first question of each language with the model's answer, for the report."""
    from koine.evaluate.question_answering import normalise, right_answer
    from koine.generate import generate
    from koine.generate.sampling import Sampling

    folder = "questions/test" if existing(corpus, "questions/test", codes) else "questions/train"
    paths = existing(corpus, folder, codes)
    records = list(_first(paths.values(), 1))
    asked = [right_answer(record) for record in records]
    prompts = [tokenizer.encode_messages(messages, generation_prompt=True)[0] for messages, _ in asked]
    if not prompts:
        return []
    stops = (tokenizer.end_of_turn_id, tokenizer.eos_id, *model.eos_ids)
    answers = generate(model, prompts, Sampling(max_new_tokens=60, temperature=0), stop_ids=stops)
    in_english = english_questions(paths.get("en"), {str(record.get("fact")) for record in records})
    samples = []
    for record, (messages, expected), answer in zip(records, asked, answers, strict=True):
        written = tokenizer.decode(answer.tokens)
        sample: dict[str, Any] = {
            "language": record["language"],
            "title": f"{language(record['language']).name} ({record['language']})",
            "messages": [*messages, {"role": "assistant", "content": written}],
        }
        if record.get("answer") and expected is not None:
            sample["right"] = normalise(written) == normalise(expected)
            sample["answer"] = expected
        if record["language"] != "en" and (english := in_english.get(str(record.get("fact")))):
            sample["note"] = f"In English: {english}"
        samples.append(sample)
    return samples


def english_questions(path: Path | None, facts: set[str]) -> dict[str, str]:
    """Return the first English question about each of some facts, with its right answer."""
    found: dict[str, str] = {}
    if path is not None:
        for record in read_lines(path):
            fact = str(record.get("fact"))
            if fact in facts and fact not in found:
                found[fact] = f"{record['messages'][0]['content']} {record['answer']}"
    return found


def heldout_documents(
    corpus: Path, codes: Iterable[str], documents: int, max_bytes: int | None
) -> list[dict[str, Any]]:
    """Return held-out documents of each language, at even distances in its file.

    The first ones of a file may be about one subject or from one source.

    max_bytes: length to which a document is cut; None: all of it.
    """
    chosen = []
    for path in existing(corpus, "documents-heldout", codes).values():
        for record in evenly_spaced(list(read_lines(path)), documents):
            text = record["text"] if max_bytes is None else truncate_text(record["text"], max_bytes)
            chosen.append({**record, "text": text})
    return chosen


def evenly_spaced(records: Sequence[Record], count: int) -> list[Record]:
    """Return `count` records at even distances, in their order; all of them where there are no more."""
    count = min(count, len(records))
    return [records[(2 * place + 1) * len(records) // (2 * count)] for place in range(count)]


def _first(paths: Iterable[Path], limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield the first `limit` records of each file; None: all."""
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
    at: tuple[int, ...] = (),
) -> Callable[[LanguageModel, int], Mapping[str, float]]:
    """Return an `evaluate` for the training loop: bits per byte of held-out documents by group of languages.

    The figure of a group is the mean over its languages, as in `koine.steps.tokenizer_comparison`.

    Args:
        corpus: folder of the corpus.
        tokenizer: folder of the tokenizer.
        groups: language codes of each figure `bits_per_byte_NAME`.
        documents: documents of each language.
        max_bytes: length to which a document is cut; None: all of it.
        tracked: JSON Lines file; each evaluation adds `{"step": ..., "bits_per_byte": {language: ...}}`.
        at: numbers of steps done at which to measure; others give no figures. Empty: at each call.
    """
    from koine.evaluate import bits_per_byte
    from koine.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    codes = tuple(dict.fromkeys(code for members in groups.values() for code in members))
    records = heldout_documents(corpus, codes, documents, max_bytes)

    def probe(model: LanguageModel, step: int) -> Mapping[str, float]:
        # A step below 0 is the evaluation before training, which a caller asks for by itself.
        if at and step >= 0 and step not in at:
            return {}
        scored = bits_per_byte(model, loaded, records, resamples=1)["languages"]
        found = {code: float(scored[code]["bits_per_byte"]) for code in codes if code in scored}
        if tracked is not None:
            with tracked.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "bits_per_byte": found}) + "\n")
        result = {}
        for name, members in groups.items():
            bits = [found[code] for code in members if code in found]
            if bits:
                result[f"bits_per_byte_{name}"] = fmean(bits)
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
