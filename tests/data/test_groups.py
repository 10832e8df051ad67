"""Groups in rows: cut fairly, whole, drawn by the step alone, and each token predicted in its conversation."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from koine.data import DataOrder, GroupBatch, PreferenceOrder, TokenSource
from koine.data.groups import Segment, fewest_tokens, fit_segments, path_of
from koine.errors import KoineWarning, UserError

from .conftest import document, write_records
from .groups import REVISION, group_tokens, labelled, mixture_of, pair, scored

TREES = {
    "pair": [(-1, False), (0, True), (0, True)],
    "labelled": [(-1, False), (0, True)],
    "scored": [(-1, False), (0, True), (0, True), (0, True), (0, True)],
    "revised": [
        *((-1, False), (0, True), (0, True)),
        *((1, False), (3, True), (3, True), (2, False), (6, True), (6, True)),
    ],
}


@st.composite
def trees(draw: st.DrawFn) -> list[Segment]:
    shape = TREES[draw(st.sampled_from(sorted(TREES)))]
    return [Segment(parent, draw(st.integers(1, 12)), completion) for parent, completion in shape]


def longest_cap(segments: list[Segment], room: int) -> int:
    """Return the largest common length of completions that fits, by trying all."""
    return max(
        cap
        for cap in range(1, max(one.length for one in segments) + 1)
        if sum(min(one.length, cap) if one.completion else one.length for one in segments) <= room
    )


@given(trees(), st.integers(0, 140))
@settings(max_examples=400, deadline=None)
def test_completions_are_cut_to_the_longest_common_length_that_fits(
    segments: list[Segment], room: int
) -> None:
    if fewest_tokens(segments) > room:
        with pytest.raises(ValueError, match="does not fit"):
            fit_segments(segments, room)
        return
    cap = longest_cap(segments, room)
    found = fit_segments(segments, room)
    assert found == [min(one.length, cap) if one.completion else one.length for one in segments]
    assert sum(found) <= room


def test_a_group_with_revisions_is_whole_or_left_out() -> None:
    """A cut answer would be followed by the turn that asks to revise it."""
    lengths = [3, 5, 4, 2, 5, 4, 2, 5, 4]
    shape = zip(TREES["revised"], lengths, strict=True)
    segments = [Segment(parent, length, completion) for (parent, completion), length in shape]
    assert fewest_tokens(segments) == sum(lengths)
    assert fit_segments(segments, sum(lengths)) == lengths
    with pytest.raises(ValueError, match="does not fit"):
        fit_segments(segments, sum(lengths) - 1)


@pytest.fixture(scope="module")
def folders(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("groups")
    return {
        "preferences": group_tokens(root, tokenizer, [pair(number) for number in range(40)]),
        "revised": group_tokens(
            root / "revised", tokenizer, [pair(number) for number in range(40)], revision=REVISION
        ),
        "labelled": group_tokens(root, tokenizer, [labelled(number) for number in range(40)], "labelled"),
        "scored": group_tokens(root, tokenizer, [scored(number) for number in range(40)], "scored"),
    }


def order_of(folder: Path, **options: object) -> PreferenceOrder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KoineWarning)
        return PreferenceOrder(mixture_of(folder, **options))  # type: ignore[arg-type]


def same(one: GroupBatch, other: GroupBatch) -> bool:
    names = ["tokens", "document_ids", "positions", "predicting", "predicted", "completion_of", "group_of"]
    equal = all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
    return equal and one.segments == other.segments and one.groups == other.groups


@pytest.mark.parametrize("packing", ["no_split", "one_per_row"])
@pytest.mark.parametrize("kind", ["preferences", "revised", "labelled", "scored"])
def test_a_batch_depends_on_the_step_only(folders: dict[str, Path], kind: str, packing: str) -> None:
    first, second = (order_of(folders[kind], packing=packing, time=160) for _ in range(2))
    batches = {step: first.batch(step) for step in (0, 1, 2)}
    for step in (2, 0, 1):
        assert same(second.batch(step), batches[step])
    assert not same(batches[0], batches[1])
    assert not same(order_of(folders[kind], packing=packing, time=160, seed=1).batch(0), batches[0])


@pytest.mark.parametrize("kind", ["preferences", "revised", "labelled", "scored"])
def test_ranks_and_micro_batches_partition_a_step(folders: dict[str, Path], kind: str) -> None:
    order = order_of(folders[kind], time=160)
    whole = order.batch(1)
    parts = [order.batch(1, rank=rank, world_size=2) for rank in (0, 1)]
    micro = [
        order.batch(1, rank=rank, world_size=2, micro_batch=slice(row, row + 1))
        for rank in (0, 1)
        for row in (0, 1)
    ]
    for pieces in (parts, micro):
        assert sum((piece.groups for piece in pieces), ()) == whole.groups
        assert torch.equal(torch.cat([piece.tokens for piece in pieces]), whole.tokens)
        assert torch.equal(torch.cat([piece.predicted for piece in pieces]), whole.predicted)
        assert sum(piece.completions for piece in pieces) == whole.completions
    with pytest.raises(UserError, match="cannot be split over 3 processes"):
        order.batch(0, world_size=3)


@pytest.mark.parametrize("kind", ["preferences", "revised", "labelled", "scored"])
def test_every_group_is_whole_and_in_one_row(folders: dict[str, Path], kind: str) -> None:
    """No row is short of room here, so each group has all of its tokens, in the order of the source."""
    source = TokenSource(folders[kind])
    order = order_of(folders[kind], time=int(source.lengths.max()) + 40, steps=12)
    drawn = set()
    for step in range(12):
        batch = order.batch(step)
        by_group: dict[int, list[int]] = {}
        for number, segment in enumerate(batch.segments):
            by_group.setdefault(segment.group, []).append(number)
        assert sorted(by_group) == list(range(len(batch.groups)))
        for index, group in enumerate(batch.groups):
            numbers = by_group[index]
            placed = [batch.segments[number] for number in numbers]
            assert len({one.row for one in placed}) == 1
            assert [one.length for one in placed] == [one.length for one in source.segments(group.document)]
            begin, end = placed[0].start, placed[-1].start + placed[-1].length
            row = batch.tokens[placed[0].row, begin:end]
            assert row.tolist() == source.tokens(group.document).tolist()
            assert group == source.group(group.document, "s0")
            drawn.add(group.record_id)
        spans = [(row, span.record_id) for row, spans in enumerate(batch.documents) for span in spans]
        rows = {segment.group: segment.row for segment in batch.segments}
        assert spans == [(rows[index], group.record_id) for index, group in enumerate(batch.groups)]
    assert len(drawn) == len(source)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("kind", ["preferences", "revised", "labelled", "scored"])
def test_each_completion_token_is_predicted_by_the_token_before_it(
    folders: dict[str, Path], kind: str, short: bool
) -> None:
    source = TokenSource(folders[kind])
    order = order_of(folders[kind], time=int(np.percentile(source.lengths, 80)) if short else 160)
    cut = 0
    for step in range(3):
        batch = order.batch(step)
        flat, positions = batch.tokens.flatten(), batch.positions.flatten()
        assert torch.equal(flat[batch.predicted_at], batch.predicted)
        assert torch.equal(positions[batch.predicting] + 1, positions[batch.predicted_at])
        leaves = {one.completion: number for number, one in enumerate(batch.segments) if one.completion >= 0}
        assert sorted(leaves) == list(range(batch.completions))
        for completion, number in leaves.items():
            # The conversation, put together from the source without the batch's columns.
            path = [batch.segments[one] for one in path_of(batch.segments, number)]
            group = batch.groups[path[0].group]
            assert int(batch.group_of[completion]) == path[0].group
            tree, first = source.segments(group.document), min_of(batch, path[0].group)
            starts = np.cumsum([0, *(one.length for one in tree)])
            ids: list[int] = []
            counted: list[bool] = []
            for one in path_of(batch.segments, number):
                begin, length = int(starts[one - first]), batch.segments[one].length
                leaf = one == number
                cut += leaf and length < tree[one - first].length
                ids += source.tokens(group.document, begin, begin + length).tolist()
                mask = source.mask(group.document, begin, begin + length) > 0
                counted += mask.tolist() if leaf else [False] * length
            own = batch.completion_of == completion
            at = batch.positions.flatten()[batch.predicted_at[own]].tolist()
            assert at == [position for position, counts in enumerate(counted) if counts]
            assert batch.predicted[own].tolist() == [ids[position] for position in at]
            assert flat[batch.predicting[own]].tolist() == [ids[position - 1] for position in at]
            assert int(batch.completion_lengths[completion]) == len(at) > 0
    assert bool(cut) == (short and kind != "revised")


def min_of(batch: GroupBatch, group: int) -> int:
    """Return the first segment of a group."""
    return next(number for number, one in enumerate(batch.segments) if one.group == group)


@pytest.mark.parametrize("kind", ["preferences", "revised", "labelled", "scored"])
def test_separate_rows_hold_the_same_conversations(folders: dict[str, Path], kind: str) -> None:
    batch = order_of(folders[kind], time=160).batch(0)
    apart = batch.separate()
    assert apart.tokens.shape[0] == apart.completions == batch.completions
    for name in ("predicted", "completion_of", "group_of"):
        assert torch.equal(getattr(apart, name), getattr(batch, name))
    assert apart.groups == batch.groups
    time = apart.tokens.shape[1]
    assert torch.equal(apart.tokens.flatten()[apart.predicted_at], batch.predicted)
    assert torch.equal(apart.predicting, apart.predicted_at - 1)
    assert torch.equal(apart.predicted_at // time, apart.completion_of)
    assert torch.equal(apart.predicted_at % time, batch.positions.flatten()[batch.predicted_at])
    leaves = [number for number, one in enumerate(batch.segments) if one.completion >= 0]
    for number in leaves:
        path = [batch.segments[one] for one in path_of(batch.segments, number)]
        whole = torch.cat([batch.tokens[one.row, one.start : one.start + one.length] for one in path])
        row = apart.tokens[batch.segments[number].completion]
        assert torch.equal(row[: len(whole)], whole)
        assert int((apart.document_ids[batch.segments[number].completion] >= 0).sum()) == len(whole)
        assert not row[len(whole) :].any()


def test_padding_belongs_to_no_group(folders: dict[str, Path]) -> None:
    batch = order_of(folders["preferences"], time=160).batch(0)
    covered = torch.zeros_like(batch.tokens, dtype=torch.bool)
    for one in batch.segments:
        columns = slice(one.start, one.start + one.length)
        assert not covered[one.row, columns].any()
        covered[one.row, columns] = True
    assert torch.equal(covered, batch.document_ids >= 0)
    assert not batch.tokens[~covered].any()
    assert not covered.all()


def test_prompts_without_room_are_left_out_or_refused(tokenizer: Path, tmp_path: Path) -> None:
    records = [pair(number) for number in range(20)]
    records[3] = pair(3, id="long", prompt=document(3, 120))
    folder = group_tokens(tmp_path, tokenizer, records)
    with pytest.warns(KoineWarning, match="1 do not fit even so"):
        order = PreferenceOrder(mixture_of(folder, steps=30, time=64))
    seen = {group.record_id for step in range(30) for group in order.batch(step).groups}
    assert seen == {record["id"] for record in records} - {"long"}
    with pytest.raises(
        UserError, match=r"of 20 groups have no room for their completions in a row of 12 tok"
    ):
        PreferenceOrder(mixture_of(folder, time=12))


def test_orders_refuse_what_they_cannot_hold(
    folders: dict[str, Path], tokenizer: Path, tmp_path: Path
) -> None:
    from koine.data import tokenize

    with pytest.raises(UserError, match=r"holds groups of completions \(preferences\)"):
        DataOrder(mixture_of(folders["preferences"]))
    with pytest.raises(UserError, match="cannot be packed by concat"):
        PreferenceOrder(mixture_of(folders["preferences"], packing="concat"))
    texts = write_records(tmp_path / "a.jsonl", [{"text": document(n), "language": "en"} for n in range(9)])
    tokenize(texts, tokenizer, out=tmp_path / "texts")
    with pytest.raises(UserError, match="holds documents, not groups of completions"):
        PreferenceOrder(mixture_of(tmp_path / "texts"))
