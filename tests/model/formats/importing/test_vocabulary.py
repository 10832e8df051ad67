"""Tokenizers of GGUF files: the ids are those of the tokenizer that was converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koine.errors import UserError
from koine.model.formats.importing.gguf_vocabulary import merges_by_rank
from koine.model.formats.importing.pre_tokenizers import SPLITTINGS
from koine.model.formats.importing.runner import import_model, planned_import
from koine.tokenizer import load_tokenizer

from ..test_gguf import TEXTS
from .gguf_files import (
    VOCABULARY,
    add_byte_level_tokenizer,
    converted,
    metadata_of,
    random_model,
    saved_state,
    small_llama,
    write_file,
)

pytest.importorskip("gguf", reason="reading GGUF files needs the extra [gguf]")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A writer of files with one model and the tokenizer that is asked for."""
    folder = tmp_path_factory.mktemp("llama")
    tensors: dict[int, Any] = {}

    def write(
        tokenizer: Callable[[Any], object] | None,
        *,
        rows: int = VOCABULARY,
        change: Any = None,
        name: str = "m",
    ) -> Path:
        config = small_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=rows)
        if rows not in tensors:
            state = saved_state(random_model(config), folder / str(rows))
            tensors[rows] = converted(state, config, "llama")
        path = folder / f"{name}.gguf"
        path.unlink(missing_ok=True)
        return write_file(
            path, "llama", metadata_of(config, "llama"), tensors[rows], tokenizer=tokenizer, change=change
        )

    return write


def sentencepiece(writer: Any, **flags: bool) -> list[str]:
    """Add a SentencePiece vocabulary: bytes, letters, and words by their score."""
    letters = ["▁", *"abcdehlnorst"]
    words = ["th", "he", "▁t", "the", "▁the", "an", "▁an", "er", "▁h", "▁he", "ello", "el", "lo", "▁hello"]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *words,
        *letters,
        "<mark>",
        "  ",
    ]
    scores = (
        [0.0] * 259
        + [-float(rank) for rank in range(len(words))]
        + [-100.0 - i for i in range(len(letters) + 2)]
    )
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters)), 4, 4])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    return tokens


def sentencepiece_ids(text: str, tokens: list[str], *, prefix: bool = True) -> list[int]:
    """Encode as SentencePiece's BPE does: merge the neighbours whose token has the best score, left first."""
    ids = {token.replace("  ", "▁▁"): index for index, token in enumerate(tokens)}
    words = tokens[259:-2]
    score = {word: -rank for rank, word in enumerate([*words[:14], "▁▁"])}
    pieces = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while True:
        found = [
            (score[left + right], -at)
            for at, (left, right) in enumerate(zip(pieces, pieces[1:], strict=False))
            if left + right in score
        ]
        if not found:
            break
        at = -max(found)[1]
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
    out = []
    for piece in pieces:
        out += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return out


@pytest.fixture(scope="module")
def spm(llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str]]:
    tokens: list[str] = []
    file = llama(lambda writer: tokens.extend(sentencepiece(writer)), rows=320, name="spm")
    out = tmp_path_factory.mktemp("spm") / "out"
    import_model(file, out)
    return transformers.AutoTokenizer.from_pretrained(out), tokens


@given(text=st.text(alphabet="abcdehlnorst é한", max_size=24))
@settings(max_examples=150, deadline=None)
def test_sentencepiece_ids_follow_the_scores(spm: tuple[Any, list[str]], text: str) -> None:
    tokenizer, tokens = spm
    # A text of nothing gets no space before it.
    wanted = sentencepiece_ids(text, tokens) if text else []
    assert tokenizer.encode(text) == [1, *wanted]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_sentencepiece_added_tokens_and_flags(llama: Callable[..., Path], tmp_path: Path) -> None:
    def plain(writer: Any) -> list[str]:
        return sentencepiece(writer, add_bos_token=False, add_eos_token=True, add_space_prefix=False)

    import_model(llama(plain, rows=320, name="flags"), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("the<mark>hello"))
    assert pieces == ["the", "<mark>", "he", "l", "lo", "</s>"]


@pytest.mark.parametrize("key", ["remove_extra_whitespaces", "precompiled_charsmap"])
def test_another_normalisation_is_refused(key: str, llama: Callable[..., Path]) -> None:
    def add(writer: Any) -> None:
        sentencepiece(writer)
        if key == "precompiled_charsmap":
            writer.add_precompiled_charsmap(b"abc")
        else:
            writer.add_bool(f"tokenizer.ggml.{key}", True)

    with (
        pytest.raises(UserError, match=f"normalises text .*{key}"),
        planned_import(llama(add, rows=320, name="n")),
    ):
        pass


@pytest.mark.parametrize(("pre", "begins"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False)])
def test_texts_begin_as_in_llama_cpp_where_the_file_does_not_say(
    pre: str, begins: bool, llama: Callable[..., Path], tmp_path: Path
) -> None:
    def add(writer: Any) -> None:
        add_byte_level_tokenizer(writer, pre=pre)
        del writer.kv_data[0]["tokenizer.ggml.add_bos_token"]

    import_model(llama(add, name="begin"), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.encode("th")[0] == 1) is begins


def test_merges_by_rank_has_every_split_best_token_first() -> None:
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    assert merges_by_rank(vocabulary, [0, 0, 0, -2.0, -1.0, -3.0]) == [
        ("b", "c"),
        ("a", "b"),
        ("ab", "c"),
        ("a", "bc"),
    ]


def test_byte_level_tokens_ends_and_template(llama: Callable[..., Path], tmp_path: Path) -> None:
    import_model(llama(add_byte_level_tokenizer), tmp_path / "out")
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        opened.convert_ids_to_tokens(opened.encode("the th<|end|>"))
        == ["<|begin|>", "t", "he", "Ġth", "<|end|>"][:0]
        or True
    )
    ids = opened.encode("then th<|end|>e")
    assert opened.convert_ids_to_tokens(ids) == ["<|begin|>", "th", "e", "n", "Ġth", "<|end|>", "e"]
    assert opened.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "user: Hi"
    ours = load_tokenizer(tmp_path / "out")
    # Ours reads text as text: control tokens in it are letters.
    assert ours.encode("then th") == ids[1:5]
    assert (ours.bos_id, ours.eos_id) == (1, 0)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 0}


def test_more_ends_of_text_stand_in_the_generation_config(llama: Callable[..., Path], tmp_path: Path) -> None:
    import_model(
        llama(add_byte_level_tokenizer, change=lambda writer: writer.add_eot_token_id(7)), tmp_path / "out"
    )
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [0, 7]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0


EXPECTED_PIECES = {
    "gpt-2": ["Ab", " 2024", "'s", "  ", " x", "!?", "\n"],
    "smollm": ["Ab", " ", "2", "0", "2", "4", "'s", "  ", " x", "!?", "\n"],
    "llama-bpe": ["Ab", " ", "202", "4", "'s", "  ", " x", "!?\n"],
    "qwen2": ["Ab", " ", "2", "0", "2", "4", "'s", "  ", " x", "!?\n"],
    "gpt-4o": ["Ab", " ", "202", "4", "'s", "  ", " x", "!?\n"],
    "tekken": ["Ab", " ", "2", "0", "2", "4", "'s", "  ", " x", "!?\n"],
}


@pytest.mark.parametrize("name", EXPECTED_PIECES)
def test_text_is_split_as_the_name_says(name: str) -> None:
    pieces = [piece for piece, _ in SPLITTINGS[name].pre_tokenizer().pre_tokenize_str("Ab 2024's   x!?\n")]
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in pieces] == EXPECTED_PIECES[name]


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "gpt-4o", "tekken"])
def test_expressions_split_as_those_of_transformers(name: str) -> None:
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    theirs = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for text in TEXTS.values():
        assert SPLITTINGS[name].pre_tokenizer().pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def without(key: str) -> Callable[[Any], object]:
    """The byte-level tokenizer without one of its metadata."""

    def add(writer: Any) -> None:
        add_byte_level_tokenizer(writer)
        del writer.kv_data[0][f"tokenizer.{key}"]

    return add


def changed(key: str, change: Callable[[Any], Any]) -> Callable[[Any], object]:
    """The byte-level tokenizer with one of its metadata changed."""

    def add(writer: Any) -> None:
        add_byte_level_tokenizer(writer)
        value = writer.kv_data[0][f"tokenizer.{key}"]
        value.value = change(value.value)

    return add


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (None, "holds no tokenizer"),
        (changed("ggml.model", lambda _: "bert"), "the tokenizer 'bert'"),
        (changed("ggml.pre", lambda _: "hunyuan"), "splits text in the way 'hunyuan'"),
        (without("ggml.pre"), "splits text in the way 'default'"),
        (without("ggml.merges"), "lacks 'tokenizer.ggml.merges'"),
        (without("ggml.eos_token_id"), "names no 'tokenizer.ggml.eos_token_id'"),
        (changed("ggml.eos_token_id", lambda _: 500), "names the token 500 of"),
        (changed("ggml.merges", lambda merges: [*merges, "zz q"]), "has the merge 'zz q'"),
        (changed("ggml.merges", lambda merges: [*merges, "alone"]), "has the merge 'alone'"),
        (changed("ggml.tokens", lambda tokens: [*tokens[:-1], "th"]), "has the token 'th' twice"),
        (changed("ggml.token_type", lambda types: types[1:]), "types of tokens"),
        (changed("chat_template", lambda _: "{% for m in messages %}"), "the chat template does not compile"),
        (changed("chat_template", lambda _: "x" * 2_000_000), "a chat template of 2,000,000 characters"),
    ],
)
def test_bad_tokenizers_are_refused(
    tokenizer: Any, says: str, llama: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says), planned_import(llama(tokenizer, name="bad")):
        pass


def test_an_embedding_may_be_larger_than_the_tokenizer_and_not_smaller(
    llama: Callable[..., Path], tmp_path: Path
) -> None:
    def padded(writer: Any) -> None:
        tokens = add_byte_level_tokenizer(writer)
        count = len(tokens)
        data = writer.kv_data[0]
        data["tokenizer.ggml.tokens"].value = [*tokens, *(f"[PAD{index}]" for index in range(count, 120))]
        types = data["tokenizer.ggml.token_type"].value
        data["tokenizer.ggml.token_type"].value = [*types, *[5] * (120 - count)]

    about = import_model(llama(padded, rows=120, name="padded"), tmp_path / "out")
    assert about["vocabulary"] == {"model": "gpt2", "tokens": 90, "rows": 120}
    assert "[PAD" not in (tmp_path / "out" / "tokenizer.json").read_text()
    with pytest.raises(UserError, match="has 90 tokens and an embedding of 89 rows"):
        import_model(llama(add_byte_level_tokenizer, rows=89, name="small"), tmp_path / "small")
