"""The cache of reference log-probabilities: its values, its names, a kill, and other weights."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import koine.align.reference as module
from koine.align import completion_log_probabilities, reference_log_probabilities
from koine.data import PreferenceOrder, TokenSource
from koine.errors import KoineWarning, UserError
from koine.files import read_json, write_json
from koine.model import load_model
from tests.train.models import small_model

from .worlds import AlignWorld, write_model, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AlignWorld:
    return write_world(tmp_path_factory.mktemp("world"), ("preferences", "revised"))


def order_of(world: AlignWorld, kind: str = "preferences", **options: Any) -> PreferenceOrder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KoineWarning)
        return PreferenceOrder(world.mixture(kind, **options))


def files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*.f64"))}


@pytest.mark.parametrize("kind", ["preferences", "revised"])
def test_values_are_those_of_a_batch(world: AlignWorld, tmp_path: Path, kind: str) -> None:
    order, model = order_of(world, kind), load_model(world.model)
    found = reference_log_probabilities(model, order, cache=tmp_path)
    for step in range(3):
        batch = order.batch(step)
        with torch.no_grad():
            expected = completion_log_probabilities(model, batch).sums
        # Other neighbours in the rows of one pass.
        assert torch.allclose(found.of(batch), expected, rtol=1e-5, atol=1e-4)
        apart = order.batch(step, rank=1, world_size=2)
        assert torch.equal(found.of(apart), found.of(batch)[-apart.completions :])


def test_the_second_time_nothing_is_computed(
    world: AlignWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reference_log_probabilities(load_model(world.model), order_of(world), cache=tmp_path)

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "_compute", never)
    # Another seed and batch size draw the same groups.
    for order in (order_of(world), order_of(world, seed=5, rows=2, steps=7)):
        again = reference_log_probabilities(load_model(world.model), order, cache=tmp_path)
        assert again == first
        assert all(np.array_equal(again.sums[name], first.sums[name]) for name in first.sums)
        assert torch.equal(again.of(order.batch(1)), first.of(order.batch(1)))


def test_what_determines_the_values_names_the_folder(world: AlignWorld, tmp_path: Path) -> None:
    other_weights = load_model(write_model(tmp_path / "other", world.root / "tokenizer", seed=1))
    same = load_model(world.model)
    cache = tmp_path / "cache"
    first = reference_log_probabilities(same, order_of(world), cache=cache)
    calls: dict[str, Any] = {
        "weights": lambda: reference_log_probabilities(other_weights, order_of(world), cache=cache),
        "row": lambda: reference_log_probabilities(
            load_model(world.model), order_of(world, time=96), cache=cache
        ),
        "tokens": lambda: reference_log_probabilities(
            load_model(world.model), order_of(world, "revised"), cache=cache
        ),
        "dtype": lambda: reference_log_probabilities(
            load_model(world.model), order_of(world), cache=cache, dtype=torch.bfloat16
        ),
    }
    keys = {first.key}
    for count, (name, call) in enumerate(calls.items(), 2):
        keys.add(call().key)
        assert len(keys) == len(list(cache.iterdir())) == count, name
    identities = [read_json(folder / "reference.json") for folder in cache.iterdir()]
    assert {one["row"] for one in identities} == {96, 128}
    assert {one["dtype"] for one in identities} == {"float32", "bfloat16"}
    assert len({one["weights"] for one in identities}) == 2


def test_a_killed_computation_goes_on(
    world: AlignWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GROUPS_OF_FILE", 10)
    whole = reference_log_probabilities(load_model(world.model), order_of(world), cache=tmp_path / "whole")
    computed: list[range] = []
    compute = module._compute

    def interrupted(*args: Any) -> Any:
        [groups] = [one for one in args if isinstance(one, range)]
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(groups)
        return compute(*args)

    monkeypatch.setattr(module, "_compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reference_log_probabilities(load_model(world.model), order_of(world), cache=tmp_path / "cut")
    assert len(files(tmp_path / "cut")) == 2
    # A file that a kill left short is computed again.
    first = min(tmp_path.glob("cut/*/*.f64"))
    first.write_bytes(first.read_bytes()[:-8])
    computed.clear()

    def counted(*args: Any) -> Any:
        computed.extend(one for one in args if isinstance(one, range))
        return compute(*args)

    monkeypatch.setattr(module, "_compute", counted)
    found = reference_log_probabilities(load_model(world.model), order_of(world), cache=tmp_path / "cut")
    assert computed == [range(10), range(20, 24)]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert found == whole


def test_a_cache_of_other_weights_is_refused(world: AlignWorld, tmp_path: Path) -> None:
    reference_log_probabilities(load_model(world.model), order_of(world), cache=tmp_path)
    [folder] = tmp_path.iterdir()
    record = read_json(folder / "reference.json")
    write_json(folder / "reference.json", {**record, "weights": "0" * 64})
    with pytest.raises(UserError, match="is a cache of another weights"):
        reference_log_probabilities(load_model(world.model), order_of(world), cache=tmp_path)


def test_rows_of_two_lengths_and_another_vocabulary_are_refused(world: AlignWorld, tmp_path: Path) -> None:
    import dataclasses

    from koine.data import LongRows

    mixture = world.mixture(rows=4, time=128)
    [phase] = mixture.phases
    long = LongRows(every=2, sequence_length=256, batch_size=2, sources=phase.sources)
    two = dataclasses.replace(mixture, phases=(dataclasses.replace(phase, long=long),))
    with pytest.raises(UserError, match="a reference needs rows of one length"):
        reference_log_probabilities(load_model(world.model), PreferenceOrder(two), cache=tmp_path)
    with pytest.raises(UserError, match="the pairs have ids up to 350, the reference knows 64"):
        reference_log_probabilities(small_model(), order_of(world), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_groups_that_fit_no_row_have_no_values(world: AlignWorld, tmp_path: Path) -> None:
    """They are not drawn; asking for one is an error, not a zero."""
    from koine.data.groups import fewest_tokens

    source = TokenSource(world.tokens["preferences"])
    least = [fewest_tokens(source.segments(number)) for number in range(len(source))]
    row = max(least) - 1
    lost = [number for number, tokens in enumerate(least) if tokens > row]
    assert lost
    order = order_of(world, time=row)
    found = reference_log_probabilities(load_model(world.model), order, cache=tmp_path)
    values = found.sums["s0"]
    missing = {number for number in range(len(source)) if np.isnan(values[2 * number : 2 * number + 2]).all()}
    assert missing == set(lost)
    assert np.isnan(values).sum() == 2 * len(lost)
    wide = order_of(world, steps=12)
    with_lost = next(
        batch
        for batch in map(wide.batch, range(12))
        if {group.document for group in batch.groups} & set(lost)
    )
    with pytest.raises(ValueError, match="no log-probabilities of these"):
        found.of(with_lost)


def test_a_copy_of_the_shards_elsewhere_has_the_same_cache(world: AlignWorld, tmp_path: Path) -> None:
    from tests.data.groups import mixture_of

    first = reference_log_probabilities(load_model(world.model), order_of(world), cache=tmp_path / "c")
    shutil.copytree(world.tokens["preferences"], tmp_path / "moved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KoineWarning)
        moved = PreferenceOrder(mixture_of(tmp_path / "moved", time=128))
    assert reference_log_probabilities(load_model(world.model), moved, cache=tmp_path / "c").key == first.key
