"""Inspect groups before training on them: `koine align inspect`."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from koine.align.inspect_content import (
    GroupTexts,
    agreement,
    certain_language,
    digest_groups,
    longer_wins,
    other_languages,
    truncation,
)
from koine.align.inspect_reference import PairReading, read_pairs
from koine.data.groups import GroupKind
from koine.data.shards import TokenSource
from koine.data.tokenization import tokenize
from koine.errors import UserError
from koine.model.language_model import LanguageModel
from koine.tokenizer import Tokenizer

TOTAL = "all"
SHOWN_CHARACTERS = 160


@dataclass
class LanguageCounts:
    """Counts of the groups of one language, and sums over them; all add up.

    Attributes:
        groups, tokens: all of them, revisions included.
        duplicates: groups that repeat an earlier one: prompt, answers, label.
        contradictions: groups whose opposite is there too: the answers swapped, or the other label.
        shared_prompts: groups whose prompt is also in the held-out source.
        cut, left_out: groups whose completions are cut in a row, and whose prompt leaves no room in it.
        identified: answers whose language, and whose prompt's, was identified with certainty.
        other_language: those in another language than the prompt.
        compared, longer_wins: pairs of answers, and in how many of them the longer one is better.
        read: pairs that the model read.
        right, right_means: those where it prefers the chosen answer, by log-probability and by its mean.
        ches: sum of the normalised CHES scores.
    """

    groups: int = 0
    tokens: int = 0
    duplicates: int = 0
    contradictions: int = 0
    shared_prompts: int = 0
    cut: int = 0
    left_out: int = 0
    identified: int = 0
    other_language: int = 0
    compared: int = 0
    longer_wins: float = 0.0
    read: int = 0
    right: float = 0.0
    right_means: float = 0.0
    ches: float = 0.0

    def add(self, other: LanguageCounts) -> None:
        """Add the counts of other groups."""
        for one in dataclasses.fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def to_json(self) -> dict[str, Any]:
        """Return counts, and shares in place of sums; None where there is nothing to divide by."""
        names = ("groups", "tokens", "duplicates", "contradictions", "shared_prompts", "cut", "left_out")
        return {
            **{name: getattr(self, name) for name in names},
            "answers_identified": self.identified,
            "other_language": self.other_language,
            "longer_wins": _share(self.longer_wins, self.compared),
            "read_by_model": self.read,
            "accuracy": _share(self.right, self.read),
            "accuracy_means": _share(self.right_means, self.read),
            "ches": _share(self.ches, self.read),
        }


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect_groups`.

    Attributes:
        kind: of the groups.
        sequence_length: tokens of a row.
        languages: counts by the language of the records.
        displacing: the pairs likeliest to push the chosen answer's likelihood down, worst first.
    """

    kind: str
    sequence_length: int
    languages: dict[str, LanguageCounts]
    displacing: list[dict[str, Any]] = field(default_factory=list)

    @property
    def total(self) -> LanguageCounts:
        """Counts over all languages."""
        total = LanguageCounts()
        for counts in self.languages.values():
            total.add(counts)
        return total

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "kind": self.kind,
            "sequence_length": self.sequence_length,
            "languages": [
                {"language": code, **counts.to_json()} for code, counts in sorted(self.languages.items())
            ],
            "total": self.total.to_json(),
            "displacing": self.displacing,
        }


@contextmanager
def opened_groups(
    pairs: Path | str, tokenizer: Path, *, kind: GroupKind = "preferences", max_bad_share: float = 0.01
) -> Iterator[TokenSource]:
    """Open token shards of groups; other records are tokenized into a temporary folder first.

    Raises `UserError` for shards of documents, of another tokenizer, or without any group.
    """
    folder = Path(pairs)
    if not (folder / "manifest.json").is_file():
        with TemporaryDirectory(prefix="koine-groups-") as work:
            tokenize(pairs, tokenizer, out=Path(work) / "tokens", kind=kind, max_bad_share=max_bad_share)
            yield TokenSource(Path(work) / "tokens", verify=False)
        return
    source = TokenSource(folder)
    if source.kind == "documents":
        raise UserError(
            "holds documents, not groups of completions",
            where=folder,
            hint="tokenize with --kind preferences, labelled or scored",
        )
    yield source


def check_tokenizer(source: TokenSource, tokenizer: Tokenizer, model: Path) -> None:
    """Raise `UserError` where the shards are not of the model's tokenizer."""
    if source.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"tokenized with another tokenizer than {model}",
            where=source.path,
            hint="tokenize again with the tokenizer of the model, or give the records themselves",
        )


def inspect_groups(
    source: TokenSource,
    tokenizer: Tokenizer,
    *,
    model: LanguageModel | None = None,
    held_out: TokenSource | None = None,
    sequence_length: int = 1024,
    limit: int | None = None,
    shown: int = 5,
    identify_languages: bool = True,
    rows: int = 4,
    device: str = "cpu",
) -> Inspection:
    """Count what is wrong with groups, by language, and find the pairs that a model is likeliest to unlearn.

    Args:
        source: the groups.
        tokenizer: of the source.
        model: reads pairs of preferences, on `device`; None: only the content is inspected.
        held_out: groups of another split, which must not share prompts.
        sequence_length: tokens of a row of the training.
        limit: most pairs that the model reads, evenly spread over the source; None: all.
        shown: pairs of `Inspection.displacing`.
        identify_languages: whether to compare the languages of prompts and answers (extra `langid`).
        rows: rows of a forward pass.
        device: of the model.
    """
    by_language = _inspect_content(source, tokenizer, held_out, sequence_length, identify_languages)
    displacing: list[dict[str, Any]] = []
    if model is not None and source.kind == "preferences":
        numbers = np.arange(len(source))
        if limit is not None and limit < len(source):
            numbers = np.unique(np.linspace(0, len(source) - 1, limit).round().astype(np.int64))
        # The number of the document breaks ties, and keeps readings from being compared.
        worst: list[tuple[float, int, PairReading]] = []
        for reading in read_pairs(
            model, source, numbers.tolist(), time=sequence_length, rows=rows, device=device
        ):
            counts, label = by_language[reading.group.language], reading.group.probability
            counts.read += 1
            counts.right += agreement(reading.margin, label)
            counts.right_means += agreement(reading.margin_of_means, label)
            counts.ches += reading.ches_means
            entry = (reading.ches_means, -reading.group.document, reading)
            (heapq.heappush if len(worst) < shown else heapq.heappushpop)(worst, entry)
        texts = GroupTexts(source, tokenizer)
        displacing = [_described(reading, texts) for _, _, reading in sorted(worst, reverse=True)]
    return Inspection(source.kind, sequence_length, by_language, displacing)


def _inspect_content(
    source: TokenSource,
    tokenizer: Tokenizer,
    held_out: TokenSource | None,
    sequence_length: int,
    identify_languages: bool,
) -> dict[str, LanguageCounts]:
    digests, lost = digest_groups(source), truncation(source, sequence_length)
    repeats, contradictions = digests.repeats(), digests.contradictions()
    shared = np.zeros(len(source), dtype=np.bool_)
    if held_out is not None:
        shared = digests.shared_prompts(digest_groups(held_out))
    texts = GroupTexts(source, tokenizer)
    found: dict[str, LanguageCounts] = {}
    for number, code in enumerate(source.languages.tolist()):
        wins, compared = longer_wins(source, number)
        other, identified = other_languages(texts(number), certain_language) if identify_languages else (0, 0)
        found.setdefault(code, LanguageCounts()).add(
            LanguageCounts(
                groups=1,
                tokens=int(source.lengths[number]),
                duplicates=int(repeats[number]),
                contradictions=int(contradictions[number]),
                shared_prompts=int(shared[number]),
                cut=int(lost.cut[number]),
                left_out=int(lost.left_out[number]),
                identified=identified,
                other_language=other,
                compared=compared,
                longer_wins=wins,
            )
        )
    return found


def _described(reading: PairReading, texts: GroupTexts) -> dict[str, Any]:
    text = texts(reading.group.document)
    prompt, chosen, rejected = (
        " ".join(one.split())[:SHOWN_CHARACTERS] for one in (text.prompt, *text.answers[:2])
    )
    return {
        "id": reading.group.record_id,
        "language": reading.group.language,
        "ches": reading.ches_means,
        "ches_of_sums": reading.ches,
        "log_probability_chosen": reading.chosen / reading.chosen_tokens,
        "log_probability_rejected": reading.rejected / reading.rejected_tokens,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
    }
