"""Tokenizers in GGUF files: tokens of llama.cpp where it is installed, scores of SentencePiece itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from koine.errors import KoineWarning, UserError
from koine.model.formats.gguf_sentencepiece import read_sentencepiece
from koine.model.formats.gguf_tokenizer import (
    BYTE,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    UNKNOWN,
    read_gguf_tokenizer,
)
from koine.tokenizer import Tokenizer, load_tokenizer
from tests.model.families import gguf_export
from tests.model.families.cases import Case
from tests.model.families.gguf_export import PEER
from tests.model.families.reference import write_checkpoint

from .test_gguf import BYTE_LEVEL, TEXTS

needs_llama_cpp = pytest.mark.skipif(
    not PEER.exists(), reason="the peer is not installed: python benchmarks/peers/install.py llama_cpp"
)
SPACE = "▁"
PREPENDED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a `tokenizer.json` as `transformers` converts SentencePiece's, and SentencePiece's own."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the comparison needs the extra [measure]")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text("\n".join(list(TEXTS.values()) * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spm"), vocab_size=700, model_type="bpe",
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    vocabulary = {model.id_to_piece(index): index for index in range(len(model))}
    order = sorted(vocabulary, key=lambda token: -model.get_score(vocabulary[token]))
    # Every way to cut a piece into two pieces is a merge, those of high scores first: as in `transformers`.
    merges = [
        [token[:cut], token[cut:]]
        for token in order
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    added = [
        {
            "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
        for index, token in enumerate(("<unk>", "<s>", "</s>"))
    ]  # fmt: skip
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": PREPENDED,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "vocab": vocabulary, "merges": merges,
            "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder, model


def changed(folder: Path, out: Path, **changes: Any) -> Path:
    """Write a copy of a tokenizer with other fields in `tokenizer.json`."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= changes.pop("model", {})
    out.mkdir()
    (out / "tokenizer.json").write_text(json.dumps(content | changes))
    (out / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    return out


def exported_with(tokenizer: Path, work: Path) -> Path:
    """Return the GGUF file of a random Llama with this tokenizer."""
    size = load_tokenizer(tokenizer).vocab_size
    case = Case(model_type="llama", name="tokenizer", changes={"vocab_size": size, "num_hidden_layers": 1})
    write_checkpoint(case, work / "model")
    Tokenizer({one.name: one.read_text() for one in tokenizer.glob("tokenizer*.json")}).save(work / "model")
    gguf_export.export_gguf(work / "model", work / "model.gguf")
    return work / "model.gguf"


def test_scores_and_types_are_those_of_sentencepiece(pieces: tuple[Path, Any]) -> None:
    folder, model = pieces
    read = read_gguf_tokenizer(folder, rows=len(model) + 2)
    assert (read.model, read.pre, read.merges) == ("llama", "default", None)
    assert (read.add_bos, read.add_space_prefix, read.fewer_spaces) == (True, True, False)
    assert read.scores is not None
    assert read.unknown_id == model.unk_id()
    assert read.types[model.unk_id()] == UNKNOWN
    assert {index for index, kind in enumerate(read.types) if kind == BYTE} == {
        index for index in range(len(model)) if model.is_byte(index)
    }
    # Only the order of the scores of what is merged counts.
    merged = [index for index in range(len(model)) if len(model.id_to_piece(index)) > 1]
    merged = [index for index in merged if not (model.is_control(index) or model.is_byte(index))]
    merged.remove(model.unk_id())
    theirs = sorted(merged, key=lambda index: -model.get_score(index))
    assert sorted(merged, key=lambda index: -read.scores[index]) == theirs


@needs_llama_cpp
@pytest.mark.parametrize("prepended", [True, False], ids=["llama-2", "gemma"])
def test_llama_cpp_has_the_tokens_of_sentencepiece(
    prepended: bool, pieces: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, model = pieces
    if not prepended:
        folder = changed(folder, tmp_path / "changed", normalizer=PREPENDED["normalizers"][1])
    out = exported_with(folder, tmp_path)
    answer = gguf_export.llama_cpp(out, tmp_path, [], list(TEXTS.values()))
    assert answer["ids"] == [load_tokenizer(folder).encode(text) for text in TEXTS.values()]
    if prepended:
        assert answer["ids"] == model.encode(list(TEXTS.values()))
    assert answer["with_bos"] == [1]


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_spaces_of_metaspace_are_told(scheme: str, pieces: tuple[Path, Any], tmp_path: Path) -> None:
    folder = changed(pieces[0], tmp_path / "changed", normalizer=None, pre_tokenizer=metaspace(scheme))
    with pytest.warns(KoineWarning, match="a space before every text and after every special token"):
        out = exported_with(folder, tmp_path)
    if PEER.exists():
        plain, spaced = "Der Fluss", " Der Fluss"
        answer = gguf_export.llama_cpp(out, tmp_path, [], [plain, spaced])
        ours = load_tokenizer(folder)
        assert answer["ids"][0] == ours.encode(plain)
        assert answer["ids"][1] != ours.encode(spaced)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENS = ["<unk>", *BYTES, "a", "b", "c", "ab", "bc", "abc"]
MERGES = [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]]


def three_letters(**changes: Any) -> dict[str, Any]:
    """The content of a `tokenizer.json` in which "abc" can be cut in two ways."""
    model = {
        "type": "BPE", "byte_fallback": True, "merges": MERGES,
        "vocab": {token: index for index, token in enumerate(TOKENS)},
    }  # fmt: skip
    return {
        "normalizer": PREPENDED,
        "pre_tokenizer": None,
        "model": model | changes.pop("model", {}),
    } | changes


def test_scores_by_the_order_of_merges(tmp_path: Path) -> None:
    scores = read_sentencepiece(three_letters(), tmp_path).scores
    assert [scores[token] for token in ("ab", "bc", "abc", "a", "<0x41>")] == [0, -1, -2, -3, -3]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"merges": MERGES[:3]}}, "merges that give 'abc' are not those of SentencePiece"),
        (
            {"model": {"merges": [MERGES[number] for number in (0, 3, 1, 2)]}},
            "merges that give 'abc' are not",
        ),
        ({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}, "lacks the token <0x00>"),
        ({"normalizer": None, "pre_tokenizer": metaspace("first") | {"split": True}}, "text is changed"),
        ({"normalizer": {"type": "Lowercase"}}, "text is changed"),
    ],
)
def test_what_is_not_sentencepiece_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        read_sentencepiece(three_letters(**changes), tmp_path)


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            BYTE_LEVEL | {"use_regex": False},
        ],
    }


DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}


@pytest.mark.parametrize(
    ("name", "pre_tokenizer", "model"),
    [
        ("llama-bpe", split(LLAMA3_PATTERN), {"ignore_merges": True}),
        ("dbrx", split(LLAMA3_PATTERN), {}),
        ("qwen2", split(QWEN2_PATTERN), {}),
        ("smollm", DIGITS, {}),
        ("gpt-2", BYTE_LEVEL, {}),
    ],
)
def test_expressions_of_byte_level_bpe(
    name: str, pre_tokenizer: dict[str, Any], model: dict[str, Any], tmp_path: Path
) -> None:
    gguf_export.tokenizer().save(tmp_path / "ours")
    folder = changed(
        tmp_path / "ours", tmp_path / "changed", pre_tokenizer=pre_tokenizer, model=model, normalizer=None
    )
    read = read_gguf_tokenizer(folder, rows=400)
    assert (read.model, read.pre, read.add_space_prefix) == ("gpt2", name, False)
    if PEER.exists():
        out = exported_with(folder, tmp_path)
        answer = gguf_export.llama_cpp(out, tmp_path, [], list(TEXTS.values()))
        assert answer["ids"] == [load_tokenizer(folder).encode(text) for text in TEXTS.values()]


def test_an_expression_is_refused_where_whole_pieces_are_taken_and_llama_cpp_does_not(tmp_path: Path) -> None:
    gguf_export.tokenizer().save(tmp_path / "ours")
    folder = changed(
        tmp_path / "ours", tmp_path / "changed", pre_tokenizer=BYTE_LEVEL, model={"ignore_merges": True}
    )
    with pytest.raises(UserError, match="no name for the expression"):
        read_gguf_tokenizer(folder, rows=400)


@pytest.mark.parametrize("adds", [True, False])
def test_bos_is_added_where_the_tokenizer_adds_it(adds: bool, tmp_path: Path) -> None:
    gguf_export.tokenizer().save(tmp_path / "ours")
    read = read_gguf_tokenizer(tmp_path / "ours", rows=400)
    assert read.add_bos
    folder = changed(tmp_path / "ours", tmp_path / "changed", post_processor=None)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": adds}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_gguf_tokenizer(folder, rows=400).add_bos is adds
