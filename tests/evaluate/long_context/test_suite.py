"""Long contexts: prompts of exact length with exact spans, models that retrieve and models that do not, positions, the suite."""

from __future__ import annotations

import json
import math
import random
import re
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from koine.cli.main import cli
from koine.errors import KoineWarning, UserError
from koine.evaluate.log_likelihood import ScoringModel
from koine.evaluate.long_context import LongContextOptions, evaluate_long_context, needles, ruler
from koine.evaluate.long_context.haystack import (
    LONGEST_PIECE,
    make_haystack,
    sample_haystack,
    sample_texts,
    split_pieces,
)
from koine.evaluate.long_context.phrases import lead_and_answer, phrase_languages, phrases_of
from koine.evaluate.long_context.positions import bin_edges, long_documents, loss_by_position, token_losses
from koine.evaluate.long_context.prompts import Material, Prompt, chat_frame, make_material
from koine.evaluate.long_context.report import facts, sections, task_rows
from koine.evaluate.long_context.scores import (
    SPARE_TOKENS,
    greedy_continuation,
    score_prompt,
    string_match,
)
from koine.evaluate.long_context.tasks import DEPTH_TASKS, TASKS, Cell, make_prompt, plan_cells
from koine.model import Decoder, ModelConfig, hybrid_layers, save_model
from koine.tokenizer import Tokenizer, train_tokenizer
from tests.evaluate.conftest import Uniform, Wrapped

LANGUAGES = ("en", "de", "ja", "hi", "th")
LENGTH = 512


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A tokenizer of five languages of the sample world."""
    texts = {code: [*sample_texts(code)][:40] for code in LANGUAGES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_tokenizer({code: lambda code=code: texts[code] for code in texts}, vocab_size=900)


@pytest.fixture(scope="module")
def materials(words: Tokenizer) -> dict[str, Material]:
    return {
        code: make_material(words, sample_haystack(words.encode, at_least=3 * LENGTH, language=code))
        for code in LANGUAGES
    }


@pytest.fixture(scope="module")
def model_folder(words: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("long") / "model"
    config = ModelConfig(
        vocab_size=words.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        layers=hybrid_layers(4, window=32),
        max_position_embeddings=1024,
        bos_token_id=words.bos_id,
        eos_token_id=words.eos_id,
        pad_token_id=words.pad_id,
    )
    save_model(Decoder(config), folder)
    words.save(folder)
    return folder


class Induction(nn.Module):
    """Retrieves: says what followed the longest earlier text that ends as the text does now."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.zeros(*tokens.shape, 1)
        for row, ids in enumerate(tokens.tolist()):
            common: list[int] = []  # at each earlier place: how many tokens before it equal the last ones
            for end in range(1, len(ids) + 1):
                common = [0] + [
                    common[at - 1] + 1 if ids[at - 1] == ids[end - 1] else 0 for at in range(1, end)
                ]
                hidden[row, end - 1, 0] = ids[max(range(end), key=lambda at: (common[at], at))]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return 20.0 * nn.functional.one_hot(hidden[..., 0].long(), self.vocab_size).float()


def prompt_of(task: str, material: Material, *, depth: float | None = None, number: int = 0) -> Prompt:
    questions = ruler.sample_questions(material.language) if task == "question-answering" else None
    where = (0.5 if depth is None else depth) if task in DEPTH_TASKS else None
    return make_prompt(Cell(task, LENGTH, where, number), seed=0, material=material, questions=questions)


def text_of(words: Tokenizer, ids: tuple[int, ...]) -> str:
    return words.decode(ids)


# --- haystacks and phrases ---


@pytest.mark.parametrize(
    "text",
    [
        'One. Two 3.14 is a number! "Three?" Four',
        "一つ。二つ！「三つ。」四つ\n五つ",
        "एक वाक्य। दूसरा वाक्य॥ तीसरा",
        "ไทยไม่มีจุด" * 60,
        "word " * 200,
        "\nbegins with a line\n\n\nand goes on…  then. stops",
    ],
)
def test_pieces_joined_are_the_text(text: str) -> None:
    pieces = split_pieces(text)
    assert "".join(pieces) == text.rstrip()
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= LONGEST_PIECE + 2


def test_pieces_end_with_sentences() -> None:
    assert split_pieces("One. Two 3.14 is! “Three?” Four") == ["One.", " Two 3.14 is!", " “Three?”", " Four"]
    assert split_pieces("一つ。二つ！「三つ。」四つ") == ["一つ。", "二つ！", "「三つ。」", "四つ"]


def test_a_short_haystack_begins_anew(words: Tokenizer) -> None:
    hay = make_haystack([("One two three. Four five six.", "en")], words.encode, at_least=10, source="here")
    cut = hay.cut(5 * hay.tokens, random.Random(0), ends_on_character=lambda ids: True)
    assert sum(map(len, cut)) == 5 * hay.tokens
    assert words.decode([token for piece in cut for token in piece]).count("Four five six.") >= 4


def test_every_language_has_every_phrase() -> None:
    slots = {name: set(re.findall(r"{\w+}", value)) for name, value in vars(phrases_of("en")).items()}
    for code in phrase_languages():
        for name, value in vars(phrases_of(code)).items():
            assert value, (code, name)
            assert set(re.findall(r"{\w+}", value)) == slots[name], (code, name)
        own = phrases_of(code)
        for said, asked, slot in (
            (own.fact, own.ask, "{value}"),
            (own.facts, own.ask_facts, "{values}"),
            (own.variables, own.ask_variables, "{names}"),
            (own.words, own.ask_words, "{names}"),
        ):
            # The question must not hold the beginning of the answer: it would be what a model copies from.
            assert lead_and_answer(said, slot, "")[0] not in asked, code
    assert phrases_of("pt-BR").code == "pt"
    assert phrases_of("th").code == "und"
    assert lead_and_answer("It is {value}.", "{value}", "7") == ("It is", " 7")
    assert lead_and_answer("それは{value}です。", "{value}", "7") == ("それは", "7")


# --- prompts ---


@pytest.mark.parametrize("code", LANGUAGES)
@pytest.mark.parametrize("task", TASKS)
def test_prompts_keep_to_their_length(materials: dict[str, Material], code: str, task: str) -> None:
    prompt = prompt_of(task, materials[code])
    total = len(prompt.tokens) + len(prompt.answer)
    # Lists of words end with a whole word; elsewhere only a character that would be cut costs a token or three.
    least = 0.75 * LENGTH if task.endswith("-words") else LENGTH - 3
    assert least <= total <= LENGTH
    assert prompt == prompt_of(task, materials[code])
    assert prompt != prompt_of(task, materials[code], number=1)


@pytest.mark.parametrize("code", LANGUAGES)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("task", DEPTH_TASKS)
def test_needles_are_where_they_should_be(
    words: Tokenizer, materials: dict[str, Material], code: str, depth: float, task: str
) -> None:
    material = materials[code]
    prompt = prompt_of(task, material, depth=depth)
    spans = [*prompt.needles, *prompt.distractors]
    begin, _, end = material.phrases.fact.partition("{value}")
    for span, value in zip(
        sorted(prompt.needles), sorted(prompt.expected, key=words.decode(prompt.tokens).index), strict=True
    ):
        needle = text_of(words, prompt.tokens[slice(*span)]).strip()
        assert needle.endswith(value + end)
        assert re.fullmatch(
            ".+".join(map(re.escape, begin.split("{key}"))) + value + re.escape(end), needle
        ), needle
    hay = sum(
        1 for at in range(1, prompt.question[0]) if not any(start <= at < stop for start, stop in spans)
    )
    before = sum(
        1
        for at in range(1, min(start for start, _ in prompt.needles))
        if not any(start <= at < stop for start, stop in spans)
    )
    pieces = material.haystack.pieces
    longest = max(map(len, pieces)) if task != "multi-key-full" else 60
    assert abs(before - depth * hay) <= longest / 2 + 1
    assert prompt.depth == pytest.approx(before / hay)


def test_the_rest_of_the_prompt_is_the_haystack(words: Tokenizer, materials: dict[str, Material]) -> None:
    material = materials["de"]
    prompt = prompt_of("multi-key", material)
    assert len(prompt.needles) == 1
    assert len(prompt.distractors) == 3
    inserted = {at for span in (*prompt.needles, *prompt.distractors) for at in range(*span)}
    rest = [prompt.tokens[at] for at in range(1, prompt.question[0]) if at not in inserted]
    whole = [token for piece in material.haystack.pieces for token in piece]
    assert words.decode(rest) in words.decode(whole + whole)
    assert prompt.tokens[0] == words.bos_id
    question = text_of(words, prompt.tokens[slice(*prompt.question)])
    key = re.search("„(.+?)“", question).group(1)  # type: ignore[union-attr]
    assert question == (f"\nWie lautet die geheime Nummer von „{key}“?\nDie geheime Nummer von „{key}“ ist")
    assert words.decode(prompt.answer) == f" {prompt.expected[0]}"
    needle = text_of(words, prompt.tokens[slice(*prompt.needles[0])])
    assert needle == f" Die geheime Nummer von „{key}“ ist {prompt.expected[0]}."


def test_many_needles(words: Tokenizer, materials: dict[str, Material]) -> None:
    value, query = (prompt_of(task, materials["en"]) for task in ("multi-value", "multi-query"))
    for prompt in (value, query):
        assert len(prompt.needles) == len(set(prompt.expected)) == 4
        assert words.decode(prompt.answer).strip() == ", ".join(prompt.expected)
    texts = [[text_of(words, p.tokens[slice(*span)]) for span in p.needles] for p in (value, query)]
    keys = [{re.search('"(.+)"', text).group(1) for text in group} for group in texts]  # type: ignore[union-attr]
    assert [len(group) for group in keys] == [1, 4]
    assert [text.strip(" .").rpartition(" ")[2] for text in texts[0]] == list(value.expected)


def test_variables_hold_what_is_asked(words: Tokenizer, materials: dict[str, Material]) -> None:
    """The assignments in the text, carried out in its order, give the answer."""
    for number in range(5):
        prompt = prompt_of("variable-tracking", materials["en"], number=number)
        text = text_of(words, prompt.tokens)
        held: dict[str, str] = {}
        for name, other, literal in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", text):
            held[name] = literal or held[other]
        asked = re.search(r"have the value (\d+)", text).group(1)  # type: ignore[union-attr]
        assert [name for name, value in held.items() if value == asked] == list(prompt.expected)
        assert len(set(held.values())) == 2
        assert len(held) == 8
        assert len(prompt.needles) == 4


@pytest.mark.parametrize("code", LANGUAGES)
def test_common_words_are_the_most_common(
    words: Tokenizer, materials: dict[str, Material], code: str
) -> None:
    prompt = prompt_of("common-words", materials[code])
    listed = text_of(words, prompt.tokens[1 : prompt.question[0]])
    items = re.findall(r" (\d+)\. (.+?)(?= \d+\. |$)", listed)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    counts = Counter(word for _, word in items).most_common()
    asked = len(prompt.expected)
    assert {word for word, _ in counts[:asked]} == set(prompt.expected)
    assert len({count for _, count in counts[:asked]}) == 1
    assert {count for _, count in counts[asked:]} < {1, 2, 3}
    assert len(counts) > 2 * asked


def test_frequent_words_are_the_most_frequent(words: Tokenizer, materials: dict[str, Material]) -> None:
    prompt = prompt_of("frequent-words", materials["en"])
    counts = Counter(text_of(words, prompt.tokens[1 : prompt.question[0]]).split()).most_common()
    assert [word for word, _ in counts[:4]] == ["...", *prompt.expected]
    assert counts[0][1] == pytest.approx(4 * counts[1][1], abs=4)  # k ** -2
    assert counts[3][1] > counts[4][1]


def test_zeta_counts() -> None:
    # zeta(2) = pi^2 / 6
    assert ruler.zeta_counts(10_000, 3) == [int(60_000 / math.pi**2 / k**2) for k in (1, 2, 3)]


def test_questions_are_answered_by_their_document(words: Tokenizer, materials: dict[str, Material]) -> None:
    prompt = prompt_of("question-answering", materials["de"])
    (span,) = prompt.needles
    document = text_of(words, prompt.tokens[slice(*span)]).strip()
    assert prompt.expected[0] in document
    assert text_of(words, prompt.tokens).count(document) == 1
    assert prompt.any_of
    # Facts about these territories are in no training document of the sample world.
    asked = {one.document for one in ruler.sample_questions("de").questions}
    assert document in asked
    assert not asked & {line for text in sample_texts("de") for line in split_pieces(text)}


def test_questions_from_a_file(words: Tokenizer, materials: dict[str, Material], tmp_path: Path) -> None:
    rows = [
        {
            "context": f"The colour of box {number} is colour{number}.",
            "question": f"Which colour has box {number}?",
        }
        for number in range(30)
    ]
    rows = [{**row, "answers": [f"colour{number}", "none"]} for number, row in enumerate(rows)]
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = ruler.read_questions(path)
    prompt = ruler.question_answering(materials["en"], 200, random.Random(0), questions=questions, depth=0.0)
    text = text_of(words, prompt.tokens)
    number = re.search(r"Which colour has box (\d+)", text).group(1)  # type: ignore[union-attr]
    assert prompt.expected == (f"colour{number}", "none")
    assert text.startswith(f"\nThe colour of box {number} is")
    path.write_text(json.dumps({"context": "a", "question": "b"}) + "\n")
    with pytest.raises(UserError, match="no question or no answers"):
        ruler.read_questions(path)


def test_prompts_in_the_chat_template(words: Tokenizer, materials: dict[str, Material]) -> None:
    head, tail = chat_frame(words)
    text = words.encode("Wie geht es?")
    asked, _ = words.encode_messages([{"role": "user", "content": "Wie geht es?"}], generation_prompt=True)
    assert [*head, *text, *tail] == asked
    material = make_material(words, materials["de"].haystack, chat=True)
    prompt = needles.single(material, LENGTH, random.Random(0))
    assert len(prompt.tokens) + len(prompt.answer) == LENGTH
    assert prompt.tokens[: len(head)] == head
    written = words.decode(prompt.tokens, skip_special=False)
    assert re.search(r"\?<\|END_OF_TURN_TOKEN\|>.*<\|CHATBOT_TOKEN\|>Die geheime Nummer .* ist$", written)


# --- scores ---


@pytest.mark.parametrize(("task", "code"), [("single", "de"), ("multi-key", "ja"), ("multi-key-full", "en")])
def test_a_model_that_retrieves_and_one_that_does_not(
    words: Tokenizer, materials: dict[str, Material], task: str, code: str
) -> None:
    prompt = make_prompt(Cell(task, 256, 0.3, 0), seed=0, material=materials[code])
    knows: ScoringModel = Induction(words.vocab_size)
    score = score_prompt(knows, words, prompt)
    assert (score.score, score.exact) == (1.0, 1.0)
    assert score.logprob == pytest.approx(0.0, abs=1e-4)
    score = score_prompt(Uniform(words.vocab_size), words, prompt)
    assert (score.score, score.exact) == (0.0, 0.0)
    assert score.logprob == pytest.approx(-math.log(words.vocab_size), abs=1e-5)
    # Without the needle there is nothing to retrieve.
    (start, end), length = prompt.needles[0], len(prompt.tokens)
    blank = tuple(prompt.tokens[at] for at in range(length) if not start <= at < end)
    without = replace(prompt, tokens=blank, needles=())
    assert score_prompt(knows, words, without).score == 0.0


def test_strings_are_matched_as_ruler_does() -> None:
    assert string_match("They are 12, 34.", ["12", "34", "56", "78"]) == 0.5
    assert string_match("STRASSE", ["Straße"]) == 1.0
    assert string_match("b or c", ["a", "c"], any_of=True) == 1.0
    assert string_match("b", ["a", "c"], any_of=True) == 0.0


def test_greedy_answers_are_the_same_with_and_without_a_cache(words: Tokenizer) -> None:
    """Our decoder and a model of transformers through their caches, against the whole text at each step."""
    transformers = pytest.importorskip("transformers")
    from koine.model import CausalLM

    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=words.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        layers=hybrid_layers(4, window=8),
        initializer_range=0.2,
    )
    decoder = Decoder(config)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=words.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    ).eval()

    class Plain(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner_model = inner

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner_model(tokens)

        def logits(self, hidden: Tensor) -> Tensor:
            return self.inner_model.logits(hidden)

    prompt = torch.randint(10, words.vocab_size, (40,)).tolist()
    for model in (decoder, CausalLM(llama)):
        plain = greedy_continuation(Plain(model), prompt, 9, stops={words.eos_id})
        assert len(set(plain)) > 1
        assert greedy_continuation(model, prompt, 9, stops={words.eos_id}) == plain
        stop = plain[4]
        short = greedy_continuation(model, prompt, 9, stops={stop, words.eos_id})
        assert short == plain[: plain.index(stop)]


# --- loss per position ---


def test_bins_cover_every_prediction() -> None:
    for length in (5, 8, 9, 100, 511, 2047):
        edges = bin_edges(length)
        assert edges[0] == 0
        assert edges[-1] == length
        assert edges == sorted(set(edges))
    assert bin_edges(100) == [0, 8, 12, 16, 24, 32, 48, 64, 96, 100]


def test_losses_are_those_of_transformers(llama: Wrapped) -> None:
    torch.manual_seed(0)
    documents = torch.randint(10, 300, (3, 65)).tolist()
    with torch.no_grad():
        expected = [
            float(llama.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in documents
        ]
    assert [sum(token_losses(llama, ids)) / 64 for ids in documents] == pytest.approx(expected, abs=1e-5)
    found = loss_by_position(llama, documents, token_bytes=lambda token: 2, lengths=[33, 65])
    assert found["lengths"]["65"]["nats_per_token"] == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert found["lengths"]["65"]["bits_per_byte"] == pytest.approx(
        sum(expected) / 3 / math.log(2) / 2, abs=1e-5
    )
    weighted = sum(one["nats_per_token"] * (one["end"] - one["start"]) for one in found["bins"]) / 64
    assert weighted == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert (
        found["bins"][0]["interval"][0] < found["bins"][0]["nats_per_token"] < found["bins"][0]["interval"][1]
    )


def test_a_uniform_model_loses_the_same_everywhere() -> None:
    found = loss_by_position(Uniform(50), [list(range(40))], token_bytes=lambda token: 1, lengths=[40])
    assert {round(one["nats_per_token"], 6) for one in found["bins"]} == {round(math.log(50), 6)}
    assert {one["interval"] for one in found["bins"]} == {None}
    with pytest.raises(UserError, match="a document has 40 tokens"):
        loss_by_position(Uniform(50), [list(range(40))], token_bytes=lambda token: 1, lengths=[64])


def test_long_documents() -> None:
    def encode(text: str) -> list[int]:
        return [ord(character) for character in text]

    whole, joined = long_documents(["a" * 25, "b" * 5, "c" * 9], encode, bos=1, length=10, count=3)
    assert not joined
    assert [bytes(one).decode() for one in whole] == ["\1" + "a" * 9, "\1" + "a" * 9, "\1" + "c" * 9]
    short, joined = long_documents(["abc"] * 6, encode, bos=1, length=10, count=2)
    assert joined
    assert bytes(short[0]).decode() == "\1abc\n\nabc\n"


# --- the suite ---


def test_the_suite_is_deterministic_and_its_prompts_are_independent(model_folder: Path) -> None:
    settings: dict[str, Any] = {"lengths": [256, 400], "depths": [0, 100], "samples": 2, "language": "de"}
    options = LongContextOptions(**settings, documents=3)
    result = evaluate_long_context(model_folder, options)
    again = evaluate_long_context(
        model_folder, replace(options, tasks=["multi-key", "positions", "attention"])
    )
    json.dumps(result)
    assert again["tasks"]["multi-key"] == result["tasks"]["multi-key"]
    assert again["positions"] == result["positions"]
    assert again["attention"] == result["attention"]
    assert {one["task"] for one in result["left_out"]} <= set(TASKS)
    left_out = {(one["task"], one["length"]) for one in result["left_out"]}
    entries = {
        (task, int(length)): entry
        for task, lengths in result["tasks"].items()
        for length, entry in lengths.items()
    }
    assert set(entries) == {(task, length) for task in TASKS for length in (256, 400)}
    assert {cell for cell, entry in entries.items() if entry["value"] is None} == left_out
    for cell, entry in entries.items():
        if cell in left_out:
            assert (entry["samples"], entry["logprob"]) == (0, None)
            assert "no room" in entry["why"]
        else:
            assert entry["samples"] == 4
            assert entry["logprob"] < -1.0
    grid = result["grid"]["single"]
    assert (len(grid["score"]), len(grid["score"][0])) == (2, 2)
    mean = sum(row[0] for row in grid["logprob"]) / 2
    assert mean == pytest.approx(result["tasks"]["single"]["256"]["logprob"])
    assert [one["kind"] for one in result["attention"]["400"]["layers"]] == ["sliding RoPE"] * 3 + [
        "full NoPE"
    ]
    other = evaluate_long_context(model_folder, replace(options, tasks=["single"], seed=1))
    assert other["tasks"]["single"] != result["tasks"]["single"]


def test_cells_without_room_are_left_out_unless_they_were_named(materials: dict[str, Material]) -> None:
    arguments: dict[str, Any] = {"seed": 0, "material": materials["en"], "questions": None}
    cells, left_out = plan_cells(["single", "frequent-words"], [120], [50], 2, strict=False, **arguments)
    assert {cell.task for cell in cells} == {"single"}
    assert [one["task"] for one in left_out] == ["frequent-words"]
    with pytest.raises(UserError, match="has no room for the task 'frequent-words'"):
        plan_cells(["frequent-words"], [120, 60], [50], 2, strict=True, **arguments)
    cells, left_out = plan_cells(["frequent-words"], [120, 900], [50], 2, strict=True, **arguments)
    assert {cell.length for cell in cells} == {900}
    assert [(one["task"], one["length"]) for one in left_out] == [("frequent-words", 120)]


def test_a_named_task_is_left_out_where_a_length_has_no_room(model_folder: Path, tmp_path: Path) -> None:
    """It is said before anything is run and stands in the result; the other lengths are measured."""
    tasks = ["single", "multi-needle", "attention"]
    options = LongContextOptions(lengths=[40, 256, 600], depths=[50], samples=1, language="de", tasks=tasks)
    with pytest.warns(KoineWarning, match="left out at") as warned:
        result = evaluate_long_context(model_folder, options)
    found = result["tasks"]["multi-needle"]
    assert list(found) == ["40", "256", "600"]
    for length in ("40", "256"):
        assert found[length]["value"] is None
        assert f"a prompt of {length} tokens has no room for the task 'multi-needle'" in found[length]["why"]
    assert found["600"]["samples"] == 1
    assert set(result["attention"]) == {"256", "600"}
    assert len(warned) == len(result["left_out"]) == 4
    assert {row[1] for row in task_rows(result) if row[0] == "multi-needle"} == {"600"}
    json.dumps([sections(result), facts(result)])


def test_the_command_writes_json_and_a_page(model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(" ".join(sample_texts("de"))[:60_000], encoding="utf-8")
    out, page = tmp_path / "long.json", tmp_path / "long.html"
    run = CliRunner().invoke(
        cli,
        [
            *("evaluate", str(model_folder), "--suite", "long", "--lengths", "160,320"),
            *("--depths", "0,50,100%"),
            *("--samples", "1", "--language", "de", "--haystack", str(text), "--out", str(out)),
            *("--page", str(page)),
        ],
    )
    assert run.exit_code == 0, run.output
    result = json.loads(out.read_text())
    assert result["settings"]["depths"] == [0.0, 50.0, 100.0]
    assert result["settings"]["haystack"]["source"] == str(text)
    assert not result["positions"]["joined"]
    html = page.read_text(encoding="utf-8")
    for title in ("Needle in a haystack", "Score by length", "Loss by position", "Attention mass by layer"):
        assert title in html
    assert "Long-context tasks" in run.output
    assert "NoPE (1)" in run.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tasks sinlge", "unknown task 'sinlge'; did you mean 'single'?"),
        ("--lengths 40 --tasks single", "has no room for the task 'single'"),
        ("--lengths 2048", "beyond the 1024 positions of the model"),
        ("--lengths 512,x", "'x' is no number"),
        ("--lengths 3", "16 or more"),
        ("--depths 120", "from 0"),
        ("--samples 0", "at least 1"),
        ("--haystack nowhere.txt", "nowhere.txt: no such file or folder"),
        ("--qa nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
        ("--language xx", "unknown language 'xx'"),
        ("--language sw --tasks question-answering", "no questions in the language 'sw'"),
        ("--data here", "--data is not an option of the suite long"),
        ("--max-bad 0.01", "--max-bad is not an option of the suite long"),
        ("--page nowhere/page.html", "no such folder"),
    ],
)
def test_mistakes_are_one_line(model_folder: Path, tmp_path: Path, options: str, said: str) -> None:
    run = CliRunner().invoke(cli, ["evaluate", str(model_folder), "--suite", "long", *options.split()])
    error = run.exception
    assert isinstance(error, UserError), run.output
    assert said in str(error)
    assert "\n" not in str(error)


def test_options_of_the_suite_need_the_suite(model_folder: Path) -> None:
    run = CliRunner().invoke(cli, ["evaluate", str(model_folder), "--lengths", "512"])
    assert isinstance(run.exception, UserError)
    assert "add --suite long" in str(run.exception)


# --- scores by hand ---


class Scripted(nn.Module):
    """Says one token after another whatever it reads: logit 2 for the token of a position, 0 for all others."""

    def __init__(self, script: dict[int, int], vocab_size: int) -> None:
        super().__init__()
        self.script, self.vocab_size = script, vocab_size

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1])[None].expand(tokens.shape[0], -1)

    def logits(self, positions: Tensor) -> Tensor:
        table = torch.zeros(*positions.shape, self.vocab_size)
        for position, token in self.script.items():
            table[positions == position, token] = 2.0
        return table


def bare(tokens: tuple[int, ...], answer: tuple[int, ...], expected: tuple[str, ...]) -> Prompt:
    """A prompt of these tokens alone."""
    return Prompt("single", len(tokens), tokens, answer, expected, (), (), (0, 1), None)


def test_a_prompt_is_scored_by_hand(words: Tokenizer) -> None:
    """The right answer's tokens are judged where they are predicted; the mean is over them; a wrong one is written out."""
    vocab = words.vocab_size
    answer = tuple(words.encode("Berlin"))[:3]
    assert len(answer) >= 2
    expected = words.decode(list(answer))
    prompt = bare((40, 41, 42, 43), answer, (expected,))
    other = next(token for token in range(60, vocab) if token not in answer)
    hit = 2.0 - math.log(math.exp(2.0) + vocab - 1)
    miss = -math.log(math.exp(2.0) + vocab - 1)
    right = {3 + at: token for at, token in enumerate(answer)}
    score = score_prompt(Scripted(right, vocab), words, prompt)
    assert (score.score, score.exact, score.written) == (1.0, 1.0, expected)
    assert score.logprob == pytest.approx(hit, rel=1e-5)
    # The first token is wrong: the answer is not exact, and the others still count as given the right ones before them.
    late = {**right, 3: other}
    score = score_prompt(Scripted(late, vocab), words, prompt)
    assert score.exact == 0.0
    assert score.logprob == pytest.approx((miss + hit * (len(answer) - 1)) / len(answer), rel=1e-5)
    assert score.written.startswith(words.decode([other]))
    # One position late: what stands there is the answer, and no score sees it as exact.
    shifted = {4 + at: token for at, token in enumerate(answer)} | {3: other}
    score = score_prompt(Scripted(shifted, vocab), words, prompt)
    assert (score.score, score.exact) == (1.0, 0.0)
    # A wrong answer may be so much longer, and is then cut.
    for late_by, found in ((SPARE_TOKENS, 1.0), (SPARE_TOKENS + 1, 0.0)):
        script = dict.fromkeys(range(3, 3 + late_by), other)
        script |= {3 + late_by + at: token for at, token in enumerate(answer)}
        assert score_prompt(Scripted(script, vocab), words, prompt).score == found, late_by
    # It ends at a stop token, and what follows is not read.
    script = {3: other, 4: words.eos_id, **{5 + at: token for at, token in enumerate(answer)}}
    score = score_prompt(Scripted(script, vocab), words, prompt)
    assert (score.score, score.written) == (0.0, words.decode([other]))


def test_all_needles_or_any(words: Tokenizer) -> None:
    """Of four values the share that is found; of alternatives one is enough."""
    vocab = words.vocab_size
    text = "12 34"
    answer = tuple(words.encode(text))
    prompt = bare((40, 41), answer, ("12", "34", "56", "78"))
    right = Scripted({1 + at: token for at, token in enumerate(answer)}, vocab)
    assert score_prompt(right, words, prompt).score == 0.5
    assert score_prompt(right, words, replace(prompt, any_of=True)).score == 1.0
    assert score_prompt(right, words, replace(prompt, expected=("56",), any_of=True)).score == 0.0
