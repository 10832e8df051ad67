"""A training after another draws fresh text: no document twice before the source is exhausted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from koine.data import DataOrder, Mixture, Phase, Source, tokenize
from koine.data.drawn import Drawn, carry_drawn, merge_drawn, read_drawn
from koine.data.packing import ConcatPacking, NoSplitPacking, OnePerRowPacking
from koine.errors import UserError

from .conftest import document, write_records

# Rows of 32 tokens are short on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*lose their end:koine.errors.KoineWarning")


@pytest.fixture(scope="module")
def shards(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents in German and 30 in Hindi, of 4 to 40 words."""
    folder = tmp_path_factory.mktemp("drawn")
    records = [
        {"id": f"{code}{n}", "text": document(n, 4 + 7 * n % 37), "language": code}
        for code, count in (("de", 60), ("hi", 30))
        for n in range(count)
    ]
    tokenize(write_records(folder / "text.jsonl", records), tokenizer, out=folder / "tokens")
    return folder / "tokens"


def mixture(shards: Path, steps: int = 3, **fields: Any) -> Mixture:
    source = Source(name="text", path=shards, proportion=1.0, max_epochs=99.0)
    phase = Phase(name="one", steps=steps, sources=(source,))
    return Mixture(**{"phases": (phase,), "sequence_length": 32, "batch_size": 4, **fields})


def ids(order: DataOrder, steps: Iterable[int] | None = None) -> list[str]:
    """Return record ids in the rows of these steps, or of all."""
    numbers = range(order.mixture.steps) if steps is None else steps
    return [span.record_id for step in numbers for row in order.batch(step).documents for span in row]


@pytest.mark.parametrize("packing", ["concat", "no_split", "one_per_row"])
@pytest.mark.parametrize("length", [32, 48, 20])
def test_a_second_training_draws_other_documents(shards: Path, packing: str, length: int) -> None:
    """For any row length. The mixture alone decides, so a step's documents can be looked up later."""
    first = DataOrder(mixture(shards, packing=packing))
    again = DataOrder(mixture(shards, packing=packing, sequence_length=length))
    assert set(ids(first)) & set(ids(again)), "without it, the same documents come again"
    fresh = mixture(shards, packing=packing, sequence_length=length, drawn=first.drawn())
    second = DataOrder(fresh)
    assert not set(ids(first)) & set(ids(second, range(2)))
    copied = Mixture.from_json(json.loads(json.dumps(fresh.to_json())))
    assert copied == replace(fresh, phases=copied.phases)
    assert ids(DataOrder(copied), [1]) == ids(second, [1])


def test_a_chain_of_trainings_draws_every_document_once(shards: Path) -> None:
    """In one epoch. A document across the end of a training belongs to that training."""
    seen: list[set[str]] = []
    drawn: tuple[Drawn, ...] = ()
    for _ in range(4):
        order = DataOrder(mixture(shards, steps=1, batch_size=6, drawn=drawn))
        seen.append(set(ids(order)))
        drawn = order.drawn()
    german = [{one for one in part if one.startswith("de")} for part in seen]
    assert sum(len(part) for part in german) == len(set.union(*german))
    assert all(part for part in german)


def test_a_run_without_earlier_ones_is_unchanged(shards: Path) -> None:
    """Nothing is drawn before: rows start at the first, and the mixture's JSON has no new field."""
    plain = mixture(shards)
    assert "drawn" not in plain.to_json()
    other = replace(plain, drawn=(Drawn(source="0" * 64, language="de", shuffle=(0, 1), documents=9),))
    assert ids(DataOrder(other)) == ids(DataOrder(plain))
    seeded = DataOrder(replace(plain, seed=1))
    assert ids(DataOrder(replace(plain, drawn=seeded.drawn()))) == ids(DataOrder(plain)), "another shuffle"


def test_ranks_phases_and_long_rows_continue_too(shards: Path) -> None:
    from koine.data.mixture import LongRows

    source = Source(name="text", path=shards, proportion=1.0, max_epochs=99.0)
    long = LongRows(every=2, sequence_length=96, batch_size=1)
    phases = (
        Phase(name="one", steps=2, sources=(source,)),
        Phase(name="two", steps=4, sources=(source,), long=long),
    )
    first = DataOrder(mixture(shards, phases=phases, batch_size=2))
    second = DataOrder(mixture(shards, phases=phases, batch_size=2, drawn=first.drawn()))
    short = [step for step in range(6) if not first.mixture.position(step).long]
    assert not set(ids(first, short)) & set(ids(second, short[:2]))
    rows = [second.batch(1, rank=rank, world_size=2).documents for rank in range(2)]
    assert [row for part in rows for row in part] == second.batch(1).documents
    lanes = {one.shuffle for one in first.drawn() if one.language == "de"}
    assert len(lanes) == 2, "rows of another length have a shuffle of their own"


@pytest.mark.parametrize("kind", [ConcatPacking, NoSplitPacking, OnePerRowPacking])
def test_counts_of_documents_by_brute_force(kind: type[ConcatPacking | NoSplitPacking]) -> None:
    """Compare `documents_before` and `first_row_after` with the contents of the rows."""
    import numpy as np

    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 30, size=17)
    packing = kind(np.arange(17), lengths, 16, (0, 7))
    shuffles = [packing._shuffle(epoch) for epoch in range(4)]
    order = [(epoch, int(one)) for epoch, shuffle in enumerate(shuffles) for one in shuffle]

    def in_order(row: int, known: int) -> list[int]:
        """Numbers of a row's documents in the order of all epochs, after those of the rows before it."""
        found = []
        for piece in packing.row(row):
            place = max(0, known - 1)
            while order[place][1] != piece.document:
                place += 1
            found.append(place)
            known = place + 1
        return found

    known, before = 0, [0]
    firsts = []
    for row in range(30):
        places = in_order(row, known)
        if kind is ConcatPacking and sum(piece.end - piece.start for piece in packing.row(row)) == 17:
            last = packing.row(row)[-1]
            if last.end - last.start == 1:  # the token beyond the row is a target only
                places = places[:-1]
        firsts.append(places[0])
        known = max(known, places[-1] + 1)
        before.append(known)
    for row in range(30):
        assert packing.documents_before(row) == before[row], row
    for documents in range(before[20]):
        after = packing.first_row_after(documents)
        assert firsts[after] >= documents
        assert after == 0 or firsts[after - 1] < documents


def test_records_of_several_models_are_merged(tmp_path: Path) -> None:
    """Branches may read the same text: a model made of them continues after the furthest one."""

    def one(source: str, documents: int) -> Drawn:
        return Drawn(source=source, language="de", shuffle=(0, 1), documents=documents)

    for name, places in {"a": [("web", 5), ("law", 7)], "b": [("web", 9)], "c": []}.items():
        (tmp_path / name).mkdir()
        content = {"drawn": [one(*place).to_json() for place in places]}
        (tmp_path / name / "training.json").write_text(json.dumps(content))
    carry_drawn([tmp_path / name for name in "abc"], tmp_path)
    assert read_drawn(tmp_path) == merge_drawn([[one("web", 9), one("law", 7)]])
    carry_drawn([tmp_path / "c"], tmp_path / "c")
    assert not (tmp_path / "c" / "drawn.json").exists()


@pytest.mark.parametrize(
    "value",
    [
        {}, [1], [{}], [{"source": "a", "language": "de", "shuffle": [0], "documents": -1}],
        [{"source": 1, "language": "de", "shuffle": [0], "documents": 1}],
        [{"source": "a", "language": "de", "shuffle": ["0"], "documents": 1}],
        [{"source": "a", "language": "de", "shuffle": [0], "documents": 1.5}],
    ],
)  # fmt: skip
def test_damaged_records_are_refused(value: Any, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"drawn": value}))
    with pytest.raises(UserError):
        read_drawn(tmp_path)
