"""Records and shards of groups for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koine.data import Mixture, Phase, Source, tokenize
from koine.data.groups import GroupKind
from tests.data.conftest import document, write_records

REVISION = "improve it"


def pair(number: int, **others: Any) -> dict[str, Any]:
    """A preference whose prompt and answers have lengths that depend on the number."""
    return {
        "id": f"pair{number}",
        "language": ("en", "de")[number % 2],
        "prompt": document(number, 3 + number % 5),
        "chosen": document(number + 100, 2 + number % 7),
        "rejected": document(number + 200, 2 + number % 3),
        **others,
    }


def labelled(number: int) -> dict[str, Any]:
    """A completion with a label."""
    return {
        "id": f"label{number}",
        "language": "en",
        "prompt": document(number, 4),
        "completion": document(number + 100, 3 + number % 4),
        "label": number % 3 == 0,
    }


def scored(number: int) -> dict[str, Any]:
    """Two to four completions with scores."""
    count = 2 + number % 3
    return {
        "id": f"scored{number}",
        "language": "en",
        "prompt": document(number, 4),
        "completions": [document(number + 100 * one, 2 + one) for one in range(1, count + 1)],
        "scores": [0.5 * one for one in range(count)],
    }


def group_tokens(
    folder: Path,
    tokenizer: Path,
    records: list[dict[str, Any]],
    kind: GroupKind = "preferences",
    **options: Any,
) -> Path:
    """Write the token shards of groups; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_records(folder / f"{kind}.jsonl", records)
    out = folder / f"{kind}-tokens"
    tokenize(source, tokenizer, out=out, kind=kind, **options)
    return out


def mixture_of(
    *folders: Path, steps: int = 3, rows: int = 4, time: int = 96, packing: Any = "no_split", seed: int = 0
) -> Mixture:
    """A mixture of one phase, all folders equally."""
    sources = tuple(
        Source(name=f"s{number}", path=folder, proportion=1 / len(folders), max_epochs=100)
        for number, folder in enumerate(folders)
    )
    return Mixture(
        phases=(Phase(name="align", steps=steps, sources=sources),),
        sequence_length=time,
        batch_size=rows,
        packing=packing,
        seed=seed,
    )
