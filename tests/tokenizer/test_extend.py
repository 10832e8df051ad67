"""Extended tokenizers: ids and merges stay, new merges come after them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from koine import __version__
from koine.errors import KoineWarning, UserError
from koine.tokenizer import Tokenizer, extend_tokenizer, load_tokenizer
from koine.tokenizer.extend import _missing_characters
from koine.tokenizer.pretoken_counts import PretokenCounts

from .test_control import byte_level, save

KOREAN = [f"서울은 대한민국의 수도이다. {i}" for i in range(100)]


@pytest.fixture
def base(small: Tokenizer, tmp_path: Path) -> Path:
    small.save(tmp_path / "base")
    return tmp_path / "base"


def test_old_ids_and_merges_stay_and_new_text_is_shorter(small: Tokenizer, base: Path) -> None:
    extended = extend_tokenizer(base, ((text, 1) for text in KOREAN), new_tokens=30)
    new = extended.tokenizer
    assert extended.added_tokens == 30
    assert new.vocab_size == small.vocab_size + 30
    assert {token: new.vocabulary()[token] for token in small.vocabulary()} == small.vocabulary()
    old_merges = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert json.loads(new._files["tokenizer.json"])["model"]["merges"][: len(old_merges)] == old_merges
    text = "서울은 대한민국의 수도이다."
    assert len(new.encode(text)) < 0.6 * len(small.encode(text))
    assert new.decode(new.encode(text)) == text
    # text in which no new merge occurs is cut as before
    assert new.encode("NASA's map says 37") == small.encode("NASA's map says 37")


def test_plain_texts_and_a_path_as_a_string_are_enough(base: Path, tmp_path: Path) -> None:
    extended = extend_tokenizer(str(base), KOREAN, new_tokens=30)
    extended.tokenizer.save(tmp_path / "longer")
    assert load_tokenizer(tmp_path / "longer").vocab_size == load_tokenizer(base).vocab_size + 30
    counted = extend_tokenizer(base, [(text, 1) for text in KOREAN], new_tokens=30)
    assert extended.tokenizer.fingerprint == counted.tokenizer.fingerprint


def test_old_merges_apply_before_new_ones(small: Tokenizer, base: Path) -> None:
    new = extend_tokenizer(base, ((text, 1) for text in KOREAN), new_tokens=30).tokenizer
    for text in KOREAN[:5]:
        old_cuts, total = {0}, 0
        for token in small.encode(text):
            total += len(small.token_bytes(token))
            old_cuts.add(total)
        new_cuts, total = set(), 0
        for token in new.encode(text):
            total += len(new.token_bytes(token))
            new_cuts.add(total)
        assert new_cuts <= old_cuts


THAI = [f"แม่น้ำไหลลงทะเล {i} ทะเลกว้างใหญ่" for i in range(100)]


@pytest.mark.parametrize("tokens", [10, 30])
def test_a_byte_fallback_vocabulary_gets_characters_and_still_decodes(metaspace: Path, tokens: int) -> None:
    """The bytes of a character cannot be merged: such a token would decode to the text `<0xE0><0xB8>`."""
    old = load_tokenizer(metaspace)
    extended = extend_tokenizer(metaspace, ((text, 1) for text in THAI), new_tokens=tokens)
    new = extended.tokenizer
    added = set(new.vocabulary()) - set(old.vocabulary())
    assert len(added) == extended.added_tokens == tokens
    assert extended.added_characters == min(tokens, len({c for c in "".join(THAI) if not c.isascii()}))
    assert not [token for token in added if "<0x" in token]
    for text in [*THAI[:3], "a ปลา b", "サ  x\n\nThe map", "The territory number 7 isn't far."]:
        assert new.decode(new.encode(text)) == text
        assert b"".join(map(new.token_bytes, new.encode(text))).decode().removeprefix(" ") == text
    assert len(new.encode(THAI[0])) < 0.8 * len(old.encode(THAI[0]))
    # words are not merged with their neighbours, though Gemma's tokenizer does not cut them
    assert not [token for token in added if "▁" in token.lstrip("▁")]
    assert new.encode("The map says 37") == old.encode("The map says 37")


def test_the_record_names_base_and_additions(small: Tokenizer, base: Path, tmp_path: Path) -> None:
    extended = extend_tokenizer(
        base, ((text, 1) for text in KOREAN), new_tokens=30, training={"languages": {"ko": 7}}
    )
    extended.tokenizer.save(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "tokenizer_training.json").read_text(encoding="utf-8"))
    assert record["extends"]["tokenizer_sha256"] == small.fingerprint
    assert record["extends"]["path"] == str(base)
    assert (record["new_tokens"], record["added_tokens"], record["languages"]) == (30, 30, {"ko": 7})
    assert record["koine"] == __version__
    assert "scheme" not in record


def test_fewer_tokens_than_requested_give_a_warning(base: Path) -> None:
    with pytest.warns(KoineWarning, match=r"the text gives \d+ tokens, not 100000"):
        extend_tokenizer(base, ((text, 1) for text in KOREAN), new_tokens=100_000)


def test_tokenizers_that_cannot_be_extended(base: Path) -> None:
    with pytest.raises(UserError, match="at least 1"):
        extend_tokenizer(base, [("a", 1)], new_tokens=0)
    with pytest.raises(UserError, match="no pair"):
        extend_tokenizer(base, [("q", 1)], new_tokens=5)
    path = base / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["pre_tokenizer"] = None
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="cuts no text"):
        extend_tokenizer(base, [("a", 1)], new_tokens=5)
    content["pre_tokenizer"] = {"type": "Whitespace"}
    content["model"]["continuing_subword_prefix"] = "##"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="marks the inside of words with '##'"):
        extend_tokenizer(base, [("a", 1)], new_tokens=5)


def _llama(backend: Backend) -> None:
    backend.add_special_tokens(
        [AddedToken(one, special=True) for one in ("<|begin|>", "<|end|>", "<|turn|>")]
    )


def _qwen(backend: Backend) -> None:
    _llama(backend)
    backend.add_tokens([AddedToken(one, special=False) for one in ("<tool_call>", "</tool_call>")])


def _neox(backend: Backend) -> None:
    backend.add_tokens([AddedToken(" " * count, normalized=True) for count in range(9, 1, -1)])
    backend.add_special_tokens(["<|end|>"])


def _sparse(backend: Backend) -> None:
    """A vocabulary with unused ids; special tokens inside it and after it."""
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    holes = {token: place if place < 200 else place + 9 for token, place in vocabulary.items()}
    content["model"]["vocab"] = {**holes, "<|end|>": 203, "<|turn|>": 900}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    content["added_tokens"] = [
        {"id": place, "content": token, "special": True, **flags}
        for token, place in (("<|end|>", 203), ("<|turn|>", 900))
    ]
    backend.__setstate__(Backend.from_str(json.dumps(content)).__getstate__())


@pytest.mark.parametrize("layout", [_llama, _qwen, _neox, _sparse])
@pytest.mark.parametrize("ignore_merges", [True, False])
def test_added_tokens_keep_their_ids_in_every_layout(layout, ignore_merges: bool, tmp_path: Path) -> None:
    """Special tokens may be only among `added_tokens`; the library renumbers those of a longer vocabulary."""
    transformers = pytest.importorskip("transformers")
    backend = byte_level(ignore_merges=ignore_merges)
    layout(backend)
    save(backend, tmp_path / "base")
    extended = extend_tokenizer(tmp_path / "base", ((text, 1) for text in THAI), new_tokens=30)
    extended.tokenizer.save(tmp_path / "longer")
    new = Backend.from_file(str(tmp_path / "longer" / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "longer")
    before, after = backend.get_vocab(with_added_tokens=True), new.get_vocab(with_added_tokens=True)
    assert {token: after[token] for token in before} == before
    assert theirs.get_vocab() == after == extended.tokenizer.vocabulary()
    assert min(after[token] for token in after.keys() - before.keys()) == max(before.values()) + 1
    assert len(after) == len(before) + 30
    for text in ["Nine  lamps    burn until nine.", "a <|end|> <|turn|> <tool_call> b"]:
        assert new.encode(text).ids == backend.encode(text).ids
        assert theirs(text, add_special_tokens=False).input_ids == new.encode(text).ids
    assert len(new.encode(THAI[0]).ids) < 0.6 * len(backend.encode(THAI[0]).ids)
    assert new.decode(new.encode(THAI[0]).ids) == THAI[0]


def test_two_tokens_of_one_id_are_refused(tmp_path: Path) -> None:
    """The library gives `<|end|>` the number of tokens as id, which another token has here."""
    content = json.loads(byte_level().to_str())
    content["model"]["vocab"] = {token: place + 3 for token, place in content["model"]["vocab"].items()}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    content["added_tokens"] = [{"id": 0, "content": "<|end|>", "special": True, **flags}]
    save(Backend.from_str(json.dumps(content)), tmp_path / "base")
    with pytest.raises(UserError, match=r"the tokens '.*' and '<\|end\|>' have one id"):
        extend_tokenizer(tmp_path / "base", ((text, 1) for text in THAI), new_tokens=5)


SCRIPT = """
import sys, warnings
from pathlib import Path
from koine.tokenizer import extend_tokenizer
warnings.simplefilter("ignore")
words = ["ปลา", "แม่น้ำ", "ทะเล", "서울", "kala", "joki", "ab", "ba"]
texts = [" ".join(words[(i * j) % 8] for j in range(1, 9)) for i in range(64)]
for base in sys.argv[1:]:
    print(extend_tokenizer(Path(base), [(text, 1) for text in texts], new_tokens=25, min_frequency=2).tokenizer.fingerprint)
"""


def test_every_process_extends_to_the_same_file(base: Path, metaspace: Path) -> None:
    """Many pairs are equally frequent; their order must not depend on a hash map."""
    prints = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(base), str(metaspace)],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "4"), ("3", "2"))
    }
    assert len(prints) == 1


def test_the_order_of_texts_does_not_matter(base: Path) -> None:
    texts = [*KOREAN, *THAI]
    one, other = (
        extend_tokenizer(base, ((text, 1) for text in order), new_tokens=30).tokenizer.fingerprint
        for order in (texts, texts[::-1])
    )
    assert one == other


def test_the_most_frequent_missing_character_comes_first() -> None:
    table = PretokenCounts({"ปป": 2, "ขก": 3, "a": 9})
    assert _missing_characters(table, {"a": 0}, most=3, min_frequency=1) == ["ป", "ก", "ข"]
    assert _missing_characters(table, {"a": 0}, most=1, min_frequency=1) == ["ป"]
    assert _missing_characters(table, {"a": 0}, most=3, min_frequency=4) == ["ป"]
