"""Pairs of benchmarks/preference_step.py, the same token ids for both sides.

A case is a folder: `tokens` are our token shards, `pairs.json` has the prompt, chosen and rejected ids of each
pair for TRL, and `case.json` says what is in it.
"""

from __future__ import annotations

import json
import lzma
import statistics
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from koine.data.groups import Segment, fewest_tokens, fit_segments
from koine.data.shards import FORMAT, TokenSource, digest_of
from koine.data.tokenization import tokenize
from koine.files import sha256_file, write_json
from koine.tokenizer import train_tokenizer

CASES = ("natural", "half", "nothing")
FILES = ("dpo_demo", "hh_harmless")
ROW = 1024
"""Tokens of a pair, prompt counted once; longer completions of `natural` are cut to one common length."""
VOCABULARY, QUICK_VOCABULARY = 8192, 512
EQUAL = {"half": (256, 256), "nothing": (1, 511)}
"""Tokens of the prompt and of each completion."""
QUICK_EQUAL = {"half": (16, 16), "nothing": (1, 31)}


class Pair(NamedTuple):
    """Token ids of a pair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """Tokens with the prompt counted once: those that must be computed."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def repeated(self) -> int:
        """Tokens with the prompt counted for each completion."""
        return self.tokens + len(self.prompt)


def prepare_case(name: str, preferences: Path, folder: Path, *, pairs: int, quick: bool) -> Path:
    """Return the folder of a case with `pairs` pairs; write it where it is missing."""
    out = folder / f"{name}-{pairs}"
    if (out / "case.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = QUICK_VOCABULARY if quick else VOCABULARY
    if name == "natural":
        found = choose(natural_pairs(preferences, folder, vocabulary), pairs)
    else:
        prompt, completion = (QUICK_EQUAL if quick else EQUAL)[name]
        found = random_pairs(pairs, prompt, completion, vocabulary)
    write_tokens(found, out / "tokens", vocabulary)
    write_json(out / "pairs.json", [pair._asdict() for pair in found])
    write_json(out / "case.json", describe(found, vocabulary))
    return out


def describe(pairs: Sequence[Pair], vocabulary: int) -> dict[str, Any]:
    """Return the figures of a case."""
    return {
        "pairs": len(pairs),
        "vocabulary": vocabulary,
        "longest": max(pair.tokens for pair in pairs),
        "tokens": sum(pair.tokens for pair in pairs),
        "tokens_with_repeated_prompts": sum(pair.repeated for pair in pairs),
        "median_prompt": statistics.median(len(pair.prompt) for pair in pairs),
        "median_completion": statistics.median(
            length for pair in pairs for length in (len(pair.chosen), len(pair.rejected))
        ),
        "prompts": [len(pair.prompt) for pair in pairs],
        "completions": [[len(pair.chosen), len(pair.rejected)] for pair in pairs],
    }


def natural_pairs(preferences: Path, folder: Path, vocabulary: int) -> list[Pair]:
    """Encode the preferences with a tokenizer trained on their text; cut long completions to fit `ROW`."""
    tokenizer, tokens = folder / "tokenizer", folder / "all-tokens"
    records = list(read_preferences(preferences))[:: 10 if vocabulary == QUICK_VOCABULARY else 1]
    if not tokenizer.exists():
        texts = [record[field] for record in records for field in ("prompt", "chosen", "rejected")]
        train_tokenizer({"en": lambda: iter(texts)}, vocab_size=vocabulary).save(tokenizer)
    if not tokens.exists():
        source = folder / "all.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        tokenize(str(source), tokenizer, out=tokens, kind="preferences")
    return list(cut_pairs(TokenSource(tokens)))


def read_preferences(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the records of the files, with text in NFC."""
    for name in FILES:
        with lzma.open(folder / f"{name}.jsonl.xz", "rt") as file:
            for record in map(json.loads, file):
                fields = {field: record[field] for field in ("prompt", "chosen", "rejected")}
                texts = {field: unicodedata.normalize("NFC", text) for field, text in fields.items()}
                if texts["chosen"] != texts["rejected"]:
                    yield {"id": record["id"], "language": "en"} | texts


def cut_pairs(source: TokenSource) -> Iterator[Pair]:
    """Yield the pairs of a source as they stand in a row of `ROW` tokens; leave out those that do not fit."""
    for number in range(len(source)):
        tree = source.segments(number)
        if fewest_tokens(tree) > ROW:
            continue
        ids, starts = source.tokens(number).tolist(), np.cumsum([0, *(one.length for one in tree)]).tolist()
        lengths = fit_segments(tree, ROW)
        yield Pair(*(ids[start : start + length] for start, length in zip(starts, lengths, strict=False)))


def choose(pairs: list[Pair], count: int) -> list[Pair]:
    """Return `count` pairs, evenly spread over the pairs in order of length, in a random order."""
    by_length = sorted(pairs, key=lambda pair: pair.tokens)
    chosen = [by_length[(2 * index + 1) * len(pairs) // (2 * count)] for index in range(count)]
    return [chosen[index] for index in np.random.default_rng(0).permutation(count)]


def random_pairs(count: int, prompt: int, completion: int, vocabulary: int) -> list[Pair]:
    """Return pairs of equal lengths."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(10, vocabulary, (length,), generator=generator).tolist()

    return [Pair(ids(prompt), ids(completion), ids(completion)) for _ in range(count)]


def write_tokens(pairs: Sequence[Pair], out: Path, vocabulary: int) -> None:
    """Write token shards of pairs (`koine.data.shards`), without text and tokenizer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir()
    name = "shard-00000"
    ids = np.concatenate([np.array([*one.prompt, *one.chosen, *one.rejected], np.uint16) for one in pairs])
    ids.tofile(out / f"{name}.tokens")
    counts = [np.repeat([0, 1], [len(one.prompt), one.tokens - len(one.prompt)]) for one in pairs]
    np.concatenate(counts).astype(np.uint8).tofile(out / f"{name}.mask")
    np.cumsum([0, *(one.tokens for one in pairs)]).astype(np.uint64).tofile(out / f"{name}.offsets")
    trees = [
        [Segment(number - 1 if number < 2 else 0, len(ids), number > 0) for number, ids in enumerate(one)]
        for one in pairs
    ]
    columns = {
        "id": [f"pair.{number}" for number in range(len(pairs))],
        "language": ["en"] * len(pairs),
        "domain": ["general"] * len(pairs),
        "source": ["pairs"] * len(pairs),
        "bytes": [one.tokens for one in pairs],
        "segment_parent": pa.array([[s.parent for s in tree] for tree in trees], pa.list_(pa.int32())),
        "segment_length": pa.array([[s.length for s in tree] for tree in trees], pa.list_(pa.int32())),
        "segment_completion": [[s.completion for s in tree] for tree in trees],
        "probability": [1.0] * len(pairs),
        "margin": [0.0] * len(pairs),
        "labels": pa.array([[] for _ in pairs], pa.list_(pa.bool_())),
        "scores": pa.array([[] for _ in pairs], pa.list_(pa.float64())),
    }
    with (out / f"{name}.documents.parquet").open("wb") as file:
        pq.write_table(pa.table(columns), file)
    totals = {"documents": len(pairs), "tokens": len(ids), "bytes": len(ids)}
    files = [f"{name}{ending}" for ending in (".tokens", ".offsets", ".mask", ".documents.parquet")]
    manifest = {
        "format": FORMAT,
        "tokenizer": "none",
        "vocab_size": vocabulary,
        "dtype": "uint16",
        "chat": True,
        "kind": "preferences",
        "revision": None,
        "shards": [name],
        **totals,
        "languages": {"en": totals},
        "domains": {"general": totals},
        "files": {
            file: {"bytes": (out / file).stat().st_size, "sha256": sha256_file(out / file)} for file in files
        },
    }
    write_json(out / "manifest.json", manifest | {"sha256": digest_of(manifest)})
