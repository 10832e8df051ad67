"""The sample world: facts checked by hand, parallel, deterministic, without leaks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from koine.data import read_records
from koine.data.sample import QUESTION_LANGUAGES, sample_languages, write_sample
from koine.data.sample.facts import CAPITALS, SPLITS, UNITS, facts, facts_in, is_asked, split_of, territories
from koine.data.sample.phrases import phrases
from koine.data.sample.rendering import quantities, question, sentence, sides
from koine.errors import UserError
from koine.languages import CLUSTERS, language


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "world"
    write_sample(
        ("en", "pl", "ar", "sw"),
        out,
        documents_per_language=120,
        questions_per_language=90,
        code_bytes=20_000,
    )
    return out


def test_coverage() -> None:
    assert len(sample_languages()) >= 120
    assert len(QUESTION_LANGUAGES) >= 24
    assert set(QUESTION_LANGUAGES) <= set(sample_languages())
    by_cluster = [language(code).cluster for code in QUESTION_LANGUAGES]
    assert [by_cluster.count(name) for name in CLUSTERS] == [8, 8, 8]


def test_every_phrase_has_its_placeholders_and_wordings_differ() -> None:
    subjects = ("{x}", "{the_x}", "{of_x}", "{in_x}", "{has_x}")
    counts = {code: {name: len(found) for name, found in own.items()} for code, own in phrases().items()}
    # A question's wording has the same number in every language.
    assert all(found == counts["en"] for found in counts.values())
    assert min(number for name, number in counts["en"].items() if not name.startswith("says_")) >= 3
    for code, own in phrases().items():
        for name, templates in own.items():
            assert len(set(templates)) == len(templates), (code, name)
            for template in templates:
                assert sum(template.count(one) for one in subjects) == 1, (code, template)
                assert ("{y}" in template) == (name.startswith("says_") and name != "says_list"), template
                if code not in ("en", "de", "fr"):
                    assert "{x}" in template, (code, template)


@pytest.mark.parametrize(
    ("code", "fact", "answer"),
    [
        # Polish counts 2 to 4 (and 22, 23, 24) otherwise than 5 and more.
        ("pl", "quantity:duration-month:1+1", ("1 miesiąc + 1 miesiąc", "2 miesiące")),
        ("pl", "quantity:duration-month:2+3", ("2 miesiące + 3 miesiące", "5 miesięcy")),
        ("ru", "quantity:duration-day:1+4", ("1 день + 4 дня", "5 дней")),
        # Arabic has a dual.
        ("ar", "quantity:duration-day:1+1", ("يوم + يوم", "يومان")),
        ("de", "currency:JP", ("Japan", "Japanischer Yen")),
        ("fr", "language:BR", ("Brésil", "portugais")),
        ("en", "month:12", ("December", "January")),
        ("es", "day:6", ("domingo", "lunes")),
        ("en", "capital:FR", ("France", "Paris")),
        ("ru", "capital:JP", ("Япония", "Токио")),
        ("es", "capital:EG", ("Egipto", "El Cairo")),
        ("en", "capital:ET", ("Ethiopia", "Addis Ababa")),
        ("ja", "script:hi", ("ヒンディー語", "デーバナーガリー文字")),
        ("en", "date:2025-12-31+1", ("December 31, 2025 + 1 day", "January 1, 2026")),
        ("fi", "sum:7+12", ("7 + 12", "19")),
    ],
)
def test_facts_by_hand(code: str, fact: str, answer: tuple[str, str]) -> None:
    assert sides(code, fact) == answer


@pytest.mark.parametrize("order", [("zh", "he", "ja"), ("he", "ja", "zh")])
def test_months_do_not_depend_on_earlier_languages(order: tuple[str, ...]) -> None:
    """Babel itself confuses them (see `calendar_names`); a new process for each order."""
    program = (
        "from koine.data.sample.rendering import sides\n"
        f"print([sides(code, 'month:12') for code in sorted({order!r}, key={order!r}.index)])\n"
        "print(sides('he', 'month:12'), sides('ja', 'month:12'), sides('zh', 'month:12'), sides('ru', 'month:1'))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[1] == (
        "('דצמבר', 'ינואר') ('12月', '1月') ('十二月', '一月') ('январь', 'февраль')"
    )


def test_no_cldr_identifier_is_in_the_text() -> None:
    """Babel writes `5 duration-day` if it finds no pattern; none of our languages may need that."""
    for code in sample_languages():
        for unit in UNITS:
            assert not any(unit in shown for shown in quantities(code, unit, range(1, 32))), (code, unit)


def test_questions_and_sentences_by_hand() -> None:
    assert question("de", "sum:3+4", 0) == ("Wie viel ist 3 + 4?", "7")
    assert question("en", "capital:FR", 0) == ("What is the capital of France?", "Paris")
    assert question("de", "currency:JP", 3) == ("Welche Währung hat Japan?", "Japanischer Yen")
    assert question("de", "currency:NL", 3) == ("Welche Währung haben die Niederlande?", "Euro")
    assert sentence("en", "currency:JP") == "The currency of Japan is: Japanese Yen."
    assert sentence("en", "currency:JP", 1) == "Japan: the currency is Japanese Yen."
    assert sentence("sw", "currency:JP") == "Japani: Yen ya Japani"


def test_each_fact_has_one_split() -> None:
    everything = [name for names in facts().values() for name in names]
    listed = [name for split in SPLITS for names in facts_in(split).values() for name in names]
    assert sorted(everything) == sorted(listed)
    # A held-out territory is held out with all that is known of it.
    for name in facts()["currency"]:
        held = split_of(name) == "heldout_territory"
        assert held == (split_of(name.replace("currency", "language")) == "heldout_territory")


@pytest.mark.parametrize("code", ["en", "pl", "ar", "sw"])
def test_nothing_held_out_leaks_into_training(world: Path, code: str) -> None:
    for record in read(world / "documents" / f"{code}.jsonl"):
        assert {split_of(fact) for fact in record["facts"]} <= {"train", "recall"}
    for record in read(world / "documents-heldout" / f"{code}.jsonl"):
        assert {split_of(fact) for fact in record["facts"]} <= {"heldout_fact", "heldout_territory"}
    if code == "sw":
        assert not (world / "questions" / "train" / "sw.jsonl").exists()
        return
    trained = read(world / "questions" / "train" / f"{code}.jsonl")
    tested = read(world / "questions" / "test" / f"{code}.jsonl")
    assert {split_of(record["fact"]) for record in trained} == {"train"}
    assert {split_of(record["fact"]) for record in tested} == {"recall", "heldout_fact", "heldout_territory"}
    assert all(record["split"] == split_of(record["fact"]) for record in trained + tested)
    asked = {record["messages"][0]["content"] for record in trained}
    assert not asked & {record["messages"][0]["content"] for record in tested}
    # The text itself, not only what is said of it: no held-out sum stands in a training document.
    text = (world / "documents" / f"{code}.jsonl").read_text(encoding="utf-8")
    for fact in facts_in("heldout_fact")["quantity"][:100]:
        shown = sides(code, fact)
        assert shown is not None
        assert f" {shown[0]} = {shown[1]}" not in text


def test_recall_is_asked_in_words_that_no_training_text_has(world: Path) -> None:
    """Dialogues tell the facts of `recall`, as documents do; the chat stage never asks for them."""
    for code in ("en", "pl", "ar"):
        talks = read(world / "dialogues" / f"{code}.jsonl")
        assert {split_of(fact) for record in talks for fact in record["facts"]} == {"train", "recall"}
        said = {
            message["content"]
            for record in [*talks, *read(world / "questions" / "train" / f"{code}.jsonl")]
            for message in record["messages"]
            if message["role"] == "user"
        }
        tested = read(world / "questions" / "test" / f"{code}.jsonl")
        assert tested
        assert not said & {record["messages"][0]["content"] for record in tested}


def test_questions_ask_for_what_is_mentioned_most(world: Path) -> None:
    for part in ("questions/train", "questions/test"):
        facts_asked = {record["fact"] for record in read(world / part / "en.jsonl")}
        assert all(is_asked(fact) for fact in facts_asked)
    assert is_asked("capital:FR")
    assert is_asked("sum:1+1")
    assert is_asked("script:hi")
    assert not is_asked("currency:TV")
    assert not is_asked("script:kk")


def test_parallel_and_deterministic(world: Path, tmp_path: Path) -> None:
    for part in ("documents", "documents-heldout", "questions/test", "dialogues"):
        ours, theirs = (read(world / part / f"{code}.jsonl") for code in ("en", "pl"))
        key = "fact" if part.startswith("questions") else "facts"
        assert [record[key] for record in ours] == [record[key] for record in theirs]
    write_sample(
        ("pl",), tmp_path / "again", documents_per_language=120, questions_per_language=90, code_bytes=20_000
    )
    for part in ("documents/pl.jsonl", "questions/train/pl.jsonl", "dialogues/pl.jsonl", "code.jsonl"):
        assert (tmp_path / "again" / part).read_bytes() == (world / part).read_bytes()


def test_its_files_are_records(world: Path) -> None:
    for part in ("documents", "questions/train", "dialogues", "code.jsonl"):
        reader = read_records(world / part, max_bad_share=0.0)
        assert sum(1 for _ in reader) > 20


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CLDR does not know enough of 'cop'"):
        write_sample(("cop",), tmp_path / "a")
    with pytest.raises(UserError, match="documents_per_language is 0"):
        write_sample(("de",), tmp_path / "b", documents_per_language=0)
    assert not list(tmp_path.iterdir())


def test_names_do_not_depend_on_earlier_languages() -> None:
    """All languages first, then those that Babel's shared dictionaries get wrong after that."""
    script = (
        "from koine.data.sample import sample_languages\n"
        "from koine.data.sample.rendering import sides\n"
        "everything = [sides(code, fact) for code in sample_languages() for fact in ('month:3', 'day:0', 'date:2025-03-10+3')]\n"
        "facts = {'he': 'month:3', 'zh': 'month:12', 'ur': 'day:0', 'ar': 'quantity:duration-week:1+1', 'fil': 'quantity:duration-hour:1+4'}\n"
        "print(*[sides(code, fact)[1] for code, fact in facts.items()], sep='|')\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout.strip()
    assert said == "אפריל|一月|منگل|أسبوعان|5 oras"


def test_a_country_has_its_own_currency() -> None:
    # Indian, South African and United States money is legal tender there too.
    assert [sides("en", f"currency:{code}") for code in ("BT", "LS", "NA", "HT")] == [
        ("Bhutan", "Bhutanese Ngultrum"),
        ("Lesotho", "Lesotho Loti"),
        ("Namibia", "Namibian Dollar"),
        ("Haiti", "Haitian Gourde"),
    ]


def test_held_out_territories_are_not_named_in_the_training_text(world: Path) -> None:
    from babel import Locale

    for code in ("en", "pl"):
        text = "\n".join(
            record.get("text") or " ".join(message["content"] for message in record["messages"])
            for part in ("documents", "questions/train", "dialogues")
            for record in read(world / part / f"{code}.jsonl")
        )
        for fact in facts_in("heldout_territory")["currency"]:
            name = Locale.parse(code).territories[fact.split(":")[1]]
            assert not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text), name


def test_every_capital_is_a_time_zone_of_its_territory() -> None:
    from babel.core import get_global

    known = {territory.code for territory in territories()}
    for code, zone in CAPITALS.items():
        assert code in known, code
        assert get_global("zone_territories")[zone] == code, zone
