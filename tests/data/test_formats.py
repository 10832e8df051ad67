"""Formats of other tools: recognised by their fields, or named; compared with what TRL makes of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from koine.data import RecordFormat, read_records
from koine.data.formats import BY_NAME, FORMATS, recognise
from koine.errors import UserError

from .conftest import write_records

RECORDED = json.loads((Path(__file__).parent / "trl_cases.json").read_text(encoding="utf-8"))
CASES: dict[str, dict[str, Any]] = RECORDED["cases"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def said(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


SKY, BLUE = user("Sky?"), assistant("Blue.")
EXAMPLES: list[tuple[str, dict[str, Any], list[dict[str, str]]]] = [
    ("messages", {"messages": [SKY, BLUE]}, [SKY, BLUE]),
    ("sharegpt", {"conversations": [said("human", "Sky?"), said("gpt", "Blue.")]}, [SKY, BLUE]),
    ("sharegpt", {"conversation": [said("User", "Sky?"), said("chatgpt", "Blue.")]}, [SKY, BLUE]),
    ("sharegpt", {"conversations": [said("user", "Sky?"), said("bing", "Blue.")], "text": "x"}, [SKY, BLUE]),
    (
        "sharegpt",
        {"conversations": [said("human", "Sky?"), said("gpt", "Blue.")], "system": "Be short."},
        [system("Be short."), SKY, BLUE],
    ),
    (
        "sharegpt",
        {
            "conversations": [said("system", "A"), said("human", "Sky?"), said("gpt", "Blue.")],
            "system": "B",
        },
        [system("A"), SKY, BLUE],
    ),
    ("alpaca", {"instruction": "Sky?", "input": "", "output": "Blue."}, [SKY, BLUE]),
    ("alpaca", {"instruction": "Sky?", "output": "Blue.", "text": "### Instruction: Sky?"}, [SKY, BLUE]),
    ("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3"}, [user("Add.\n1, 2"), assistant("3")]),
    (
        "alpaca",
        {"instruction": "Add.", "context": "1, 2", "response": "3"},
        [user("Add.\n1, 2"), assistant("3")],
    ),
    (
        "alpaca",
        {
            "instruction": "Why?",
            "input": None,
            "output": "Air.",
            "system": "Be short.",
            "history": [["Sky?", "Blue."]],
        },
        [system("Be short."), SKY, BLUE, user("Why?"), assistant("Air.")],
    ),
    ("prompt-completion", {"prompt": "Sky?", "completion": "Blue."}, [SKY, BLUE]),
    ("prompt-completion", {"prompt": [SKY], "completion": [BLUE]}, [SKY, BLUE]),
    ("prompt-completion", {"prompt": "Sky?", "response": "Blue.", "system": "S"}, [system("S"), SKY, BLUE]),
    ("question-answer", {"question": "Sky?", "answer": "Blue."}, [SKY, BLUE]),
    ("question-answer", {"query": "Sky?", "response": "Blue."}, [SKY, BLUE]),
    ("unpaired-preference", {"prompt": "Sky?", "completion": "Blue.", "label": True}, [SKY, BLUE]),
    ("unpaired-preference", {"messages": [SKY, BLUE], "label": True}, [SKY, BLUE]),
    ("preference", {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}, [SKY, BLUE]),
]


@pytest.mark.parametrize(("name", "row", "messages"), EXAMPLES)
@pytest.mark.parametrize("named", [False, True])
def test_a_format_is_recognised_or_named(
    name: str, row: dict[str, Any], messages: list[dict[str, str]], named: bool, tmp_path: Path
) -> None:
    path = write_records(tmp_path / "a.jsonl", [{**row, "language": "en"}])
    reader = read_records(path, record_format=RecordFormat(name if named else None), carry=())
    [record] = reader
    assert record["messages"] == messages
    assert "text" not in record
    assert dict(reader.formats) == {name: 1}


def test_a_table_gives_the_same_records_as_json_lines(tmp_path: Path) -> None:
    for number, (name, row, messages) in enumerate(EXAMPLES):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist([{**row, "language": "en", "other": b"\xff"}]), path)
        [record] = read_records(path, carry=())
        assert record["messages"] == messages, name


@pytest.mark.parametrize("name", CASES)
def test_equal_to_trl(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    [record] = read_records(write_records(tmp_path / "a.jsonl", [case["example"]]))
    theirs = {
        field: [{"role": "user" if field == "prompt" else "assistant", "content": value}]
        if isinstance(value, str)
        else value
        for field, value in case["trl"].items()
    }
    assert {field: record[field] for field in theirs} == theirs


@pytest.mark.parametrize("name", CASES)
def test_the_recorded_outputs_are_trls(name: str) -> None:
    trl = pytest.importorskip("trl")
    case = copy.deepcopy(CASES[name])
    assert trl.maybe_extract_prompt(trl.maybe_convert_to_chatml(case["example"])) == case["trl"]


def test_the_rejected_answers_are_read_when_asked_for(tmp_path: Path) -> None:
    paired = write_records(tmp_path / "a.jsonl", [{"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}])
    [record] = read_records(paired, record_format=RecordFormat(take="rejected"))
    assert record["messages"] == [SKY, assistant("Red.")]
    assert (record["chosen"], record["rejected"]) == ([BLUE], [assistant("Red.")])
    unpaired = write_records(
        tmp_path / "b.jsonl",
        [{"prompt": "Sky?", "completion": text, "label": text == "Blue."} for text in ("Blue.", "Red.")],
    )
    for take, answer in (("chosen", "Blue."), ("rejected", "Red.")):
        reader = read_records(unpaired, record_format=RecordFormat(take=take))  # type: ignore[arg-type]
        assert [record["messages"] for record in reader] == [[SKY, assistant(answer)]]
        assert (reader.good, reader.bad, reader.left_out) == (1, 0, 1)


def test_labels_and_scores_of_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,label\nSky?,Blue.,True\nSky?,Red.,False\n")
    assert [record["messages"] for record in read_records(tmp_path / "a.csv")] == [[SKY, BLUE]]
    (tmp_path / "b.csv").write_text("prompt,chosen,rejected,score_chosen\nSky?,Blue.,Red.,8.5\n")
    assert [record["score_chosen"] for record in read_records(tmp_path / "b.csv")] == [8.5]


def test_no_answer_of_the_label(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "label": False}])
    with pytest.raises(
        UserError, match=r"a\.jsonl: none of the 1 answers is labelled as chosen; take the others"
    ):
        list(read_records(path))


def test_fields_of_no_format_are_refused_with_the_fields_and_the_formats(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", [{"title": "a", "body": "b"}] * 3)
    for share in (0.01, 1.0):
        with pytest.raises(UserError) as caught:
            list(read_records(path, max_bad_share=share))
        line = str(caught.value)
        assert line.startswith(f"{path}: records of no known format, with the fields title, body; known: ")
        assert all(f"{one.name} (" in line for one in FORMATS)
        assert "\n" not in line


def test_records_that_do_not_fit_the_format_are_bad(tmp_path: Path) -> None:
    good = {"instruction": "Sky?", "input": "", "output": "Blue."}
    odd: list[dict[str, Any]] = [
        {"instruction": "Sky?", "input": ""},
        {"instruction": "Sky?", "output": 3},
        {"instruction": " ", "output": "Blue."},
        {"instruction": "Sky?", "input": ["1"], "output": "Blue."},
        {"instruction": "Sky?", "output": "Blue.", "history": ["a"]},
        {"instruction": "Sky?", "output": "Blue.", "history": 3},
        {"question": "Sky?", "answer": "Blue."},
    ]
    path = write_records(tmp_path / "a.jsonl", [good, *odd])
    reader = read_records(path, max_bad_share=1.0)
    reader_examples = list(reader)
    assert len(reader_examples) == 1
    assert reader.bad == len(odd)
    lacks = "lacks fields of the format alpaca: instruction, output or response (it has "
    assert [str(bad).removeprefix(f"{path}, ") for bad in reader.examples] == [
        f"line 2: {lacks}instruction, input)",
        "line 3: 'output': the text is int, not a string",
        "line 4: 'instruction': the text is empty",
        "line 5: 'input': the text is list, not a string",
        "line 6: 'history' is not a list of pairs",
    ]
    with pytest.raises(UserError, match=r"7 of 8 records are bad"):
        list(read_records(path))


def test_a_record_of_another_format_than_its_file_is_named_so(tmp_path: Path) -> None:
    chat = {"conversations": [said("human", "Sky?"), said("gpt", "Blue.")]}
    task = {"instruction": "Sky?", "output": "Blue."}
    for first, second, names in ((chat, task, ("sharegpt", "alpaca")), (task, chat, ("alpaca", "sharegpt"))):
        path = write_records(tmp_path / "a.jsonl", [first, second])
        with pytest.raises(UserError) as caught:
            list(read_records(path))
        read, other = names
        wanted = f"line 2: has the fields of the format {other}, and its file is read as {read} (one format a file)"
        assert wanted in str(caught.value)


def test_fields_without_a_value_are_named_as_such(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", [{"instruction": "Sky?", "output": None}])
    with pytest.raises(UserError, match=r"with the fields instruction, output \(null\); known"):
        list(read_records(path))


def test_each_file_has_its_own_format_and_own_formats_may_be_mixed(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", [{"instruction": "Sky?", "output": "Blue."}])
    write_records(tmp_path / "b.jsonl", [{"prompt": "Sky?", "completion": "Blue."}])
    write_records(
        tmp_path / "c.jsonl",
        [{"text": "a"}, {"messages": [SKY, BLUE]}, {"conversations": [said("human", "a"), said("gpt", "b")]}],
    )
    reader = read_records(tmp_path)
    assert ["messages" in record for record in reader] == [True, True, False, True, True]
    assert dict(reader.formats) == {
        "alpaca": 1,
        "prompt-completion": 1,
        "text": 1,
        "messages": 1,
        "sharegpt": 1,
    }


def test_a_named_format_wins_over_the_first_that_fits(tmp_path: Path) -> None:
    row = {"text": "A document.", "instruction": "Sky?", "output": "Blue."}
    path = write_records(tmp_path / "a.jsonl", [row])
    assert [record["text"] for record in read_records(path, record_format=RecordFormat("text"))] == [
        "A document."
    ]
    with pytest.raises(UserError, match="lacks fields of the format sharegpt: conversations or conversation"):
        list(read_records(path, record_format=RecordFormat("sharegpt")))
    with pytest.raises(UserError, match=r"unknown format 'alpacca'; did you mean 'alpaca'\?"):
        RecordFormat("alpacca")


def test_fields_can_be_mapped_to_those_of_a_format(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", [{"task": "Sky?", "result": "Blue.", "conversations": "x"}])
    fields = {"instruction": "task", "output": "result"}
    reader = read_records(path, fields=fields, record_format=RecordFormat("alpaca"))
    assert [record["messages"] for record in reader] == [[SKY, BLUE]]
    # A mapped text is a text, whatever else the record has.
    assert [record["text"] for record in read_records(path, fields={"text": "task"})] == ["Sky?"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "3"}, "is a tool's or calls one"),
        (said("observation", "3"), "is a tool's or calls one"),
        (said("function_call", "{}"), "is a tool's or calls one"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "is a tool's or calls one"),
        (
            {"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]},
            "a part is of the type 'image_url'; only text is read",
        ),
    ],
)
def test_what_records_do_not_hold_is_a_bad_record(message: Any, reason: str, tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", [{"messages": [SKY, message]}])
    with pytest.raises(UserError, match=reason):
        list(read_records(path))


def test_content_in_parts_of_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Sk"}, {"type": "input_text", "text": "y?"}]
    path = write_records(
        tmp_path / "a.jsonl",
        [
            {
                "messages": [
                    {"role": "developer", "content": "S"},
                    {"role": "user", "content": parts},
                    {**BLUE, "tool_calls": None},
                ]
            }
        ],
    )
    [record] = read_records(path)
    assert [(one["role"], one["content"]) for one in record["messages"]] == [
        ("system", "S"),
        ("user", "Sky?"),
        ("assistant", "Blue."),
    ]


def test_every_format_reads_the_fields_by_which_it_is_recognised() -> None:
    for name, row, _ in EXAMPLES:
        assert recognise(row) is BY_NAME[name]
        assert set(row) <= {*BY_NAME[name].columns, "text"}
