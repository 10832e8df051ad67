"""Count pre-tokens in bounded memory: pre-tokens and their counts are all that BPE training needs.

The library's trainer, given an iterator, keeps a table for every text at once; on tens of gigabytes that ends
the process. Here it counts one chunk at a time (in Rust, on all cores). The tables are merged, and the rarest
entries are dropped when the merged table grows past a limit.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from koine.terminal import is_quiet, plain_console

Watched = Callable[[Iterable[tuple[str, str]]], Iterator[tuple[str, str]]]

CHUNK_BYTES = 32 * 2**20
DIRECT_BYTES = 64 * 2**20
"""Samples up to this size go to the library directly: their table is small, and feeding one costs more."""
MOST_ENTRIES = 1_500_000
"""Distinct pre-tokens kept. The trainer needs about a kilobyte for each while it merges."""
MOST_OCCURRENCES = 10_000_000
"""Pre-tokens fed to the trainer; the counts of a longer text are scaled down to it."""
LARGEST_PAIR_COUNT = 2**31 - 1
"""The library counts the occurrences of a pair in 32 bits and does not notice an overflow."""
_PIECE = 4096


@dataclass
class PretokenCounts:
    """Pre-token (in the trainer's alphabet: one character a byte) -> occurrences.

    `dropped` occurrences of rare pre-tokens are not in `counts`. Each of these pre-tokens had occurred at
    most `dropped_below` times when it was dropped.
    """

    counts: dict[str, int] = field(default_factory=dict)
    occurrences: int = 0
    dropped: int = 0
    dropped_below: int = 0

    def add(self, chunk: dict[str, int], times: int, *, most: int = MOST_ENTRIES) -> None:
        """Add the table of one chunk, counted `times` times."""
        counts = self.counts
        get = counts.get
        for word, count in chunk.items():
            counts[word] = get(word, 0) + count * times
        self.occurrences += times * sum(chunk.values())
        while len(counts) > most:
            self.dropped_below = max(1, 2 * self.dropped_below)
            kept = {word: count for word, count in counts.items() if count > self.dropped_below}
            self.dropped += sum(counts.values()) - sum(kept.values())
            self.counts = counts = kept


def count_pretokens(
    texts: Iterable[tuple[str, int]],
    *,
    normalizer: Any,
    pre_tokenizer: Any,
    chunk_bytes: int = CHUNK_BYTES,
    most: int = MOST_ENTRIES,
    longest: int | None = None,
) -> PretokenCounts:
    """Count the pre-tokens of (text, times), in chunks of about `chunk_bytes`; a text counts `times` times.

    longest: pre-tokens of more characters (of the trainer's alphabet) are cut into parts of this length.
    """
    found = PretokenCounts()
    waiting: dict[int, list[str]] = {}
    size = 0
    for text, times in texts:
        waiting.setdefault(times, []).append(text)
        size += len(text)
        if size >= chunk_bytes:
            for often, group in waiting.items():
                found.add(_count(group, normalizer, pre_tokenizer, longest), often, most=most)
            waiting, size = {}, 0
    for often, group in waiting.items():
        found.add(_count(group, normalizer, pre_tokenizer, longest), often, most=most)
    return found


def _count(
    texts: list[str], normalizer: Any, pre_tokenizer: Any, longest: int | None = None
) -> dict[str, int]:
    """Count pre-tokens with the library, from the state of a trainer of whole words.

    A BPE trainer would also count pairs, a third of the time.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if longest is not None:
        # Normalisation and spelling in bytes lengthen a text at most by this factor.
        long = [text for text in texts if 8 * len(text) > longest]
        texts = [text for text in texts if 8 * len(text) <= longest]
        cut = pre_tokenizers.Sequence([pre_tokenizer, pre_tokenizers.FixedLength(longest)])
        counts = Counter(_count(long, normalizer, cut)) if long else Counter()
        counts.update(_count(texts, normalizer, pre_tokenizer))
        return counts
    backend = Tokenizer(models.WordLevel())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.WordLevelTrainer(vocab_size=0, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    words: dict[str, int] = json.loads(trainer.__getstate__())["WordLevelTrainer"]["words"]
    return words


def feeding_scale(table: PretokenCounts, *, most: int = MOST_OCCURRENCES) -> float:
    """Return the factor on all counts, at most 1, that feeds at most `most` pre-tokens.

    It also keeps pair counts from overflowing. A pair occurs at most once per two neighbouring bytes of the
    text, whatever has been merged before.
    """
    pairs = sum(count * (len(word) - 1) for word, count in table.counts.items())
    return min(1.0, most / max(1, table.occurrences), LARGEST_PAIR_COUNT / max(1, pairs))


def repeated(table: PretokenCounts, scale: float) -> Iterator[str]:
    """Yield strings of space-separated pre-tokens, each `scale` times as often as its count.

    A fraction is rounded up or down by a hash of the pre-token, so that rare ones keep their weight together.
    """
    waiting: list[str] = []
    for word, count in table.counts.items():
        times = count if scale == 1.0 else int(count * scale + crc32(word.encode("utf-8")) / 2**32)
        for start in range(0, times, _PIECE):
            part = min(_PIECE, times - start)
            waiting += [word] * part
            if len(waiting) >= _PIECE:
                yield " ".join(waiting)
                waiting = []
    if waiting:
        yield " ".join(waiting)


@contextmanager
def counting_progress(shown: bool, *, what: str, total: int | None = None) -> Iterator[Watched]:
    """Yield a function to pass (language, text) through; it shows a progress bar of the bytes on stderr.

    The bar shows only if `shown` and on a terminal. total: bytes, if known.
    """
    if not shown or not on_terminal():
        yield iter
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what, markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=plain_console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)

        def watched(texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
            since = 0
            for code, text in texts:
                yield code, text
                since += len(text.encode("utf-8"))
                if since > 1_000_000:
                    progress.advance(task, since)
                    since = 0
            if total is not None:
                progress.update(task, completed=total)

        yield watched


def on_terminal() -> bool:
    """Return whether progress is to be shown: output goes to a terminal, and not with `--quiet`.

    Elsewhere bars are noise, and the library's trainer prints empty lines to standard output.
    """
    return not is_quiet() and sys.stdout.isatty() and sys.stderr.isatty()
