"""Training: weights by hand, sampling, determinism, impossible sizes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

from koine.errors import KoineWarning, UserError
from koine.tokenizer import SPECIAL_TOKENS, language_weights, train_tokenizer
from koine.tokenizer.corpus_sampling import count_bytes, draw, quotas
from koine.tokenizer.pretoken_counts import PretokenCounts

SIZES = {"de": 100, "nl": 300, "ja": 1200}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # shares 1/16, 3/16, 12/16; German and Dutch share a bucket, so theirs are halved: 1 : 3 : 24
        ({"scheme": "bucketed"}, {"de": 1 / 28, "nl": 3 / 28, "ja": 24 / 28}),
        # wb = (4/16)/2, (4/16)/2, 12/16: 1 : 3 : 72
        ({"scheme": "bucketed", "bucket_mass": "data"}, {"de": 1 / 76, "nl": 3 / 76, "ja": 72 / 76}),
        ({"scheme": "natural"}, {"de": 1 / 16, "nl": 3 / 16, "ja": 12 / 16}),
        ({"scheme": "uniform"}, {"de": 1 / 3, "nl": 1 / 3, "ja": 1 / 3}),
        ({"scheme": "temperature", "temperature": 1.0}, {"de": 1 / 16, "nl": 3 / 16, "ja": 12 / 16}),
    ],
)
def test_weights_are_those_of_the_formula(options: dict, expected: dict[str, float]) -> None:
    assert language_weights(SIZES, **options) == pytest.approx(expected, rel=1e-12)


def test_english_gets_its_share_and_the_others_keep_their_proportions() -> None:
    free = language_weights({**SIZES, "en": 7}, english_share=None)
    pinned = language_weights({**SIZES, "en": 7}, english_share=0.3)
    assert pinned["en"] == 0.3
    assert sum(pinned.values()) == pytest.approx(1.0)
    assert pinned["nl"] / pinned["ja"] == pytest.approx(free["nl"] / free["ja"])
    assert language_weights({"en": 5}) == {"en": 1.0}


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        ({}, {}, "no language"),
        ({"de": 0}, {}, "'de' has no text"),
        ({"de": 5}, {"scheme": "bucketted"}, "bucketed"),
        ({"de": 5}, {"bucket_mass": "date"}, "data"),
        ({"de": 5}, {"english_share": 1.0}, "between 0 and 1"),
        ({"de": 5}, {"scheme": "temperature", "temperature": 0.0}, "greater than 0"),
        ({"xq": 5}, {}, "xq"),
    ],
)
def test_impossible_weights_are_user_errors(sizes: dict[str, int], options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        language_weights(sizes, **options)


def test_the_sample_has_the_weights_and_repetition_warns() -> None:
    texts = {"de": [f"Satz {i}" * (i % 7 + 1) for i in range(400)], "ja": ["東京"] * 10}
    corpus = {code: (lambda part=part: part) for code, part in texts.items()}
    sizes = count_bytes(corpus)
    with pytest.warns(KoineWarning, match=r"ja 10\.0 times .the limit; its share is"):
        quota = quotas(sizes, {"de": 0.5, "ja": 0.5}, sample_bytes=4000, max_repeats=10)
    drawn = Counter()
    for text, times in draw(corpus, sizes=sizes, quota=quota, seed=0):
        drawn["ja" if text == "東京" else "de"] += times * len(text.encode())
    assert drawn["ja"] == 600  # ten times all there is
    assert drawn["de"] == pytest.approx(2000, abs=60)  # the longest text has 56 bytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quotas(sizes, {"de": 0.99, "ja": 0.01}, sample_bytes=4000, max_repeats=10)


def test_a_stream_of_pairs_draws_what_a_mapping_draws() -> None:
    texts = {"de": [f"Satz {i}" for i in range(50)], "fr": [f"phrase {i}" for i in range(50)]}
    mapping = {code: (lambda part=part: part) for code, part in texts.items()}
    mixed = [(code, texts[code][i]) for i in range(50) for code in texts]
    sizes = count_bytes(mapping)
    quota = {"de": sizes["de"] * 0.4, "fr": sizes["fr"] * 1.7}
    one = sorted(draw(mapping, sizes=sizes, quota=quota, seed=3))
    assert one == sorted(draw(lambda: mixed, sizes=sizes, quota=quota, seed=3))
    assert one != sorted(draw(mapping, sizes=sizes, quota=quota, seed=4))


SCRIPT = """
import random
from koine.tokenizer import train_tokenizer
generator = random.Random(0)
texts = [" ".join(generator.choice(["ab", "ba", "abba", "čeština", "東京"]) for _ in range(30)) for _ in range(300)]
print(train_tokenizer({"cs": lambda: texts}, vocab_size=330, min_frequency=2).fingerprint)
"""


def test_the_same_text_gives_the_same_file_in_any_process() -> None:
    prints = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "4"))
    }
    assert len(prints) == 1


def test_a_vocabulary_smaller_than_the_alphabet_is_refused() -> None:
    smallest = 256 + len(SPECIAL_TOKENS)
    with pytest.raises(UserError, match=f"at least {smallest}"):
        train_tokenizer({"de": lambda: ["ja"]}, vocab_size=smallest - 1)
    assert train_tokenizer({"de": lambda: ["ja"]}, vocab_size=smallest).vocab_size == smallest


def test_too_little_text_for_the_vocabulary_warns() -> None:
    with pytest.warns(KoineWarning, match="gives a vocabulary of"):
        train_tokenizer({"de": lambda: ["ja ja ja"]}, vocab_size=1000, min_frequency=1)


def test_a_lone_surrogate_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"language 'de'.*surrogate"):
        train_tokenizer({"de": lambda: ["a\ud800"]}, vocab_size=400)


def test_scaled_counts_of_a_long_text_warn() -> None:
    from koine.tokenizer.pretoken_counts import PretokenCounts
    from koine.tokenizer.training import _warn_of_approximations

    with pytest.warns(
        KoineWarning, match=r"3 occurrences .* \(1.50% of all\); all counts were scaled by 0.25"
    ):
        _warn_of_approximations(PretokenCounts({"a": 197}, occurrences=200, dropped=3, dropped_below=1), 0.25)


def test_temperature_is_a_root_of_the_share() -> None:
    """Shares 1/9 and 8/9 at T = 3: the cube roots are 1 to 2."""
    weights = language_weights({"de": 1, "fr": 8}, scheme="temperature", temperature=3.0)
    assert weights == pytest.approx({"de": 1 / 3, "fr": 2 / 3})


def test_the_smallest_frequency_is_scaled_with_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten of twenty million occurrences are fed: a minimum of 40 becomes 20."""
    from koine.tokenizer import training

    monkeypatch.setattr(training, "feeding_scale", lambda table: 0.5)
    sizes = {}
    for word, count in (("ab", 40), ("cd", 36)):
        backend = training._empty_backend()
        table = PretokenCounts({word: count}, occurrences=count)
        training.learn_from_table(backend, table, vocab_size=400, min_frequency=40, show_progress=False)
        sizes[word] = word in backend.get_vocab()
    assert sizes == {"ab": True, "cd": False}
