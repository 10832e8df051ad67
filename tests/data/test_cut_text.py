"""Counts of the text that rows cut off, against counts by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from koine.data import DataOrder, LongRows, Mixture, Phase, Source, TokenSource, tokenize
from koine.data.cut_text import CutText, check_chats_keep_completions, cut_figures
from koine.errors import KoineWarning, UserError

from .conftest import document, write_records


@pytest.fixture(scope="module")
def texts(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    records = [
        {"id": f"{number}", "text": document(number, 4 + 6 * (number % 5)), "language": "en"}
        for number in range(30)
    ]
    tokenize(write_records(folder / "texts.jsonl", records), tokenizer, out=folder / "tokens")
    return folder / "tokens"


@pytest.fixture(scope="module")
def chats(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 chats: every third has a prompt of 80 words, every fifth an answer of 80 words."""
    folder = tmp_path_factory.mktemp("cut-chats")
    records = [
        {
            "id": f"{number}",
            "language": "en",
            "messages": [
                {"role": "user", "content": document(number, 80 if number % 3 == 0 else 3)},
                {"role": "assistant", "content": document(number, 80 if number % 5 == 0 else 3)},
            ],
        }
        for number in range(20)
    ]
    tokenize(write_records(folder / "chats.jsonl", records), tokenizer, out=folder / "tokens")
    return folder / "tokens"


def order(path: Path, packing: str, length: int, **phase: Any) -> DataOrder:
    source = Source(name="s", path=path, proportion=1.0, max_epochs=99.0)
    return DataOrder(
        Mixture(
            phases=(Phase(name="p", steps=10, sources=(source,), **phase),),
            sequence_length=length,
            batch_size=2,
            packing=packing,  # type: ignore[arg-type]
        )
    )


@pytest.mark.parametrize("packing", ["no_split", "one_per_row"])
def test_documents_and_tokens_by_hand(texts: Path, packing: str) -> None:
    lengths = [int(one) for one in TokenSource(texts).lengths]
    time = sorted(lengths)[20]
    with pytest.warns(KoineWarning) as caught:
        [found] = order(texts, packing, time).cut_text
    long = [one for one in lengths if one > time]
    assert (found.documents, found.tokens, found.longest) == (30, sum(lengths), max(lengths))
    assert 0 < len(long) < 30
    assert (found.cut_documents, found.cut_tokens) == (len(long), sum(long) - time * len(long))
    assert (found.chats, found.lost_chats) == (0, 0)
    message = str(caught[0].message)
    share, tokens = 100 * len(long) / 30, 100 * found.cut_tokens / found.tokens
    assert message == (
        f"{len(long)} of 30 documents ({share:.1f} %) are longer than a sequence of {time} tokens and lose their end: "
        f"{found.cut_tokens:,} of {sum(lengths):,} tokens ({tokens:.1f} %) are cut off; raise "
        f"--sequence-length (the longest has {max(lengths)} tokens), choose --packing concat, which cuts "
        "nothing off, or leave long ones out"
    )


def test_what_fits_or_is_concatenated_gives_no_warning(texts: Path) -> None:
    longest = int(TokenSource(texts).lengths.max())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [whole] = order(texts, "no_split", longest).cut_text
        assert order(texts, "concat", 8).cut_text == ()
    assert (whole.cut_documents, whole.cut_tokens) == (0, 0)
    assert cut_figures([whole]) == {}


def test_long_rows_are_counted_separately(texts: Path) -> None:
    longest = int(TokenSource(texts).lengths.max())
    with pytest.warns(KoineWarning, match=f"a sequence of {longest // 2} tokens"):
        counts = order(
            texts,
            "no_split",
            longest // 2,
            long=LongRows(every=2, sequence_length=longest, batch_size=1),
        ).cut_text
    assert [one.sequence_length for one in counts] == [longest // 2, longest]
    assert counts[0].cut_documents > 0
    assert counts[1].cut_documents == 0


def test_chats_that_lose_every_completion_token(chats: Path) -> None:
    """Seven long prompts (0, 3, ..., 18) lose their answers; long answers (5, 10) only their ends."""
    source = TokenSource(chats)
    time = 64
    with pytest.warns(KoineWarning, match=r"; 7 of 20 chats \(35.0 %\) lose every completion token; raise"):
        data = order(chats, "no_split", time)
    [found] = data.cut_text
    by_hand = sum(
        1 for one in range(20) if source.mask(one).any() and not source.mask(one, 0, time)[1:].any()
    )
    assert (found.chats, found.cut_documents, found.lost_chats) == (20, 9, by_hand)
    assert by_hand == 7
    figures = cut_figures(data.cut_text)
    assert figures["cut/documents"] == 9 / 20
    assert figures["cut/tokens"] == pytest.approx(found.cut_tokens / int(source.lengths.sum()))
    assert figures["cut/chats_without_completion"] == 0.35
    says = (
        r"7 of 20 chats \(35.0 %\) lose every completion token in sequences of 64 tokens; at most 25 % may; "
        r"raise --sequence-length \(the longest has \d+ tokens\), choose --packing concat"
    )
    with pytest.raises(UserError, match=says):
        check_chats_keep_completions(data.cut_text)
    check_chats_keep_completions(order(chats, "concat", time).cut_text)


def test_the_last_token_of_a_row_is_the_last_target(chats: Path) -> None:
    """A row that ends with the first completion token learns it; one token shorter learns nothing."""
    source = TokenSource(chats)
    first = int(source.mask(0).argmax())
    longest: dict[int, list[int]] = {first: [], first + 1: []}
    for time in longest:
        with pytest.warns(KoineWarning):
            data = order(chats, "one_per_row", time)
        rows = [data.batch(step) for step in range(10)]
        documents = [
            (spans[0].document, batch.targets[row])
            for batch in rows
            for row, spans in enumerate(batch.documents)
        ]
        longest[time] = [int((targets != -100).sum()) for number, targets in documents if number == 0]
        lost = data.cut_text[0].lost_chats
        by_hand = sum(not source.mask(one, 0, time)[1:].any() for one in range(20))
        assert lost == by_hand
    assert set(longest[first]) == {0}
    assert set(longest[first + 1]) == {1}


def test_small_shares_and_the_bound() -> None:
    fields = {"sequence_length": 8, "documents": 5000, "tokens": 10**6, "chats": 5000, "longest": 900}
    few = CutText(**fields, cut_documents=1, cut_tokens=5, lost_chats=0)
    assert few.describe() == (
        "1 of 5,000 chats (under 0.1 %) are longer than a sequence of 8 tokens and lose their end: 5 of 1,000,000 tokens "
        "(under 0.1 %) are cut off"
    )
    check_chats_keep_completions([CutText(**fields, cut_documents=1250, cut_tokens=5, lost_chats=1250)])
    with pytest.raises(UserError, match="1,251 of 5,000 chats"):
        check_chats_keep_completions([CutText(**fields, cut_documents=1251, cut_tokens=5, lost_chats=1251)])
