"""Batches of long rows in a phase: still a pure function of the step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from koine.data import DataOrder, LongRows, Mixture, Phase, Source, TokenSource, tokenize
from koine.data.mixture import Shape, StepPosition
from koine.data.packing import ConcatPacking, OnePerRowPacking
from koine.errors import KoineWarning, UserError
from tests.data.conftest import document, write_records

pytestmark = pytest.mark.filterwarnings("ignore:.*lose their end:koine.errors.KoineWarning")


@pytest.fixture(scope="module")
def folders(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("long-rows")
    found = {}
    for name, length in (("short", 12), ("books", 150)):
        records = [
            {"id": f"{name}{number}", "text": document(number, length), "language": ("en", "de")[number % 2]}
            for number in range(80)
        ]
        found[name] = folder / name
        tokenize(write_records(folder / f"{name}.jsonl", records), tokenizer, out=found[name])
    return found


def source(folders: dict[str, Path], name: str, **fields: Any) -> Source:
    return Source(**{"name": name, "path": folders[name], "proportion": 1.0, "max_epochs": 99.0, **fields})


def mixture(folders: dict[str, Path], *, long: bool = True, **fields: Any) -> Mixture:
    rows = LongRows(every=4, sequence_length=96, batch_size=2, sources=(source(folders, "books"),))
    phases = (
        Phase(name="one", steps=10, sources=(source(folders, "short"),), long=rows if long else None),
        Phase(
            name="two",
            steps=6,
            sources=(source(folders, "short"),),
            sequence_length=64,
            batch_size=3,
            long=LongRows(every=3, sequence_length=96, batch_size=6) if long else None,
        ),
    )
    return Mixture(**{"phases": phases, "sequence_length": 32, "batch_size": 6, "seed": 3, **fields})


def test_the_shapes_of_the_steps(folders: dict[str, Path]) -> None:
    mix = mixture(folders)
    base, own, long, more = Shape(32, 6), Shape(64, 3), Shape(96, 2), Shape(96, 6)
    expected = [base, base, base, long] * 2 + [base, base] + [own, own, more] * 2
    assert [mix.shape(step) for step in range(16)] == expected
    assert mix.shapes() == Counter(expected)
    assert [mix.position(step) for step in (2, 3, 4, 7, 10, 15)] == [
        StepPosition(0, 2, False, 2),
        StepPosition(0, 3, True, 0),
        StepPosition(0, 4, False, 3),
        StepPosition(0, 7, True, 1),
        StepPosition(1, 0, False, 0),
        StepPosition(1, 5, True, 1),
    ]
    order = DataOrder(mix, verify=False)
    for step, shape in enumerate(expected):
        assert order.batch(step).tokens.shape == (shape.batch_size, shape.sequence_length)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=st.integers(0, 9), world=st.sampled_from([1, 2]), micro=st.integers(1, 3))
@pytest.mark.parametrize("packing", ["concat", "no_split", "one_per_row"])
def test_the_same_for_any_ranks_and_micro_batches(
    folders: dict[str, Path], packing: Any, step: int, world: int, micro: int
) -> None:
    whole = DataOrder(mixture(folders, packing=packing), verify=False).batch(step)
    share = len(whole.tokens) // world
    parts = [
        DataOrder(mixture(folders, packing=packing), verify=False).batch(
            step, rank=rank, world_size=world, micro_batch=slice(start, min(start + micro, share))
        )
        for rank in range(world)
        for start in range(0, share, micro)
    ]
    for name in ("tokens", "targets", "document_ids"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert whole.documents == [row for part in parts for row in part.documents]


def test_long_rows_do_not_change_the_others(folders: dict[str, Path]) -> None:
    with_long, without = (DataOrder(mixture(folders, long=long), verify=False) for long in (True, False))
    steps = [step for step in range(10) if (step + 1) % 4]
    for plain, step in enumerate(steps):
        assert torch.equal(with_long.batch(step).tokens, without.batch(plain).tokens)
    drawn = {span.source for step in (3, 7) for row in with_long.batch(step).documents for span in row}
    assert drawn == {"books"}


def test_usage_counts_every_row(folders: dict[str, Path]) -> None:
    order = DataOrder(mixture(folders), verify=False)
    counted: Counter[tuple[str, str, str, int]] = Counter()
    for step in range(16):
        phase, shape = order.mixture.phases[order.mixture.position(step).phase], order.mixture.shape(step)
        for row in order.batch(step).documents:
            counted[phase.name, row[0].source, row[0].language, shape.sequence_length] += (
                shape.sequence_length
            )
    used = {(use.phase, use.source, use.language, use.sequence_length): use.tokens for use in order.usage()}
    assert used == counted
    books = TokenSource(folders["books"])
    for use in order.usage():
        if use.source == "books":
            total = int(books.lengths[books.languages == use.language].sum())
            assert use.epochs == pytest.approx(use.tokens / total)


def test_repeats_of_both_lengths_count_together(folders: dict[str, Path]) -> None:
    """Half an epoch in short rows and most of one in long rows is more than one."""
    tokens = int(TokenSource(folders["short"]).lengths.sum())
    steps = -(-tokens // (32 * 6)) * 2 // 3
    once = source(folders, "short", max_epochs=1.0)
    rows = LongRows(every=3, sequence_length=96, batch_size=6)
    phase = Phase(name="p", steps=steps, sources=(once,))
    DataOrder(Mixture(phases=(phase,), sequence_length=32, batch_size=6), verify=False)  # no warning
    with pytest.warns(KoineWarning, match=r"short/en \d\.\d times \(limit 1\)"):
        DataOrder(
            Mixture(phases=(replace(phase, long=rows),), sequence_length=32, batch_size=6), verify=False
        )


def test_long_rows_of_long_documents_only(folders: dict[str, Path]) -> None:
    """Short documents in a long row teach no long distances; `min_tokens` leaves them out."""
    lengths = TokenSource(folders["books"]).lengths
    least = int(np.quantile(lengths, 0.6))

    def order(least: int | None) -> DataOrder:
        rows = LongRows(
            every=2, sequence_length=96, batch_size=2, sources=(source(folders, "books", min_tokens=least),)
        )
        phase = Phase(name="p", steps=12, sources=(source(folders, "books"),), long=rows)
        return DataOrder(Mixture(phases=(phase,), sequence_length=32, batch_size=6), verify=False)

    opened = TokenSource(folders["books"])
    for step in range(1, 12, 2):
        for row in order(least).batch(step).documents:
            assert all(lengths[opened.number(span.shard, span.document)] >= least for span in row)
    assert torch.equal(order(least).batch(0).tokens, order(None).batch(0).tokens)
    passes = {use.sequence_length: use.epochs for use in order(least).usage() if use.language == "en"}
    english = (opened.languages == "en") & (lengths >= least)
    assert passes[96] == pytest.approx(6 * 2 * 96 / 2 / int(lengths[english].sum()), rel=0.2)
    with pytest.raises(
        UserError, match=r"holds no document of 100000 tokens, the longest has \d+; lower min_tok"
    ):
        order(100_000)


def test_one_document_per_row() -> None:
    lengths = np.array([3, 9, 1, 5])
    packing = OnePerRowPacking(np.arange(4), lengths, 6, (0, 1))
    rows = [packing.row(number) for number in range(8)]
    assert all(len(row) == 1 for row in rows)
    for epoch in (rows[:4], rows[4:]):
        assert sorted(row[0] for row in epoch) == [(0, 0, 3), (1, 0, 6), (2, 0, 1), (3, 0, 5)]


def test_the_order_of_older_mixtures_is_unchanged() -> None:
    """Rows of this packing have not changed, so the records of older models stay true."""
    packing = ConcatPacking(np.arange(5), np.array([3, 5, 2, 7, 4]), 6, (3, 1))
    assert [packing.row(number) for number in range(2)] == [
        [(2, 0, 2), (0, 0, 3), (3, 0, 2)],
        [(3, 1, 7), (1, 0, 1)],
    ]


def test_json(folders: dict[str, Path]) -> None:
    value = mixture(folders).to_json()
    assert Mixture.from_json(value).to_json() == value
    assert value["phases"][0]["long"]["sources"][0]["path"] == str(folders["books"].resolve())
    plain = mixture(folders, long=False).to_json()["phases"][0]
    assert plain.keys() == {"name", "steps", "sources"}


def test_mistakes(folders: dict[str, Path]) -> None:
    value = mixture(folders).to_json()
    first = value["phases"][0]
    for change, line in (
        ({"every": 1}, "phase 'one': long rows: every is 1; it must be at least 2"),
        ({"every": 11}, "phase 'one': has 10 steps, and every 11th is one of long rows"),
        ({"sequence_length": 32}, "its long rows have 32 tokens, the others 32; long rows must be longer"),
        ({"batch_size": 0}, "long rows: batch_size is 0"),
        ({"sources": [{"name": "a", "path": "a", "proportion": 1.0, "min_tokens": 0}]}, "min_tokens is 0"),
        ({"evry": 4}, "phase 'one': long rows: unknown key 'evry'; did you mean 'every'"),
        ({"sources": [{"name": "a", "path": "a", "proportion": 0.5}]}, "the proportions sum to 0.5, not 1"),
        (
            {"sources": [{"name": "short", "path": "a", "proportion": 1.0}]},
            "'short' is one folder for long rows and another",
        ),
    ):
        long = {**first["long"], **change}
        with pytest.raises(UserError, match=line):
            Mixture.from_json({**value, "phases": [{**first, "long": long}]})
    with pytest.raises(UserError, match="phase 'one': sequence_length is 1"):
        Mixture.from_json({**value, "phases": [{**first, "sequence_length": 1}]})
