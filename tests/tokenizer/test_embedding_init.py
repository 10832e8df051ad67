"""Closed forms of what a new vocabulary starts from, and of the predictor: small numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from koine.errors import KoineWarning
from koine.tokenizer import Tokenizer, language_weights
from koine.tokenizer.corpus_sampling import draw, quotas
from koine.tokenizer.embedding_init import auxiliary_vectors, initialise_rows, sparsemax
from koine.tokenizer.extend import _missing_characters
from koine.tokenizer.holdout import split_texts
from koine.tokenizer.measures import MeasuredText, measure
from koine.tokenizer.predict import predict_costs
from koine.tokenizer.pretoken_counts import PretokenCounts, feeding_scale, repeated
from koine.tokenizer.token_bytes import scored_lengths
from koine.tokenizer.vocabulary_match import VocabularyMatch, match_vocabularies


class Letters:
    """A tokenizer of single letters; `pairs` are tokens too, and what it lacks is unknown."""

    def __init__(self, letters: str, *, dear: str = "", twice: str = "") -> None:
        self.pieces = [*letters, *twice]
        self.vocab_size = len(self.pieces)
        self.unknown_id: int | None = None
        self._dear = dear

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """A letter of `dear` takes three tokens."""
        return [
            [self.pieces.index(one) for one in text for _ in range(3 if one in self._dear else 1)]
            for text in texts
        ]

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id].encode()

    def unknown_bytes(self, texts: list[str]) -> list[int]:
        return [0] * len(texts)


def test_the_dearest_language_has_long_sequences_and_letters_never_seen() -> None:
    """Ranks of two measures, averaged: of tokens per byte upwards, of the overlap of letters *downwards*."""
    tokenizer = Letters("abcdefgh", dear="dh")
    texts = {"en": ["aabbcc"], "nl": ["aabc"], "fi": ["aadd"], "hu": ["efeh"]}
    found = {one.language: one for one in predict_costs(tokenizer, texts, primary=["en"])}
    assert {code: one.tokens_per_byte for code, one in found.items()} == {"nl": 1.0, "fi": 2.0, "hu": 1.5}
    assert {code: one.script_overlap for code, one in found.items()} == {"nl": 1.0, "fi": 0.5, "hu": 0.0}
    # ranks of the rate 0, 1, 1/2; of the overlap, least first: nl 0, fi 1/2, hu 1
    assert {code: one.cost for code, one in found.items()} == {"nl": 0.0, "fi": 0.75, "hu": 0.75}
    # with equal lengths only the letters count
    same = predict_costs(Letters("abcdefgh"), texts, primary=["en"])
    assert [(one.language, one.cost) for one in same] == [("hu", 0.75), ("fi", 0.5), ("nl", 0.25)]


def test_a_letter_met_once_in_a_million_is_not_seen() -> None:
    texts = {"en": ["a" * 300_000 + "e"], "hu": ["e"], "fi": ["a"]}
    found = {one.language: one for one in predict_costs(Letters("abcdefgh"), texts, primary=["en"])}
    assert (found["hu"].script_overlap, found["fi"].script_overlap) == (0.0, 1.0)
    texts["en"] = ["a" * 30_000 + "e"]
    found = {one.language: one for one in predict_costs(Letters("abcdefgh"), texts, primary=["en"])}
    assert found["hu"].script_overlap == 1.0


def test_temperature_is_the_root_of_the_share() -> None:
    """Shares 1/9 and 8/9 at T = 3: the cube roots are as 1 to 2."""
    weights = language_weights({"de": 1, "fr": 8}, scheme="temperature", temperature=3.0)
    assert weights == pytest.approx({"de": 1 / 3, "fr": 2 / 3})


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


def test_sparsemax_of_two_and_three() -> None:
    """Martins and Astudillo 2016: of (a, b) with a - b < 1, ((1 + a - b) / 2, (1 + b - a) / 2); of a lead of 1 or more, (1, 0)."""
    scores = torch.tensor([[0.6, 0.2], [1.5, 0.0], [0.0, 0.0], [1.0, 0.0]])
    want = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    torch.testing.assert_close(sparsemax(scores), want)
    # three: the support is the two largest; threshold (0.9 + 0.7 - 1) / 2 = 0.3
    torch.testing.assert_close(sparsemax(torch.tensor([[0.9, 0.7, 0.1]])), torch.tensor([[0.6, 0.4, 0.0]]))


MATCH = VocabularyMatch(shared={0: 1}, pieces={1: (0, 1), 2: (2,)}, dropped=(), new_size=4, old_size=3)
OLD = torch.tensor([[1.0, 0.0], [3.0, 2.0], [8.0, 4.0], [1e6, 1e6]])  # the last row is padding


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("mean", [[3.0, 2.0], [4.0, 2.0], [4.0, 2.0], [4.0, 2.0]]),
        ("subword-mean", [[3.0, 2.0], [2.0, 1.0], [8.0, 4.0], [4.0, 2.0]]),
    ],
)
def test_rows_are_means_of_the_old_ones_without_padding(method: str, rows: list[list[float]]) -> None:
    found = initialise_rows(OLD, MATCH, method=method, generator=torch.Generator())  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(rows))


def test_random_rows_are_as_wide_as_the_old_ones() -> None:
    """Standard deviation of ten thousand draws: within 3 % (six standard errors) of the old rows' own."""
    old = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * 0.02
    match = VocabularyMatch(shared={}, pieces={}, dropped=(), new_size=400, old_size=200)
    new = initialise_rows(old, match, method="random", generator=torch.Generator().manual_seed(1))
    assert float(new.std()) == pytest.approx(float(old.std()), rel=0.03)


def test_focus_mixes_the_tokens_that_are_used_alike() -> None:
    """New token 1 is used exactly as shared token 0, and at a right angle to shared token 2."""
    match = VocabularyMatch(shared={0: 1, 2: 2}, pieces={1: (0,)}, dropped=(), new_size=3, old_size=3)
    vectors = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    new = initialise_rows(OLD, match, method="focus", generator=torch.Generator(), auxiliary=vectors)
    torch.testing.assert_close(new[1], OLD[1])
    # halfway between both: sparsemax of (0.7071, 0.7071) is one half each
    vectors[1] = torch.tensor([1.0, 1.0])
    new = initialise_rows(OLD, match, method="focus", generator=torch.Generator(), auxiliary=vectors)
    torch.testing.assert_close(new[1], (OLD[1] + OLD[2]) / 2)


def test_auxiliary_vectors_are_the_root_of_the_mutual_information() -> None:
    """0 stands beside 1 and 2 beside 3 only: PPMI is log 4 (a quarter of all pairs, against a sixteenth) and each vector's square is a singular value's share."""
    vectors = auxiliary_vectors([[0, 1], [2, 3]] * 5, 5, size=4, context=1)
    gram = (vectors @ vectors.t()).numpy()
    # the matrix is symmetric with singular values log 4: U S U^T has log 4 on the diagonal and nothing for token 4
    np.testing.assert_allclose(np.diag(gram), [math.log(4)] * 4 + [0.0], atol=1e-4)


def test_tokens_that_stand_twice_are_matched_in_order_and_parts_by_role() -> None:
    old, new = Letters("ab", twice="a"), Letters("a", twice="a")
    match = match_vocabularies(old, new, old_special={}, new_special={}, parts=[(5, 1), (0, 1)])
    assert match.shared == {0: 0, 1: 2, 5: 1}
    lone = match_vocabularies(Letters("ab"), Letters("a", twice="ab"), old_special={}, new_special={})
    assert lone.shared == {0: 0, 1: 0, 2: 1}
    assert lone.dropped == ()


def test_scales_of_long_text() -> None:
    """The fewest of: no scale, the most occurrences, and 2^31 - 1 pairs."""
    table = PretokenCounts({"ab": 60, "c": 40}, occurrences=100)
    assert feeding_scale(table) == 1.0
    assert feeding_scale(table, most=25) == 0.25
    pairs = PretokenCounts({"abcde": 2**31}, occurrences=1)
    assert feeding_scale(pairs) == pytest.approx(1 / 4)
    # rare words keep their weight together: a thousand of one occurrence each at a tenth are about a hundred
    rare = PretokenCounts({f"w{number}": 1 for number in range(1000)}, occurrences=1000)
    assert sum(len(text.split()) for text in repeated(rare, 0.1)) == pytest.approx(100, abs=30)


def test_rare_pretokens_leave_by_doubling_thresholds() -> None:
    table = PretokenCounts()
    table.add({f"w{count}": count for count in range(1, 9)}, 1, most=5)
    # more than 5 entries: those up to 1, then up to 2, then up to 4 leave (3 would do)
    assert table.counts == {"w5": 5, "w6": 6, "w7": 7, "w8": 8}
    assert (table.dropped, table.dropped_below, table.occurrences) == (10, 4, 36)


def test_a_share_of_texts_is_drawn_by_a_credit_that_passes_random_thresholds() -> None:
    """The published sequence of PCG64 for this seed and language, worked through by hand: a debt is carried, not forgotten."""
    import hashlib

    rate, lengths = 0.4, [3, 10, 4, 8, 5, 9, 2, 7, 6, 1] * 20
    digest = hashlib.blake2b(b"5/de", digest_size=8).digest()
    thresholds = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big"))).random(1024).tolist()
    credit, want = 0.0, []
    for length in lengths:
        credit += rate * length
        taken = credit > thresholds.pop() * length
        credit -= length * taken
        want.append(int(taken))
    corpus = {"de": lambda: ["x" * length for length in lengths]}
    total = sum(lengths)
    pairs = list(draw(corpus, sizes={"de": total}, quota={"de": rate * total}, seed=5))
    assert [len(text) for text, _ in pairs] == [
        length for length, taken in zip(lengths, want, strict=True) if taken
    ]
    # error diffusion: within one text of the quota, where independent draws would be off by several
    assert sum(len(text) for text, _ in pairs) == pytest.approx(rate * total, abs=max(lengths))


def test_a_part_of_a_character_is_spelled_by_the_first_token_of_each_byte() -> None:
    """Byte-fallback vocabularies hold some bytes twice; the spelling of a part takes the first."""

    class Bytes(Letters):
        def __init__(self, pieces: list[bytes]) -> None:
            super().__init__("")
            self.data = pieces
            self.vocab_size = len(pieces)

        def token_bytes(self, token_id: int) -> bytes:
            return self.data[token_id]

    old = Bytes([b"\xe0", b"\xb8", b"\xe0", b"\xb8"])
    match = match_vocabularies(old, Bytes([b"\xe0\xb8", b"\xe0\xb9"]), old_special={}, new_special={})
    assert match.pieces == {0: (0, 1)}
    assert match.unspelled == (1,)


def test_the_smallest_frequency_is_scaled_with_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million occurrences are fed of twenty: what must occur 40 times must then occur 20 times."""
    from koine.tokenizer import training

    monkeypatch.setattr(training, "feeding_scale", lambda table: 0.5)
    sizes = {}
    for word, count in (("ab", 40), ("cd", 36)):
        backend = training._empty_backend()
        table = PretokenCounts({word: count}, occurrences=count)
        training.learn_from_table(backend, table, vocab_size=400, min_frequency=40, show_progress=False)
        sizes[word] = word in backend.get_vocab()
    assert sizes == {"ab": True, "cd": False}


def test_the_held_out_texts_are_every_third_from_the_second() -> None:
    def texts() -> list[tuple[str, str]]:
        return [("de", str(number)) for number in range(1, 8)] + [("fr", "only")]

    assert [text for _, text in split_texts(texts, heldout=True, every=3)()] == ["2", "5"]
    assert [text for _, text in split_texts(texts, heldout=False, every=3)()] == [
        "1",
        "3",
        "4",
        "6",
        "7",
        "only",
    ]


def test_the_most_frequent_missing_character_comes_first() -> None:
    table = PretokenCounts({"ปป": 2, "ขก": 3, "a": 9})
    assert _missing_characters(table, {"a": 0}, most=3, min_frequency=1) == ["ป", "ก", "ข"]
    assert _missing_characters(table, {"a": 0}, most=1, min_frequency=1) == ["ป"]
    assert _missing_characters(table, {"a": 0}, most=3, min_frequency=4) == ["ป"]


def test_a_language_is_drawn_beyond_its_text_up_to_the_limit() -> None:
    with pytest.warns(KoineWarning, match="read more than once"):
        drawn = quotas({"de": 100, "fr": 100}, {"de": 0.9, "fr": 0.1}, sample_bytes=400, max_repeats=3)
    assert drawn == {"de": 300, "fr": pytest.approx(40)}
