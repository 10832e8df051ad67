"""`koine align inspect`: each figure beside data that were made to have it, CHES beside its definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from koine.align import completion_log_probabilities, inspect_groups
from koine.align.inspect_content import GroupText, GroupTexts, other_languages
from koine.align.inspect_pairs import Inspection, opened_groups
from koine.cli.main import cli
from koine.data import PreferenceOrder, TokenSource
from koine.model import load_model
from koine.tokenizer import load_tokenizer
from tests.data.conftest import document, write_records
from tests.data.groups import REVISION, group_tokens, labelled, mixture_of, pair, scored

from .worlds import AlignWorld, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AlignWorld:
    return write_world(tmp_path_factory.mktemp("world"), ("preferences", "revised"), count=16)


def swapped(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "id": record["id"] + "s", "chosen": record["rejected"], "rejected": record["chosen"]}


def odd_pairs() -> list[dict[str, Any]]:
    """Twelve pairs, one repeated twice, one contradicted, one with a prompt that fills a row, one cut."""
    records = [pair(number) for number in range(12)]
    records += [{**pair(2), "id": "again"}, {**pair(2), "id": "once more"}]
    records.append(swapped(pair(5)))
    records.append(pair(20, id="full", prompt=document(20, 130)))
    records.append(pair(21, id="cut", chosen=document(21, 120)))
    return records


def inspected(folder: Path, tokenizer: Path, **options: Any) -> Inspection:
    chosen = {"sequence_length": 96, "identify_languages": False, **options}
    return inspect_groups(TokenSource(folder), load_tokenizer(tokenizer), **chosen)


def by_language(inspection: Inspection, name: str) -> dict[str, Any]:
    return {row["language"]: row[name] for row in inspection.to_json()["languages"]}


def test_repeats_contradictions_and_truncation(world: AlignWorld, tmp_path: Path) -> None:
    tokenizer = world.root / "tokenizer"
    folder = group_tokens(tmp_path, tokenizer, odd_pairs())
    found = inspected(folder, tokenizer)
    # Even numbers are English, odd ones German.
    assert by_language(found, "groups") == {"en": 9, "de": 8}
    assert by_language(found, "duplicates") == {"en": 2, "de": 0}
    # A pair and its swapped copy contradict each other.
    assert by_language(found, "contradictions") == {"en": 0, "de": 2}
    assert by_language(found, "cut") == {"en": 0, "de": 1}
    assert by_language(found, "left_out") == {"en": 1, "de": 0}
    total = found.to_json()["total"]
    assert total["groups"] == 17
    assert total["tokens"] == TokenSource(folder).lengths.sum()
    assert total["accuracy"] is None


def test_a_reversed_label_is_the_swapped_pair(world: AlignWorld, tmp_path: Path) -> None:
    """The chosen answer with probability 0.2 is the rejected one."""
    tokenizer = world.root / "tokenizer"
    records = [
        pair(1),
        pair(1, id="doubted", probability=0.2),
        pair(3),
        {**swapped(pair(3)), "probability": 0.1},
    ]
    found = inspected(group_tokens(tmp_path, tokenizer, records), tokenizer).total
    assert (found.contradictions, found.duplicates) == (2, 1)


def test_prompts_in_two_splits(world: AlignWorld, tmp_path: Path) -> None:
    tokenizer = world.root / "tokenizer"
    held = [pair(3, id="a", chosen="other words"), pair(50), pair(52)]
    other = TokenSource(group_tokens(tmp_path, tokenizer, held))
    found = inspected(world.tokens["preferences"], tokenizer, held_out=other)
    assert by_language(found, "shared_prompts") == {"en": 0, "de": 1}


@pytest.mark.parametrize("probability", [1.0, 0.7])
def test_the_longer_answer_wins(world: AlignWorld, tmp_path: Path, probability: float) -> None:
    tokenizer = world.root / "tokenizer"
    long, short = document(1, 9), document(2, 3)
    records = [
        {"prompt": document(number, 4), "language": "en", "chosen": long, "rejected": short}
        for number in range(3)
    ]
    records.append({**records[0], "prompt": document(9, 4), "chosen": short, "rejected": long})
    records = [{**one, "probability": probability} for one in records]
    found = inspected(group_tokens(tmp_path, tokenizer, records), tokenizer).to_json()["total"]
    assert found["longer_wins"] == pytest.approx((3 * probability + 1 - probability) / 4)


def test_other_kinds(world: AlignWorld, tmp_path: Path) -> None:
    tokenizer = world.root / "tokenizer"
    records = [labelled(number) for number in range(6)]
    records += [
        {**labelled(1), "id": "opposed", "label": not labelled(1)["label"]},
        {**labelled(2), "id": "b"},
    ]
    found = inspected(group_tokens(tmp_path, tokenizer, records, "labelled"), tokenizer).to_json()["total"]
    assert (found["groups"], found["duplicates"], found["contradictions"]) == (8, 1, 2)
    assert found["longer_wins"] is None

    # The scores of these completions rise with their lengths.
    several = [scored(number) for number in range(6)]
    inspection = inspected(group_tokens(tmp_path, tokenizer, several, "scored"), tokenizer)
    found = inspection.to_json()["total"]
    assert (found["contradictions"], inspection.kind) == (0, "scored")
    assert found["longer_wins"] > 0.9


def states_alone(model: Any, batch: Any) -> Any:
    """Return the states that predict each answer's tokens, each conversation alone."""
    from .group_batches import conversations

    for ids, counted in conversations(batch):
        with torch.no_grad():
            hidden = model(torch.tensor([ids]))[0]
        yield hidden[[position - 1 for position in counted]].double()


def test_ches_and_accuracy_are_those_of_the_definitions(world: AlignWorld) -> None:
    model, folder = load_model(world.model), world.tokens["preferences"]
    found = inspected(folder, world.model, model=model, shown=16, rows=2)
    source = TokenSource(folder)
    order = PreferenceOrder(mixture_of(folder, packing="one_per_row", rows=1, time=96, steps=16))
    expected: dict[str, tuple[float, float]] = {}
    right: dict[str, list[float]] = {"sums": [], "means": []}
    for step in range(16):
        batch = order.batch(step)
        [group] = batch.groups
        if group.record_id in expected:
            continue
        chosen, rejected = states_alone(model, batch)
        one, other = chosen.sum(0), rejected.sum(0)
        means = chosen.mean(0), rejected.mean(0)
        expected[group.record_id] = (float(one @ other - one @ one), float(means[0] @ (means[1] - means[0])))
        with torch.no_grad():
            logs = completion_log_probabilities(model, batch)
        for name, values in (("sums", logs.sums), ("means", logs.means)):
            right[name].append(float(values[0] > values[1]))
    shown = {one["id"]: (one["ches_of_sums"], one["ches"]) for one in found.displacing}
    assert len(shown) > 10
    for name, values in shown.items():
        if name in expected:
            assert values == pytest.approx(expected[name], rel=1e-4)
    scores = [one["ches"] for one in found.displacing]
    assert scores == sorted(scores, reverse=True)
    total = found.to_json()["total"]
    assert total["read_by_model"] == len(source) == 16
    if len(expected) == len(source):
        assert total["accuracy"] == pytest.approx(np.mean(right["sums"]))
        assert total["accuracy_means"] == pytest.approx(np.mean(right["means"]))
        assert total["ches"] == pytest.approx(np.mean([means for _, means in expected.values()]), rel=1e-4)
    # Fewer are shown: those with the highest scores.
    few = inspected(folder, world.model, model=model, shown=3)
    assert [one["id"] for one in few.displacing] == [one["id"] for one in found.displacing][:3]
    assert inspected(folder, world.model, model=model, limit=5).total.read == 5


def test_similar_answers_have_the_higher_score(world: AlignWorld, tmp_path: Path) -> None:
    """An answer beside itself with one more word, and beside other words."""
    tokenizer = world.root / "tokenizer"
    same = {**pair(1), "id": "alike", "chosen": document(1, 8), "rejected": document(1, 8) + " sea"}
    other = {**pair(1), "id": "unlike", "chosen": document(1, 8), "rejected": "Fluss zum Meer über Steine"}
    folder = group_tokens(tmp_path, tokenizer, [other, same])
    found = inspected(folder, tokenizer, model=load_model(world.model))
    assert [one["id"] for one in found.displacing] == ["alike", "unlike"]


def test_revisions_are_read_once(world: AlignWorld) -> None:
    model = load_model(world.model)
    plain = inspected(world.tokens["preferences"], world.model, model=model, sequence_length=128)
    revised = inspected(world.tokens["revised"], world.model, model=model, sequence_length=256)
    for name in ("ches", "accuracy", "longer_wins", "read_by_model"):
        assert revised.to_json()["total"][name] == pytest.approx(plain.to_json()["total"][name], rel=1e-4)
    assert [one["id"] for one in revised.displacing] == [one["id"] for one in plain.displacing]


def test_texts_are_without_the_template(world: AlignWorld) -> None:
    texts = GroupTexts(TokenSource(world.tokens["revised"]), load_tokenizer(world.model))
    for number in (0, 7):
        record = pair(number)
        assert texts(number) == GroupText(record["prompt"], (record["chosen"], record["rejected"]))
    assert REVISION not in str(texts(0))


def test_answers_in_another_language() -> None:
    languages = {"a": "en", "b": "de", "?": None}
    count = lambda prompt, *answers: other_languages(GroupText(prompt, answers), languages.get)  # noqa: E731
    assert count("a", "a", "b") == (1, 2)
    assert count("b", "a", "a") == (2, 2)
    assert count("a", "?", "b") == (1, 1)
    assert count("?", "a", "b") == (0, 0)


def test_languages_are_told_by_script_and_model(world: AlignWorld, tmp_path: Path) -> None:
    pytest.importorskip("py3langid", reason="the extra [langid]")
    greek, english = (
        "Ο ποταμός ρέει προς τη θάλασσα και πίσω.",
        "The river runs down to the sea and back again.",
    )
    german = "Der Fluss fließt hinunter zum Meer und wieder zurück über die alten Steine."
    records = [
        {"prompt": english, "chosen": greek, "rejected": english + " No.", "language": "en"},
        {"prompt": german, "chosen": german + " Ja.", "rejected": english, "language": "de"},
        {"prompt": "1 + 1", "chosen": greek, "rejected": "2", "language": "en"},
    ]
    tokenizer = world.root / "tokenizer"
    found = inspected(group_tokens(tmp_path, tokenizer, records), tokenizer, identify_languages=True)
    assert by_language(found, "answers_identified") == {"en": 2, "de": 2}
    assert by_language(found, "other_language") == {"en": 1, "de": 1}


def koine(*words: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, words)), prog_name="koine", catch_exceptions=False)


def test_the_command_reads_records_and_shards(world: AlignWorld, tmp_path: Path) -> None:
    records = [pair(number) for number in range(16)]
    file = write_records(tmp_path / "pairs.jsonl", records)
    options = ("--model", world.model, "--sequence-length", 96, "--no-identify-languages", "--device", "cpu")
    more = ("--dtype", "float32", "--show", 2)
    answers = [
        json.loads(koine("align", "inspect", place, *options, *more, "--json", "--quiet").stdout)
        for place in (file, world.tokens["preferences"])
    ]
    # Only the ids of records that have none would differ.
    assert answers[0] == answers[1]
    assert [len(answers[0][name]) for name in ("languages", "displacing")] == [2, 2]
    page = tmp_path / "page.html"
    shown = koine("align", "inspect", file, *options, *more, "--held-out", file, "--out", page)
    assert shown.exit_code == 0
    words = ("language", "repeated", "contradicted", "longer wins", "accuracy", "CHES", "all", "pair")
    for word in words:
        assert word in shown.output
        assert word in page.read_text(encoding="utf-8")
    # All prompts are in the held-out split: the same file.
    assert (
        json.loads(
            koine(
                "align", "inspect", file, *options, "--limit", 0, "--held-out", file, "--json", "--quiet"
            ).stdout
        )["total"]["shared_prompts"]
        == 16
    )


def test_shards_of_a_file_are_removed(
    world: AlignWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    file = write_records(tmp_path / "pairs.jsonl", [pair(0), pair(1)])
    with opened_groups(file, world.model) as source:
        assert len(source) == 2
        assert source.path.is_dir()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_step_of_a_plan(world: AlignWorld, tmp_path: Path) -> None:
    from koine.errors import UserError
    from koine.plan import PlannedInput
    from koine.plan.report.blocks import read_step_report
    from koine.steps import checks
    from koine.steps.alignment import inspect_preferences

    pairs = world.tokens["preferences"]
    options: dict[str, Any] = {"sequence_length": 96, "limit": 4, "identify_languages": False}
    inspect_preferences(pairs, world.model, pairs, out=tmp_path, **options)
    written = json.loads((tmp_path / "inspection.json").read_text())
    assert (written["total"]["read_by_model"], written["total"]["shared_prompts"]) == (4, 16)
    assert read_step_report(tmp_path / "report.json")
    model = PlannedInput(world.model, exists=True)
    checks.inspected_groups(PlannedInput(pairs, exists=True), model, **options)
    (tmp_path / "tokenizer.json").write_text("{}")
    other = PlannedInput(tmp_path, exists=True)
    with pytest.raises(UserError, match="tokenized with another tokenizer"):
        checks.inspected_groups(PlannedInput(pairs, exists=True), other, **options)
