"""Revisions: what the model reads, and the turn that is saved with it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from koine.align import preference_objective, reference_log_probabilities
from koine.align.revise import revise, revision_for, saved_revision
from koine.cli.main import cli
from koine.data import PreferenceOrder, tokenize
from koine.errors import UserError
from koine.generate import LocalEngine
from koine.generate.engine import Completion
from koine.generate.sampling import Sampling
from koine.serve.chat.terminal import Chat
from koine.train import TrainSettings, train
from tests.align.world import mixture_of, model_of, write_tokenizer
from tests.data.conftest import document, write_records

TURN = "Write a better answer."


class Echo:
    """An engine whose answers say what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[list[str]]] = []
        self.seeds: list[int | None] = []

    def generate(self, conversations: Sequence[Sequence[Any]], sampling: Sampling) -> list[Completion]:
        self.asked.append([[one["content"] for one in messages] for messages in conversations])
        self.seeds.append(sampling.seed)
        return [
            Completion(
                text=f"{len(self.asked)}.{number}",
                tokens=(1,),
                log_probabilities=(0.0,),
                prompt_tokens=1,
                finish="stop",
            )
            for number in range(len(conversations))
        ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained by SRPO on pairs with revisions."""
    folder = tmp_path_factory.mktemp("revise")
    tokenizer = write_tokenizer(folder / "tokenizer")
    records = [
        {
            "id": f"r{number}",
            "language": "en",
            "prompt": document(number, 3),
            "chosen": document(number + 9, 3),
            "rejected": document(number + 5, 2),
        }
        for number in range(8)
    ]
    source = write_records(folder / "pairs.jsonl", records)
    tokenize(source, tokenizer, out=folder / "pairs", kind="preferences", revision=TURN)
    order = PreferenceOrder(mixture_of(folder / "pairs", steps=1, batch_size=2, sequence_length=256))
    model = model_of()
    model.save(folder / "start", tokenizer=tokenizer)
    reference = reference_log_probabilities(model_of(), order, cache=folder / "cache")
    settings = TrainSettings(dtype="float32", threads=1)
    train(
        model,
        preference_objective("srpo", reference),
        order,
        settings,
        out=folder / "model",
        tokenizer=folder / "start",
        init_from=folder / "start",
        progress=False,
        device="cpu",
    )
    return folder / "model"


def test_a_revision_reads_the_conversation_and_the_answer_before_it() -> None:
    engine = Echo()
    asked = [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]
    answers = revise(engine, asked, revision=TURN, times=2, sampling=Sampling(seed=7))
    assert engine.asked == [
        [["one"], ["two"]],
        [["one", "1.0", TURN], ["two", "1.1", TURN]],
        [["one", "2.0", TURN], ["two", "2.1", TURN]],
    ]
    assert [[one.text for one in found] for found in answers] == [
        ["1.0", "2.0", "3.0"],
        ["1.1", "2.1", "3.1"],
    ]
    assert engine.seeds == [7, 9, 11]


def test_the_turn_is_saved_with_the_model(trained: Path) -> None:
    assert saved_revision(trained) == TURN
    assert revision_for(trained, "Again.") == "Again."
    assert saved_revision(trained.parent / "start") is None
    with pytest.raises(UserError, match="not trained to revise"):
        revision_for(trained.parent / "start", None)
    with pytest.raises(UserError, match="empty"):
        revise(Echo(), [], revision=" ")


def test_sources_that_ask_in_two_ways_are_refused(trained: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    folder = trained.parent
    source, tokenizer = folder / "pairs.jsonl", folder / "tokenizer"
    tokenize(source, tokenizer, out=tmp_path / "other", kind="preferences", revision="Again.")
    mixture = mixture_of(folder / "pairs", sequence_length=256)
    [one] = mixture.phases[0].sources
    sources = (
        replace(one, proportion=0.5),
        replace(one, name="other", path=tmp_path / "other", proportion=0.5),
    )
    mixed = replace(mixture, phases=(replace(mixture.phases[0], sources=sources),))
    with pytest.raises(UserError, match="2 different ways"):
        PreferenceOrder(mixed)


def test_command_writes_all_answers(trained: Path, tmp_path: Path) -> None:
    prompts = write_records(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "the river", "more": 1}])
    arguments = ["align", "revise", "--model", str(trained), "--prompts", str(prompts), "--times", "2"]
    result = CliRunner().invoke(
        cli, [*arguments, "--max-new-tokens", "6", "--out", str(tmp_path / "out.jsonl")]
    )
    assert result.exit_code == 0, result.output
    [row] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    engine = LocalEngine(trained)
    sampling = Sampling(temperature=0.0, max_new_tokens=6)
    first = engine.generate([[{"role": "user", "content": "the river"}]], sampling)[0].text
    assert row["completions"][0] == first
    assert len(row["completions"]) == 3
    assert (row["id"], row["more"], row["revision"]) == ("a", 1, TURN)


@pytest.mark.parametrize("interactive", [False, True])
def test_chat_revises_each_reply(trained: Path, interactive: bool) -> None:
    """The last reply stays in the history; without a terminal only it is written."""
    engine, sampling = LocalEngine(trained), Sampling(temperature=0.0, max_new_tokens=6, seed=0)
    asked = [{"role": "user", "content": "the sea"}]
    [answers] = revise(engine, [asked], revision=TURN, times=2, sampling=sampling)
    texts = [one.text for one in answers]
    out, notices = io.StringIO(), io.StringIO()
    chat = Chat(
        engine,
        system=None,
        sampling=sampling,
        out=out,
        notices=notices,
        interactive=interactive,
        revisions=2,
        revision=TURN,
    )
    chat.handle("the sea")
    assert chat.conversation.turns == [*asked, {"role": "assistant", "content": texts[-1]}]
    shown = texts if interactive else texts[-1:]
    assert out.getvalue() == "".join(text + "\n" for text in shown)
    assert ("revision 2 of 2" in notices.getvalue()) == interactive
