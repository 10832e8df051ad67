"""Very long runs of letters, spaces and signs: time stays linear, and only the runs are cut."""

from __future__ import annotations

import base64
import random
import unicodedata
import warnings
from pathlib import Path

import pytest

from koine.errors import UserError
from koine.tokenizer import MeasuredText, Tokenizer, extend_tokenizer, measure, train_tokenizer
from koine.tokenizer.extend import LONGEST_PRETOKEN
from koine.tokenizer.loaders import LONG_SPACES, open_tokenizer, read_ranks
from koine.tokenizer.pretoken_counts import count_pretokens
from koine.tokenizer.pretokenize import LONGEST_RUN, pre_tokenizer, short_runs

SIZE = 100_000
RUNS = {
    "one letter": "a" * SIZE,
    "spaces": "x" + " " * SIZE + "x",
    "line ends": "\n" * SIZE + "x",
    "mixed space": "\t \n" * (SIZE // 3) + "x",
    "signs": "=" * SIZE,
    "capitals": "A" * SIZE,
    "thai": "แม่น้ำไหลลงทะเล" * (SIZE // 15),
    "marks": "e" + "\u0301" * SIZE,
    "digits": "7" * SIZE,
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * (SIZE // 14),
    "base64": base64.b64encode(random.Random(0).randbytes(SIZE)).decode()[:SIZE],
    "minified": "a=b;c(d);" * (SIZE // 9),
}
ENGLISH = [f"A short line of plain words, number {number}." for number in range(300)]


def pieces(text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in pre_tokenizer().pre_tokenize_str(text)]


@pytest.mark.parametrize("name", RUNS)
def test_no_training_piece_is_longer_than_the_limit(name: str) -> None:
    """The trainer needs time in the square of a piece's length: 100,000 characters take it hours, 1,000 nothing."""
    parts = list(short_runs(RUNS[name]))
    assert "".join(parts) == RUNS[name]
    # a piece may hold the end of one run and the beginning of another
    assert max(len(piece) for part in parts for piece in pieces(part)) <= 2 * LONGEST_RUN + 4


@pytest.mark.parametrize(
    "text",
    [
        "ก" * LONGEST_RUN,
        " " * LONGEST_RUN + "x",
        "川は海へ流れる。" * 2000,
        "word " * 3000,
        "a1" * 5000,
        "foo|bar;" * 4000,
        "",
    ],
)
def test_text_without_long_runs_is_not_cut(text: str) -> None:
    assert list(short_runs(text)) == [text]


def test_only_the_long_run_is_cut() -> None:
    before, after = "The river's sea, 37. ", "\n  and NASA's map"
    for run in ("a" * 2500, " " * 2500, "=" * 2500):
        parts = list(short_runs(before + run + after))
        assert len(parts) == 3
        cut = [piece for part in parts for piece in pieces(part)]
        assert [one for one in pieces(before + run + after) if len(one) < 10] == [
            one for one in cut if len(one) < 10
        ]


@pytest.mark.parametrize("name", RUNS)
def test_training_extending_and_measuring_finish(name: str, small: Tokenizer, tmp_path: Path) -> None:
    texts = [*ENGLISH, RUNS[name]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = train_tokenizer({"en": lambda: texts}, vocab_size=340)
        small.save(tmp_path)
        extended = trained
        if name != "digits":  # of which nothing is to be learnt
            extended = extend_tokenizer(tmp_path, ((text, 1) for text in texts), new_tokens=5).tokenizer
        measure({"a": trained, "b": extended}, [MeasuredText("en", text) for text in texts])
    for tokenizer in (trained, extended):
        back = tokenizer.decode(tokenizer.encode(RUNS[name]))
        assert back == unicodedata.normalize("NFC", RUNS[name])


def test_the_limit_does_not_change_ordinary_text() -> None:
    """The trainer gives the same file without the limit."""
    from koine.tokenizer.training import _empty_backend, _learn

    texts = [*ENGLISH, "川は海へ流れる。" * 500, "แม่น้ำไหล" * 100, "-" * 900]
    backend = _empty_backend()
    _learn(backend, iter(texts), vocab_size=340, min_frequency=5, show_progress=False)
    trained = train_tokenizer({"en": lambda: texts}, vocab_size=340, scheme="natural", english_share=None)
    assert trained.vocabulary() == backend.get_vocab()


def test_pretokens_of_any_tokenizer_are_cut_for_counting(metaspace: Path) -> None:
    """A tokenizer that does not cut at punctuation has a page without spaces as one piece."""
    backend = Tokenizer({"tokenizer.json": (metaspace / "tokenizer.json").read_text(encoding="utf-8"),
                         "tokenizer_config.json": '{"eos_token": "</s>"}'})._backend  # fmt: skip
    text = "川は海へ流れる。" * 2000
    options = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    whole = count_pretokens([(text, 1), ("a b", 2)], **options)
    cut = count_pretokens([(text, 1), ("a b", 2)], **options, longest=LONGEST_PRETOKEN)
    assert max(map(len, whole.counts)) > LONGEST_PRETOKEN >= max(map(len, cut.counts))
    assert {
        word: count for word, count in whole.counts.items() if len(word) < 10
    }.items() <= cut.counts.items()


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A vocabulary of bytes and of runs of spaces, like the published ones."""
    tokens = [bytes([byte]) for byte in range(256)] + [b" " * 2**power for power in range(1, 7)]
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))
    (tmp_path / "cl100k.tiktoken").write_bytes(b"".join(lines))
    return tmp_path / "cl100k.tiktoken"


def test_tiktoken_measures_a_million_spaces(ranks: Path) -> None:
    """tiktoken's regular expressions overflow their stack there, with a panic that is no `Exception`."""
    pytest.importorskip("tiktoken")
    tokenizer = open_tokenizer(ranks)
    text = "left" + " " * 1_000_000 + "right"
    [ids] = tokenizer.encode_batch([text])
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    # 999,999 spaces in one piece, and the last one before the word
    assert len(ids) == 4 + (999_999 // 64 + 6) + 6
    found = measure({"t": tokenizer}, [MeasuredText("en", text), MeasuredText("en", "a lamp")])
    assert found["t"]["en"]["bytes"] == len(text) + 6


def test_the_path_for_long_spaces_gives_tiktokens_ids(ranks: Path) -> None:
    """The path for long runs, tried on text that tiktoken itself can read."""
    pytest.importorskip("tiktoken")
    tokenizer = open_tokenizer(ranks)
    random_text = random.Random(0)
    parts = [
        "a",
        "The",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "é",
        "ก",
        "'s",
        "'S",
        "12345",
        "!?",
        "//",
        "\u00a0",
        "\u3000",
        "🏳️‍🌈",
    ]
    texts = ["".join(random_text.choices(parts, k=30)) for _ in range(300)]
    texts += ["left" + " " * 60_000 + "right", "\n" * 60_000 + "  b", " " * 60_000, "\t \n" * 20_000 + "x"]
    assert all(LONG_SPACES.search(text) for text in texts[-4:])
    for text in texts:
        assert tokenizer._encode_long(text) == tokenizer._encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[1:], "holds no token for the byte 0"),
        (lambda lines: [*lines, b"YWI= 7"], "two tokens have one rank"),
        (lambda lines: [*lines, b"YWI= -1"], "line 263 has the rank -1"),
        (lambda lines: [*lines, b"YWI= 99999999999"], "line 263 has the rank 99999999999"),
        (lambda lines: [*lines, b"YWI= " + b"9" * 5000], "line 263 has the rank 99999999999999999999"),
        (lambda lines: [*lines, b"YWI= x"], "line 263 is not a token"),
        (lambda lines: [], "holds no tokens"),
    ],
)
def test_a_damaged_vocabulary_of_tiktoken_is_one_line(ranks: Path, change, words: str) -> None:
    ranks.write_bytes(b"\n".join(change(ranks.read_bytes().splitlines())))
    with pytest.raises(UserError, match=words):
        read_ranks(ranks)
