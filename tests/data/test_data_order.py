"""The data order: a pure function of the step, in given proportions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from koine.data import DataOrder, Mixture, Phase, Source, TokenSource, tokenize
from koine.data.components import apportion
from koine.data.packing import ConcatPacking, NoSplitPacking
from koine.errors import KoineWarning, UserError
from tests.data.conftest import document, write_records

# Rows of 32 tokens are short on purpose: whole documents are cut off in many of these mixtures.
pytestmark = pytest.mark.filterwarnings("ignore:.*lose their end:koine.errors.KoineWarning")


@pytest.fixture(scope="module")
def sources(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    found = {}
    for name, languages in (("a", ("en", "de", "hi")), ("b", ("en",))):
        records = [
            {
                "id": f"{name}{number}",
                "text": document(number, 5 + number % 40),
                "language": languages[number % len(languages)],
            }
            for number in range(240)
        ]
        found[name] = folder / name
        tokenize(write_records(folder / f"{name}.jsonl", records), tokenizer, out=found[name])
    return found


def mixture(sources: dict[str, Path], **fields: Any) -> Mixture:
    phases = (
        Phase(
            name="pretrain",
            steps=20,
            sources=(
                Source(
                    name="a", path=sources["a"], proportion=0.75, languages={"en": 1, "de": 2}, max_epochs=99
                ),
                Source(name="b", path=sources["b"], proportion=0.25, max_epochs=99),
            ),
        ),
        Phase(
            name="cooldown",
            steps=5,
            sources=(Source(name="a", path=sources["a"], proportion=1.0, max_epochs=99),),
        ),
    )
    return Mixture(**{"phases": phases, "sequence_length": 32, "batch_size": 12, "seed": 3, **fields})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=st.integers(0, 24), world=st.sampled_from([1, 2, 3, 4, 6]), micro=st.integers(1, 5))
@pytest.mark.parametrize("packing", ["concat", "no_split"])
def test_the_same_for_any_ranks_and_micro_batches(
    sources: dict[str, Path], packing: Any, step: int, world: int, micro: int
) -> None:
    whole = DataOrder(mixture(sources, packing=packing), verify=False).batch(step)
    parts = []
    for rank in range(world):
        # A new order for each rank: nothing is remembered, nothing depends on which steps were asked for before.
        order = DataOrder(mixture(sources, packing=packing), verify=False)
        share = 12 // world
        for start in range(0, share, micro):
            parts.append(
                order.batch(
                    step, rank=rank, world_size=world, micro_batch=slice(start, min(start + micro, share))
                )
            )
    for name in ("tokens", "targets", "document_ids"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert whole.documents == [row for part in parts for row in part.documents]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    time=st.integers(2, 40),
    seed=st.integers(0, 99),
)
def test_concat_holds_every_token_once_an_epoch(lengths: list[int], time: int, seed: int) -> None:
    packing = ConcatPacking(np.arange(len(lengths)), np.array(lengths), time, (seed, 1))
    total = sum(lengths)
    seen: list[tuple[int, int]] = []
    for number in range(-(-3 * total // time)):
        row: list[tuple[int, int]] = []
        for document_, start, end in packing.row(number):
            row += [(document_, position) for position in range(start, end)]
        assert len(row) == time + 1
        seen += row[:time]
    for epoch in range(3):
        part = seen[epoch * total : (epoch + 1) * total]
        assert sorted(part) == sorted((d, p) for d, length in enumerate(lengths) for p in range(length))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    time=st.integers(2, 40),
    seed=st.integers(0, 99),
)
def test_no_split_holds_every_document_once_an_epoch(lengths: list[int], time: int, seed: int) -> None:
    packing = NoSplitPacking(np.arange(len(lengths)), np.array(lengths), time, (seed, 1))
    rows, seen = 0, 0
    while seen < len(lengths):
        pieces = packing.row(rows)
        assert sum(end - start for _, start, end in pieces) <= time
        assert all(start == 0 and end == min(lengths[d], time) for d, start, end in pieces)
        seen += len(pieces)
        rows += 1
    assert seen == len(lengths)
    assert rows == packing.rows_in_epoch()


def test_proportions(sources: dict[str, Path]) -> None:
    order = DataOrder(
        mixture(
            sources,
            phases=(
                mixture(sources)
                .phases[0]
                .__class__(name="long", steps=400, sources=mixture(sources).phases[0].sources),
            ),
        ),
        verify=False,
    )
    drawn = {(use.source, use.language): use.tokens for use in order.usage()}
    total = sum(drawn.values())
    # 0.75 split one to two between English and German, 0.25 to the other source.
    for key, share in {("a", "en"): 0.25, ("a", "de"): 0.5, ("b", "en"): 0.25}.items():
        assert abs(drawn[key] / total - share) < 2e-3
    # And early on: the first 20 steps hold 240 rows.
    rows = [spans[0] for step in range(20) for spans in order.batch(step).documents]
    assert abs(sum(span.source == "a" and span.language == "de" for span in rows) - 120) <= 3


@pytest.mark.parametrize("packing", ["concat", "no_split"])
def test_targets_are_the_next_tokens_of_the_same_document(sources: dict[str, Path], packing: Any) -> None:
    order = DataOrder(mixture(sources, packing=packing), verify=False)
    opened = {name: TokenSource(path) for name, path in sources.items()}
    for step in (0, 7, 22):
        batch = order.batch(step)
        assert batch.document_ids is not None
        for row, spans in enumerate(batch.documents):
            filled = 0
            for number, span in enumerate(spans):
                source = opened[span.source]
                tokens = source.tokens(source.number(span.shard, span.document)).tolist()
                columns = slice(span.column, span.column + span.end - span.start)
                assert batch.tokens[row, columns].tolist() == tokens[span.start : span.end]
                assert batch.document_ids[row, columns].tolist() == [number] * (span.end - span.start)
                expected = [*tokens[span.start + 1 : span.end + 1], -100][: span.end - span.start]
                if packing == "no_split" and span.end < len(tokens):
                    expected[-1] = -100  # what was cut off is not a target
                assert batch.targets[row, columns].tolist() == expected
                filled = columns.stop
            assert (batch.targets[row, filled:] == -100).all()
            assert (batch.document_ids[row, filled:] == -1).all()


def test_cross_document_attention(sources: dict[str, Path]) -> None:
    batch = DataOrder(mixture(sources, cross_document_attention=True), verify=False).batch(1)
    assert batch.document_ids is None
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    assert (batch.targets != -100).all()


def test_a_later_phase_continues_the_earlier(sources: dict[str, Path]) -> None:
    order = DataOrder(mixture(sources), verify=False)
    first = {
        (s.record_id, s.start)
        for step in range(20)
        for row in order.batch(step).documents
        for s in row
        if s.language == "de"
    }
    tokens = int(TokenSource(sources["a"]).lengths[TokenSource(sources["a"]).languages == "de"].sum())
    drawn = sum(use.tokens for use in order.usage() if use.phase == "pretrain" and use.language == "de")
    if drawn + 2 * 32 < tokens:
        later = {
            (s.record_id, s.start) for row in order.batch(20).documents for s in row if s.language == "de"
        }
        assert not first & later


def test_repeats_give_a_warning(sources: dict[str, Path]) -> None:
    once = Source(name="b", path=sources["b"], proportion=1.0, max_epochs=1.0)
    with pytest.warns(KoineWarning, match=r"b/en \d+\.\d times \(limit 1\)"):
        DataOrder(
            Mixture(phases=(Phase(name="p", steps=900, sources=(once,)),), sequence_length=32, batch_size=12)
        )


def test_overlapping_sources_are_refused(sources: dict[str, Path]) -> None:
    twice = tuple(Source(name=name, path=sources["b"], proportion=0.5) for name in "xy")
    with pytest.raises(UserError, match="'x' and 'y' both draw 'en'"):
        DataOrder(
            Mixture(phases=(Phase(name="p", steps=1, sources=twice),), sequence_length=32, batch_size=2)
        )


def test_json_round_trip_and_errors(sources: dict[str, Path]) -> None:
    value = mixture(sources).to_json()
    assert Mixture.from_json(value).to_json() == value
    for change, line in (
        ({"sequence_lenght": 3}, "did you mean 'sequence_length'"),
        ({"packing": "no_splits"}, "did you mean 'no_split'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"phases": []}, "no phases"),
    ):
        with pytest.raises(UserError, match=line):
            Mixture.from_json({**value, **change})
    with pytest.raises(UserError, match="the proportions sum to 1.2, not 1"):
        Phase(name="p", steps=1, sources=tuple(Source(name=n, path=Path(n), proportion=0.6) for n in "ab"))
    with pytest.raises(UserError, match="unknown language 'dee'"):
        Source(name="a", path=Path("a"), proportion=1.0, languages={"dee": 1.0})
    with pytest.raises(UserError, match="holds no document in 'fr'"):
        DataOrder(
            Mixture(
                phases=(
                    Phase(
                        name="p",
                        steps=1,
                        sources=(Source(name="a", path=sources["a"], proportion=1.0, languages={"fr": 1}),),
                    ),
                ),
                sequence_length=32,
                batch_size=2,
            )
        )


def test_truncated_documents_give_a_warning(sources: dict[str, Path]) -> None:
    with pytest.warns(
        KoineWarning, match=r"324 of 480 documents \(67.5 %\) are longer than a sequence of 32 tokens"
    ):
        DataOrder(mixture(sources, packing="no_split"))


def test_apportion_by_hand() -> None:
    """One each, the rest by largest remainder.

    Of 10 with equal weights: 4, 3, 3. Of 10 by 7 to 2 to 1: 1 + 4.9, 1.4, 0.7.
    """
    assert apportion(np.array([1.0, 1.0, 1.0]), 10).tolist() == [4, 3, 3]
    assert apportion(np.array([7.0, 2.0, 1.0]), 10).tolist() == [6, 2, 2]
    assert apportion(np.array([1.0, 1e-9]), 4).tolist() == [3, 1]
