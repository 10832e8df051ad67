"""A profile's figures against the tokenizers library, the loss of transformers, and closed forms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.data.sample.parallel import parallel_texts
from koine.errors import UserError
from koine.evaluate.bootstrap import bootstrap_interval
from koine.evaluate.language_levels import NOT_AT_ALL, PARTLY, POORLY, UNKNOWN, WELL, level_of, remarks
from koine.evaluate.language_profile import (
    ProfileText,
    letter_entropy,
    profile_languages,
    scripts_of,
)
from koine.model import load_causal_lm
from koine.tokenizer import load_tokenizer, train_tokenizer
from koine.tokenizer.predict import predict_costs

CODES = ("en", "de", "hi", "sw")
SCORED = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of transformers with a byte-level tokenizer of English and German."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    texts = [one.text for one in parallel_texts(("en", "de"), 40)]
    train_tokenizer({"en": lambda: texts}, vocab_size=500, english_share=None, min_frequency=2).save(path)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=500,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.2,
        )
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def texts() -> list[ProfileText]:
    return [
        ProfileText(
            language=one.language,
            text=one.text,
            form=one.form,
            parallel_id=one.parallel_id,
            scored=one.number < SCORED,
        )
        for one in parallel_texts(CODES, 12)
    ]


@pytest.fixture(scope="module")
def rows(folder: Path, texts: list[ProfileText]) -> dict[str, Any]:
    model = load_causal_lm(folder, dtype=torch.float32)
    return profile_languages(model, load_tokenizer(folder), texts, primary=["en"])


def chosen(texts: list[ProfileText], code: str, form: str, *, scored: bool = False) -> list[str]:
    return [
        one.text for one in texts if one.language == code and one.form == form and (one.scored or not scored)
    ]


def loss_bits(folder: Path, documents: list[str]) -> list[float]:
    """Bits of each document by the loss of transformers, from the BOS token on."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    library, bos = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder).bos_id
    found = []
    for text in documents:
        ids = torch.tensor([[bos, *library.encode(text, add_special_tokens=False).ids]])
        with torch.inference_mode():
            loss = model(input_ids=ids, labels=ids).loss
        found.append(float(loss) * (ids.shape[1] - 1) / math.log(2))
    return found


@pytest.mark.parametrize(("code", "form"), [("en", "sentences"), ("hi", "sentences"), ("sw", "names")])
def test_tokens_are_those_of_the_tokenizers_library(
    folder: Path, texts: list[ProfileText], rows: dict[str, Any], code: str, form: str
) -> None:
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def tokens(of: str) -> int:
        return sum(
            len(library.encode(text, add_special_tokens=False).ids) for text in chosen(texts, of, form)
        )

    size = sum(len(text.encode()) for text in chosen(texts, code, form))
    assert rows[code]["form"] == form
    assert rows[code]["bytes_per_token"] == pytest.approx(size / tokens(code))
    assert rows[code]["relative_tokens"] == pytest.approx(tokens(code) / tokens("en"))
    assert rows[code]["unknown_share"] == 0


@pytest.mark.parametrize(("code", "form"), [("en", "sentences"), ("hi", "sentences"), ("sw", "names")])
def test_bits_are_those_of_the_loss_of_transformers(
    folder: Path, texts: list[ProfileText], rows: dict[str, Any], code: str, form: str
) -> None:
    own, english = chosen(texts, code, form, scored=True), chosen(texts, "en", form, scored=True)
    bits, reference = loss_bits(folder, own), loss_bits(folder, english)
    row = rows[code]
    assert row["documents"] == SCORED
    assert row["document_bits"] == pytest.approx(bits, rel=1e-4)
    assert row["bits_per_byte"] == pytest.approx(
        sum(bits) / sum(len(text.encode()) for text in own), rel=1e-5
    )
    assert row["relative_bits"] == pytest.approx(sum(bits) / sum(reference), rel=1e-5)
    english_bytes = [float(len(text.encode())) for text in english]
    assert row["bits_per_english_byte"] == pytest.approx(sum(bits) / sum(english_bytes), rel=1e-5)
    assert row["relative_bits_interval"] == pytest.approx(bootstrap_interval(bits, reference), rel=1e-4)
    assert row["bits_per_english_byte_interval"] == pytest.approx(
        bootstrap_interval(bits, english_bytes), rel=1e-4
    )
    of_letters = sum(len(text) for text in own) * letter_entropy(chosen(texts, code, form))
    of_tokens = sum(len(load_tokenizer(folder).encode(text)) for text in own) * math.log2(500)
    assert row["baseline_share"] == pytest.approx(sum(bits) / min(of_letters, of_tokens), rel=1e-4)


def test_costs_are_those_of_the_predictor(
    folder: Path, texts: list[ProfileText], rows: dict[str, Any]
) -> None:
    forms = {code: rows[code]["form"] for code in CODES}
    expected = predict_costs(
        load_tokenizer(folder), {code: chosen(texts, code, forms[code]) for code in CODES}, primary=["en"]
    )
    assert rows["en"]["is_primary"]
    assert rows["en"]["adaptation_cost"] is None
    found = {code: (rows[code]["adaptation_cost"], rows[code]["letters_seen"]) for code in CODES[1:]}
    assert found == {one.language: (one.cost, one.script_overlap) for one in expected}


def test_an_untrained_model_serves_nobody(rows: dict[str, Any]) -> None:
    assert {row["level"] for row in rows.values()} == {NOT_AT_ALL}
    assert rows["hi"]["split_share"] > 0.9
    assert rows["de"]["split_share"] < 0.1


def test_scripts_sum_their_languages(rows: dict[str, Any]) -> None:
    latin = [rows[code] for code in ("en", "de", "sw")]
    scripts = scripts_of(rows)
    assert scripts["Latn"]["languages"] == ["en", "de", "sw"]
    assert scripts["Latn"]["bytes_per_token"] == pytest.approx(
        sum(row["bytes"] for row in latin) / sum(row["tokens"] for row in latin)
    )
    assert scripts["Deva"]["split_share"] == pytest.approx(rows["hi"]["split_share"])


def test_text_that_is_not_parallel_is_not_compared_with_english(
    folder: Path, texts: list[ProfileText]
) -> None:
    alone = [
        ProfileText(language=one.language, text=one.text, scored=one.scored)
        for one in texts
        if one.form == "sentences"
    ]
    model = load_causal_lm(folder, dtype=torch.float32)
    found = profile_languages(model, load_tokenizer(folder), alone, primary=["en"])
    assert {row["relative_bits"] for row in found.values()} == {None}
    assert {row["relative_tokens"] for row in found.values()} == {None}
    assert found["de"]["bits_per_byte"] > 0


def test_no_text_is_an_error(folder: Path) -> None:
    model = load_causal_lm(folder, dtype=torch.float32)
    with pytest.raises(UserError, match="no text to score"):
        profile_languages(model, load_tokenizer(folder), [])


def test_letter_entropy_of_equal_letters_is_their_logarithm() -> None:
    assert letter_entropy(["abcd", "dcba"]) == pytest.approx(2.0)
    assert letter_entropy(["aaab"]) == pytest.approx(-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25))


@pytest.mark.parametrize(
    ("changed", "level"),
    [
        ({"relative_bits": 1.6}, WELL),
        ({"relative_bits": 1.61}, PARTLY),
        ({"relative_bits": 1.2, "baseline_share": 0.51}, PARTLY),
        ({"relative_bits": 2.0, "baseline_share": 0.75}, PARTLY),
        ({"relative_bits": 2.01}, POORLY),
        ({"relative_bits": 1.2, "baseline_share": 0.76}, POORLY),
        ({"relative_bits": None}, UNKNOWN),
        ({"relative_bits": 1.0, "unknown_share": 0.01}, NOT_AT_ALL),
        ({"relative_bits": 1.0, "baseline_share": 1.0}, NOT_AT_ALL),
        ({"relative_bits": None, "baseline_share": 1.2}, NOT_AT_ALL),
    ],
)
def test_levels_follow_from_the_figures(changed: dict[str, Any], level: str) -> None:
    assert level_of({"unknown_share": 0.0, "baseline_share": 0.4, **changed}) == level


def test_remarks_name_what_a_level_does_not_say() -> None:
    row = {"unknown_share": 0.2, "baseline_share": 0.4, "split_share": 0.9, "relative_tokens": 3.14}
    assert remarks(row) == [
        "20 % of the text is unknown to the tokenizer",
        "90 % of letters are split",
        "3.1 × the tokens",
    ]
    assert remarks({**row, "unknown_share": 0.0, "split_share": 0.1, "relative_tokens": 1.2}) == []
