"""The steps that write a domain's text and tokens, and train a tokenizer for several domains.

Heavy imports are inside the functions, so that a run in which everything is up to date never loads torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import write_json
from koine.plan import step
from koine.steps import checks, estimates
from koine.steps.corpus_files import field_mapping, read_lines


@step(
    version="1",
    estimate=estimates.own_text,
    check=checks.domain_text,
    formerly=("koine.recipes.domain_corpora:domain_text",),
)
def domain_text(
    data: Path,
    *,
    domain: str,
    fields: tuple[str, ...],
    max_bytes: int,
    heldout_bytes: int,
    max_bad_share: float,
    seed: int,
    languages: tuple[str, ...] = (),
    record_format: str = "",
    out: Path,
) -> None:
    """Write a domain's documents: `train.jsonl`, and `heldout.jsonl` that no step trains on.

    Every twentieth document, drawn with `seed`, is held out until there are `heldout_bytes`. Long documents
    are cut to pieces of 20,000 characters.

    languages: only these, in equal parts of the bytes.
    """
    import random

    from koine.data import RecordFormat, read_records

    draw = random.Random(seed)
    reader = read_records(
        data,
        fields=field_mapping(fields),
        max_bad_share=max_bad_share,
        split="all",
        languages=languages or None,
        carry=(),
        record_format=RecordFormat(record_format or None),
    )
    parts = {"train": max_bytes, "heldout": heldout_bytes}
    limits = {part: limit // max(1, len(languages)) for part, limit in parts.items()}
    # By part, and by language where some are named.
    sizes: dict[tuple[str, str], int] = {}
    counts = dict.fromkeys(parts, 0)
    with (
        (out / "train.jsonl").open("w", encoding="utf-8") as train,
        (out / "heldout.jsonl").open("w", encoding="utf-8") as heldout,
    ):
        files = {"train": train, "heldout": heldout}
        for record in reader:
            language = record["language"] if languages else ""
            for number, text in enumerate(_pieces(record)):
                part = "train"
                if draw.random() < 0.05 and sizes.get(("heldout", language), 0) < limits["heldout"]:
                    part = "heldout"
                if sizes.get((part, language), 0) >= limits[part]:
                    continue
                line = {
                    "id": f"{record['id']}-{number}",
                    "text": text,
                    "language": record["language"],
                    "domain": domain,
                }
                files[part].write(json.dumps(line, ensure_ascii=False) + "\n")
                sizes[part, language] = sizes.get((part, language), 0) + len(text.encode("utf-8"))
                counts[part] += 1
            if len(sizes) == 2 * max(1, len(languages)) and all(
                size >= limits[part] for (part, _), size in sizes.items()
            ):
                break
    if not all(counts.values()):
        raise UserError(
            f"the domain '{domain}' has {counts['train']} documents to train on "
            f"and {counts['heldout']} held out",
            where=data,
            hint="give more documents: one in twenty is held out",
        )
    found = {part: sum(size for (one, _), size in sizes.items() if one == part) for part in parts}
    write_json(out / "metrics.json", {f"{part}_bytes": size for part, size in found.items()})


def _pieces(record: Mapping[str, Any], size: int = 20_000) -> list[str]:
    text = (
        str(record["text"])
        if "text" in record
        else "\n".join(str(message["content"]) for message in record["messages"])
    )
    return [text[start : start + size] for start in range(0, len(text), size)] or [text]


@step(
    version="1",
    estimate=estimates.domain_tokens,
    check=checks.domain_tokens,
    formerly=("koine.recipes.domain_corpora:tokenize_domain",),
)
def tokenize_domain(corpus: Path, tokenizer: Path, *, domain: str, out: Path) -> None:
    """Tokenize a domain's training documents into token shards."""
    from koine.data import tokenize

    shutil.rmtree(out / "tokens", ignore_errors=True)
    tokenize(
        corpus / "train.jsonl", tokenizer, out=out / "tokens", workers=1, domain=domain, max_bad_share=0.0
    )


@step(
    version="1",
    estimate=estimates.tokenizer,
    check=checks.shared_tokenizer,
    threads=2,
    formerly=("koine.recipes.domain_corpora:shared_tokenizer",),
)
def shared_tokenizer(
    corpora: dict[str, Path], *, vocabulary_size: int, sample_bytes: int, seed: int, out: Path
) -> None:
    """Train a tokenizer on all domains in equal parts, for a new seed model."""
    from functools import partial

    from koine.tokenizer import train_tokenizer

    def texts(corpus: Path) -> Iterator[str]:
        for record in read_lines(corpus / "train.jsonl"):
            yield record["text"]

    found = train_tokenizer(
        {f"x-{number}": partial(texts, corpus) for number, corpus in enumerate(corpora.values())},
        vocab_size=vocabulary_size,
        scheme="uniform",
        english_share=None,
        sample_bytes=sample_bytes,
        seed=seed,
    )
    found.save(out)


@step(version="1", estimate=estimates.sample_code, formerly=("koine.recipes.domain_corpora:code_domain",))
def code_domain(*, max_bytes: int, heldout_bytes: int, out: Path) -> None:
    """Write the installed Python's standard library as a domain; every twentieth record is held out."""
    from koine.data.sample.code import code_records

    written = {"train": 0, "heldout": 0}
    with (
        (out / "train.jsonl").open("w", encoding="utf-8") as train,
        (out / "heldout.jsonl").open("w", encoding="utf-8") as heldout,
    ):
        for number, record in enumerate(code_records(max_bytes + heldout_bytes)):
            held = number % 20 == 19 and written["heldout"] < heldout_bytes
            line = {"id": str(record["id"]), "text": record["text"], "language": "und", "domain": "code"}
            (heldout if held else train).write(json.dumps(line) + "\n")
            written["heldout" if held else "train"] += len(record["text"].encode("utf-8"))
    write_json(out / "metrics.json", {f"{part}_bytes": size for part, size in written.items()})


def documents_of(corpus: Path, part: str, limit: int) -> list[str]:
    """Return at most `limit` documents of a domain's part, evenly spaced over the file.

    A file may hold one language after the other.
    """
    file = corpus / f"{part}.jsonl"
    count = sum(1 for _ in read_lines(file))
    wanted = {number * count // limit for number in range(limit)} if count > limit else range(count)
    return [record["text"] for number, record in enumerate(read_lines(file)) if number in wanted]
