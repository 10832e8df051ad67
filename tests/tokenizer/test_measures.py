"""Measures against numbers worked out by hand, and other tokenizers against their own libraries."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest

from koine.errors import KoineWarning, UserError
from koine.tokenizer import MeasuredText, Tokenizer, measure, open_tokenizer
from koine.tokenizer.measures import gini, renyi_efficiency, script_of
from koine.tokenizer.token_bytes import piece_bytes, scored_lengths

from .letters import Letters


class Bytes:
    """A token a byte."""

    vocab_size = 256
    unknown_id = None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def unknown_bytes(self, texts: list[str]) -> list[int]:
        return [0] * len(texts)


UNITS = [
    MeasuredText("en", "ab cd", "1"),
    MeasuredText("en", "no translation", None),
    MeasuredText("de", "äb cd ef", "1"),
    MeasuredText("ja", "日本", "1"),
    MeasuredText("ja", "山", "2"),
]


def test_folders_and_texts_by_language_are_enough(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "small")
    texts = {"de": ["äb cd ef"], "en": ["ab cd", "ef"], "und": ["x"]}
    found = measure({"folder": str(tmp_path / "small"), "open": small}, texts)
    assert found["folder"]["de"] == found["open"]["de"]
    assert found["open"]["en"]["bytes"] == 7
    assert set(found["open"]) >= {"de", "en", "und", "overall"}
    assert "parity" not in found["open"]["de"]


def test_numbers_by_hand() -> None:
    rows = measure({"bytes": Bytes()}, UNITS, price_per_million=2.0)["bytes"]
    assert (rows["de"]["bytes"], rows["de"]["tokens"]) == (9, 9)
    assert rows["de"]["bytes_per_token"] == 1.0
    assert rows["de"]["characters_per_token"] == pytest.approx(8 / 9)
    assert rows["de"]["tokens_per_word"] == 3.0
    assert "tokens_per_word" not in rows["ja"]
    # 9 tokens of German for the 5 of the English translation; the second Japanese unit has none
    assert rows["de"]["parity"] == pytest.approx(9 / 5)
    assert rows["de"]["tokens_per_sentence"] == 9.0
    assert rows["ja"]["parity"] == pytest.approx(6 / 5)
    assert rows["en"]["parity"] == 1.0
    # ä is two bytes, neither of them a character
    assert rows["de"]["partial_character_share"] == pytest.approx(2 / 9)
    assert rows["ja"]["partial_character_share"] == 1.0
    assert rows["ja"]["cost_per_megabyte"] == 2.0
    assert rows["overall"]["languages"] == 3
    assert rows["overall"]["parity"] == pytest.approx((9 / 5 + 6 / 5 + 1) / 3)
    assert rows["overall"]["gini"] == pytest.approx(gini([1.0, 9 / 5, 6 / 5]))
    assert rows["cluster:asian"]["bytes_per_token"] == 1.0
    # distinct bytes of all texts: half of the vocabulary is not UTF-8 on its own
    assert rows["overall"]["scripts"]["bytes"]["tokens"] == 128


def word_pieces(folder: Path, words: list[str]) -> Path:
    """A WordPiece tokenizer of only these words."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    vocabulary = {"[UNK]": 0} | {word: index for index, word in enumerate(words, 1)}
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "pieces.json"))
    return folder / "pieces.json"


def test_unknown_script_is_not_good_compression(tmp_path: Path) -> None:
    opened = open_tokenizer(word_pieces(tmp_path, ["the", "sea", "##s"]))
    thai = "แม่น้ำไหลลงทะเล"
    units = [MeasuredText("en", "the seas", "1"), MeasuredText("th", thai, "1")]
    with pytest.warns(KoineWarning, match=r"pieces has no tokens for 100.0% of th: unknown text counts as"):
        rows = measure({"pieces": opened, "bytes": Bytes()}, units)
    # three tokens for the English, the Thai as if each of its bytes were a token
    assert rows["pieces"]["en"]["tokens"] == 3
    assert rows["pieces"]["en"]["unknown_share"] == 0.0
    size = len(thai.encode())
    assert rows["pieces"]["th"]["tokens"] == size
    assert rows["pieces"]["th"]["bytes_per_token"] == rows["bytes"]["th"]["bytes_per_token"] == 1.0
    assert rows["pieces"]["th"]["unknown_share"] == 1.0
    assert rows["pieces"]["th"]["parity"] == pytest.approx(size / 3)
    assert rows["pieces"]["th"]["partial_character_share"] == 1.0


def test_dropped_text_counts_as_unknown(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(str(tmp_path / "drops.json"))
    opened = open_tokenizer(tmp_path / "drops.json")
    assert opened.encode_batch(["abä日"]) == [[2]]
    assert opened.unknown_bytes(["abä日", "a b"]) == [5, 0]


def test_sentencepiece_without_byte_fallback(tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("the river runs to the sea\n" * 50, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=18, minloglevel=2
    )
    opened = open_tokenizer(tmp_path / "m.model")
    assert opened.unknown_bytes(["the sea", "the 日本 sea"]) == [0, 6]
    with pytest.warns(KoineWarning, match="100.0% of ja"):
        rows = measure({"m": opened}, [MeasuredText("ja", "日本", None)])["m"]
    assert rows["ja"]["bytes_per_token"] == pytest.approx(6 / 7)  # the six bytes and the leading space


def test_gini_of_two_and_of_equals() -> None:
    assert gini([1.0, 1.0, 1.0]) == pytest.approx(0.0)
    # mean absolute difference of all ordered pairs (|1 - 3| twice of four) is 1, over twice the mean 2
    assert gini([1.0, 3.0]) == pytest.approx(0.25)
    assert gini([0.0, 0.0, 0.0, 1.0]) == pytest.approx(0.75)


def test_renyi_efficiency_in_closed_form() -> None:
    assert renyi_efficiency(np.full(64, 3), 64) == pytest.approx(1.0)
    assert renyi_efficiency(np.array([10, 0, 0, 0]), 4) == pytest.approx(0.0)
    p = np.array([0.75, 0.25])
    expected = math.log((p**2.5).sum()) / (1 - 2.5) / math.log(2)
    assert renyi_efficiency(np.array([3, 1]), 2) == pytest.approx(expected)


def test_scripts() -> None:
    assert script_of(b" Haus") == "Latn"
    assert script_of("हिन".encode()) == "Deva"
    assert script_of(b" 12") == "Zyyy"
    assert script_of("ä".encode()[:1]) == "bytes"
    assert script_of("ひらA".encode()) == "Hira"


def test_our_tokenizer_opened_from_its_folder_is_equal(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    opened = open_tokenizer(tmp_path)
    texts = ["Das Gebiet 7 liegt nicht weit.", "東京は", "<BOS_TOKEN>"]
    assert opened.encode_batch(texts) == small.encode_batch(texts)
    assert opened.vocab_size == small.vocab_size
    for ids, text in zip(opened.encode_batch(texts), texts, strict=True):
        assert b"".join(map(opened.token_bytes, ids)).decode() == text


def test_tiktoken_ranks(tmp_path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    path = tmp_path / "small_cl100k.tiktoken"
    path.write_text("\n".join(lines), encoding="utf-8")
    opened = open_tokenizer(path)
    assert opened.encode_batch(["the the"]) == [[257, 258]]
    assert opened.token_bytes(258) == b" the"
    path.write_text("dGg= 0\nnot a line\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        open_tokenizer(path)


def test_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("the river runs to the sea\n" * 50, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "m"),
        vocab_size=290,
        byte_fallback=True,
        model_type="bpe",
    )
    opened = open_tokenizer(tmp_path / "m.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ids = opened.encode_batch(["the sea", "日"])
    assert ids == processor.encode(["the sea", "日"])
    assert b"".join(map(opened.token_bytes, ids[1])) == " 日".encode()
    rows = measure({"m": opened}, [MeasuredText("ja", "日", None), MeasuredText("en", "the sea", None)])["m"]
    assert rows["ja"]["partial_character_share"] == pytest.approx(3 / 4)
    assert rows["en"]["partial_character_share"] == 0.0


def test_piece_bytes() -> None:
    assert piece_bytes("▁the") == b" the"
    assert piece_bytes("<0xE6>") == b"\xe6"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nothing", None, "no such file"),
        ("tokenizer.json", "{", "not a tokenizer"),
        ("some.txt", "x", "no known kind"),
        ("empty.tiktoken", "", "holds no tokens"),
        ("broken.model", "x", "not a SentencePiece model"),
    ],
)
def test_files_that_are_no_tokenizer(name: str, content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        open_tokenizer(path)


def test_the_command_writes_json_and_a_page(small: Tokenizer, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from koine.cli.tokenizer.commands import tokenizer

    small.save(tmp_path / "one")
    rows = [
        {"id": "1", "text": {"eng_Latn": "The sea is far.", "deu_Latn": "Das Meer ist weit."}},
        {"id": "2", "text": {"eng_Latn": "A map.", "deu_Latn": "Eine Karte.", "hin_Deva": "नक्शा।"}},
    ]
    data = tmp_path / "parallel.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    done = CliRunner().invoke(
        tokenizer,
        ["measure", str(tmp_path / "one"), "--data", str(data), "--out", str(out), "--report", str(page)],
    )
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text(encoding="utf-8"))[str(tmp_path / "one")]
    assert set(found) >= {"en", "de", "hi", "overall", "cluster:european"}
    assert found["hi"]["parallel_sentences"] == 1
    assert "Comparison of tokenizers" in page.read_text(encoding="utf-8")
    assert "<svg" in page.read_text(encoding="utf-8")


def test_price_and_unknown_text_of_a_measure(small: Tokenizer) -> None:
    found = measure({"t": Letters("ab c")}, [MeasuredText("en", "ab c")], price_per_million=2.0)
    # a token a byte: 10^6 bytes are 10^6 tokens
    assert found["t"]["en"]["cost_per_megabyte"] == pytest.approx(2.0)
    found = measure({"t": Letters("abd", dear="d")}, [MeasuredText("en", "abd")], price_per_million=3.0)
    assert found["t"]["en"]["cost_per_megabyte"] == pytest.approx(3.0 * 5 / 3)

    class Lossy(Letters):
        def unknown_bytes(self, texts: list[str]) -> list[int]:
            return [1 if "x" in text else 0 for text in texts]

    tokenizer = Lossy("abx")
    with pytest.warns(KoineWarning, match=r"t has no tokens for 1\.0% of en"):
        measure({"t": tokenizer}, [MeasuredText("en", "a" * 99 + "x")])
    tokenizer.unknown_id = 2
    assert scored_lengths(tokenizer, ["abx"], [[0, 1, 2]]) == ([3], [1])
