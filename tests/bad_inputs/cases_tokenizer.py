"""Bad inputs around tokenizers' files, chat templates, and vocabularies of other libraries."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import worlds
from .case import Case

TOKENIZE = "data tokenize text.jsonl --tokenizer tokenizer --out new"
MEASURE = "tokenizer measure tokenizer --data text.jsonl"
TIKTOKEN = "tokenizer measure cl100k.tiktoken --data text.jsonl"
EXTEND = "tokenizer extend tokenizer --data text.jsonl --tokens 5 --out new"


def file(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A sound tokenizer and text, with another content of one of the tokenizer's files."""

    def then(folder: Path) -> None:
        data = content.encode("utf-8") if isinstance(content, str) else content
        (folder / "tokenizer" / name).write_bytes(data)

    return worlds.having("text", "tokenizer", then=then)


def changed(
    change: Callable[[dict[str, Any]], object], name: str = "tokenizer.json"
) -> Callable[[Path], None]:
    """A sound tokenizer and text, with `change` made to one of the tokenizer's JSON files."""

    def then(folder: Path) -> None:
        path = folder / "tokenizer" / name
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    return worlds.having("text", "tokenizer", then=then)


def config(**fields: Any) -> Callable[[Path], None]:
    return changed(lambda content: content.update(fields), "tokenizer_config.json")


def tiktoken(*more: bytes, without: int | None = None) -> Callable[[Path], None]:
    """A vocabulary of tiktoken: the bytes, but one of them, and more lines."""
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256) if byte != without]
    return worlds.both(
        worlds.good_text,
        lambda folder: (folder / "cl100k.tiktoken").write_bytes(b"\n".join([*lines, *more])) and None,
    )


def kind(name: str) -> Callable[[Path], None]:
    """A tokenizer that knows only words."""

    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"] = {"type": "WhitespaceSplit"}
        content["decoder"] = None
        words = {
            token: place for place, token in enumerate(one["content"] for one in content["added_tokens"])
        }
        options: dict[str, Any] = {
            "WordPiece": {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
        }
        content["model"] = {"type": name, "unk_token": "[GONE]", "vocab": words, **options.get(name, {})}

    return changed(change)


CASES = (
    Case(
        mistake="a tokenizer that is a list",
        command=TOKENIZE,
        prepare=file("tokenizer.json", "[1, 2]"),
        says="tokenizer: not a tokenizer (…); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="a tokenizer of an unknown kind",
        command=TOKENIZE,
        prepare=changed(lambda content: content["model"].update(type="Spells")),
        says="tokenizer: not a tokenizer (…); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="a tokenizer with an id beyond 32 bits",
        command=TOKENIZE,
        prepare=changed(lambda content: content["model"]["vocab"].update(a=2**40)),
        says="tokenizer: not a tokenizer (…); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="a tokenizer nested a hundred thousand deep",
        command=TOKENIZE,
        prepare=file("tokenizer.json", '{"a": ' * 100_000),
        says="tokenizer: not a tokenizer (…); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="a tokenizer that is not UTF-8",
        command=TOKENIZE,
        prepare=file("tokenizer.json", b'{"a": "\xff"}'),
        says="tokenizer/tokenizer.json: not UTF-8 text; the file is damaged",
    ),
    Case(
        mistake="a tokenizer with a number of 4,000 digits",
        command=TOKENIZE,
        prepare=changed(lambda content: content.update(note=10**4000)),
        says="tokenizer: not a tokenizer (…); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="a merge of tokens that the vocabulary lacks",
        command=TOKENIZE,
        prepare=changed(lambda content: content["model"]["merges"].append(["Q", "Ω"])),
        says="tokenizer: not a tokenizer (Token `Ω` out of vocabulary…); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="a tokenizer's settings that are a list",
        command=TOKENIZE,
        prepare=file("tokenizer_config.json", "[]"),
        says="tokenizer: tokenizer_config.json is not valid JSON (no JSON object); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="a tokenizer's settings nested a hundred thousand deep",
        command=TOKENIZE,
        prepare=file("tokenizer_config.json", "[" * 100_000),
        says="tokenizer: tokenizer_config.json is not valid JSON (nested too deeply); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="a tokenizer's settings with a number of 5,000 digits",
        command=TOKENIZE,
        prepare=file("tokenizer_config.json", '{"model_max_length": ' + "9" * 5000 + "}"),
        says="tokenizer: tokenizer_config.json is not valid JSON (an integer has thousands of digits); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="a tokenizer's settings that are not UTF-8",
        command=TOKENIZE,
        prepare=file("tokenizer_config.json", b'{"eos_token": "\xe9"}'),
        says="tokenizer/tokenizer_config.json: not UTF-8 text; the file is damaged",
    ),
    Case(
        mistake="a map of special tokens cut short",
        command=TOKENIZE,
        prepare=file("special_tokens_map.json", '{"eos_token": '),
        says="tokenizer: special_tokens_map.json is not valid JSON (Expecting value: line 1 column 15 (char 14)); the file is damaged or of an unknown kind",
    ),
    Case(
        mistake="an end of documents that the vocabulary lacks",
        command=TOKENIZE,
        prepare=config(eos_token="<|finis|>"),
        says="tokenizer: the token '<|finis|>' is named but not in the vocabulary; fix tokenizer_config.json",
    ),
    Case(
        mistake="a chat template that is a number",
        command=TOKENIZE,
        prepare=worlds.both(
            config(chat_template=7), lambda folder: (folder / "tokenizer" / "chat_template.jinja").unlink()
        ),
        says="tokenizer: the chat_template of tokenizer_config.json is a int, no text; write a Jinja text",
    ),
    Case(
        mistake="a chat template that is not UTF-8",
        command=TOKENIZE,
        prepare=file("chat_template.jinja", b"{{ '\xff' }}"),
        says="tokenizer/chat_template.jinja: not UTF-8 text; the file is damaged",
    ),
    Case(
        mistake="text that a tokenizer has no token for, nor a token for unknown text",
        command=MEASURE,
        prepare=kind("WordLevel"),
        says="tokenizer/tokenizer.json: the tokenizer cannot read the text (…); its vocabulary lacks what it names",
    ),
    Case(
        mistake="extending a tokenizer of whole words",
        command=EXTEND,
        prepare=kind("WordPiece"),
        says="tokenizer: a tokenizer of kind WordPiece; only BPE tokenizers can be extended",
    ),
    Case(
        mistake="extending a tokenizer whose record of training is damaged",
        command=EXTEND,
        prepare=file("tokenizer_training.json", '{"languages": ["de", 3]}'),
        says="tokenizer/tokenizer_training.json: its languages are no codes; the file is damaged",
    ),
    Case(
        mistake="a vocabulary of tiktoken without one of the bytes",
        command=TIKTOKEN,
        prepare=tiktoken(without=65),
        says="cl100k.tiktoken: holds no token for the byte 65; give a file in tiktoken's format",
    ),
    Case(
        mistake="a vocabulary of tiktoken with one rank twice",
        command=TIKTOKEN,
        prepare=tiktoken(b"YWI= 65"),
        says="cl100k.tiktoken: two tokens have one rank; give a file in tiktoken's format",
    ),
    Case(
        mistake="a vocabulary of tiktoken with a rank below zero",
        command=TIKTOKEN,
        prepare=tiktoken(b"YWI= -3"),
        says="cl100k.tiktoken: line 257 has the rank -3; give a file in tiktoken's format",
    ),
    Case(
        mistake="a vocabulary of tiktoken with a rank without end",
        command=TIKTOKEN,
        prepare=tiktoken(b"YWI= " + b"9" * 6000),
        says="cl100k.tiktoken: line 257 has the rank 99999999999999999999; give a file in tiktoken's format",
    ),
    Case(
        mistake="a SentencePiece model of another kind of file",
        command="tokenizer measure spiece.model --data text.jsonl",
        prepare=worlds.both(worlds.good_text, worlds.written("spiece.model", "no protobuf")),
        says="spiece.model: not a SentencePiece model (…); give another file",
    ),
    Case(
        mistake="a file's name with an escape sequence of the terminal",
        command="tokenizer train --data 'a\x1b[31m.docx' --vocab-size 300 --out new",
        prepare=worlds.written("a\x1b[31m.docx", "x"),
        says="a\\x1b[31m.docx: a file of unknown kind '.docx'; did you mean …",
    ),
)
