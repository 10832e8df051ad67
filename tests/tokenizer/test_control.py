"""Users' text is plain text: which added tokens it can reach, for every kind of model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from koine.errors import UserError
from koine.tokenizer import Tokenizer, load_tokenizer
from koine.tokenizer.control import looks_like_marker
from koine.tokenizer.loaders import open_tokenizer

ENGLISH = ["The river runs to the sea   and the sea is wide.", "Nine lamps burn on the quay until nine."] * 30
MARKERS = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "[PLAN]")
SPACES = tuple(" " * count for count in range(8, 1, -1))


def save(backend: Backend, folder: Path, **config: object) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    return load_tokenizer(folder)


def byte_level(*, ignore_merges: bool = False) -> Backend:
    """A byte-level vocabulary without special tokens."""
    backend = Backend(models.BPE(ignore_merges=ignore_merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(ENGLISH, trainer)
    return backend


@pytest.fixture
def layout(tmp_path: Path) -> Tokenizer:
    """Added tokens as Qwen's and GPT-NeoX's: special tokens, markers that are not special, spaces, words."""
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    backend.add_tokens([AddedToken(one, special=False, normalized=False) for one in MARKERS])
    words = [*SPACES, "Skagerrak", "|||EMAIL|||", "<table>", "..."]
    backend.add_tokens([AddedToken(one, special=False, normalized=True) for one in words])
    return save(backend, tmp_path / "layout")


@pytest.mark.parametrize("marker", [*MARKERS, "<|end|>"])
def test_markers_in_plain_text_are_text_whatever_their_flag(
    layout: Tokenizer, tmp_path: Path, marker: str
) -> None:
    text = f"a {marker} b"
    token = layout.vocabulary()[marker]
    opened = open_tokenizer(tmp_path / "layout")
    for ids in (layout.encode(text), layout.encode_batch([text])[0], opened.encode_batch([text])[0]):
        assert token not in ids
    assert layout.decode(layout.encode(text)) == text
    # a marker that is not special is shown where the model writes it, as the file says
    assert layout.decode([token]) == ("" if marker == "<|end|>" else marker)
    assert layout.token_bytes(token) == (b"" if marker == "<|end|>" else marker.encode())


@pytest.mark.parametrize(
    "text",
    [
        "the    river  runs",
        "to Skagerrak and back...",
        "write |||EMAIL||| <table>",
        "plain words",
        "x < y > z [1",
    ],
)
def test_words_spaces_and_html_among_the_added_tokens_are_read_as_transformers_does(
    layout: Tokenizer, tmp_path: Path, text: str
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "layout")
    assert layout.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_what_looks_like_a_marker() -> None:
    yes = [
        "<s>",
        "</s>",
        "<|im_start|>",
        "<tool_call>",
        "[INST]",
        "[/INST]",
        "<｜User｜>",
        "▁<PRE>",
        "{sys}",
        "<think>\n",
    ]
    no = ["  ", "\n\n", "word", "<table>", "</h1>", "[]", "{}", "<", "|||EMAIL|||", "<a b> c <d>", "...", "ö"]
    assert [one for one in yes if not looks_like_marker(one)] == []
    assert [one for one in no if looks_like_marker(one)] == []


def unigram() -> Backend:
    pieces = [("<unk>", 0.0), ("<|end|>", 0.0), ("[PLAN]", -1.0), ("▁", -3.0)]
    pieces += [(one, -5.0) for one in "<|end>[PLAN]abc"]
    backend = Backend(models.Unigram(list(dict(pieces).items()), unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


def word_level() -> Backend:
    backend = Backend(models.WordLevel({"<|end|>": 0, "[PLAN]": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def whole_words() -> Backend:
    """BPE with `ignore_merges`, with markers in its vocabulary and no cuts inside them."""
    content = json.loads(byte_level(ignore_merges=True).to_str())
    content["model"]["vocab"] |= {"<|end|>": 1000, "[PLAN]": 1001}
    backend = Backend.from_str(json.dumps(content))
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), spelled])
    return backend


@pytest.mark.parametrize("make", [unigram, word_level, whole_words])
@pytest.mark.parametrize("marker", ["<|end|>", "[PLAN]"])
def test_a_model_that_holds_markers_does_not_find_them_in_text(tmp_path: Path, make, marker: str) -> None:
    """The library's flag covers only the added tokens; the model's vocabulary would still find them."""
    backend = make()
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens([AddedToken("[PLAN]", special=False)])
    tokenizer = save(backend, tmp_path)
    token = tokenizer.vocabulary()[marker]
    backend.encode_special_tokens = True
    assert token in backend.encode(f"a {marker} a").ids  # what would happen
    for ids in (tokenizer.encode(f"a {marker} a"), tokenizer.encode_batch([f"a {marker} a"])[0]):
        assert token not in ids
        assert ids
    assert tokenizer.encode("a a") == backend.encode("a a").ids


def test_text_that_the_vocabulary_cannot_read_is_a_user_error(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"<|end|>": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = save(backend, tmp_path)
    with pytest.raises(UserError, match="cannot read the text"):
        tokenizer.encode("b")
    with pytest.raises(UserError, match="cannot read the text"):
        open_tokenizer(tmp_path).encode_batch(["b"])
