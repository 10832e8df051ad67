"""The profile of two models: one of ours, one of transformers; the page, its figures, the user's own text."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.errors import UserError
from koine.files import read_json
from koine.model import Decoder, preset, save_model
from koine.plan.loading import make_plan
from koine.plan.report.blocks import read_step_report
from koine.recipes import run_plan
from koine.recipes.profile import model_names, profile
from koine.steps.profile_report import fewest_bits, percent, profile_blocks
from koine.steps.profile_text import about_text, own_profile_text, read_profile_texts
from koine.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of ours and a random GPT-NeoX of transformers, whose name has a dot, with one tokenizer."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    root = tmp_path_factory.mktemp("models")
    words = [f"the river and the hill and {n} stones" for n in range(200)]
    tokenizer = train_tokenizer({"en": lambda: words}, vocab_size=300, english_share=None, min_frequency=1)
    found = {name: root / name for name in ("ours", "neox-0.1b")}
    for folder in found.values():
        folder.mkdir()
        tokenizer.save(folder)
    torch.manual_seed(0)
    save_model(Decoder(replace(preset("koine-0.5m", 300), max_position_embeddings=256)), found["ours"])
    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(found["neox-0.1b"])
    return found


@pytest.fixture(scope="module")
def run(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run_plan(
            "profile",
            out=tmp_path_factory.mktemp("runs") / "profile",
            threads=1,
            model=tuple(models.values()),
            languages=("en", "hi", "sw"),
            documents=6,
            scored_documents=3,
            lengths=(64, 512),
            repeats=2,
            dtype="float32",
        )
    return result.folder


def test_the_page_answers_for_both_models(run: Path, models: dict[str, Path]) -> None:
    report = read_step_report(run / "page" / "report.json")
    verdict, *blocks = report.blocks
    assert verdict["kind"] == "verdict"
    assert verdict["title"] == "how well do ours and neox-0.1b serve 3 languages?"
    assert verdict["text"].startswith("Fewest bits for the same text: ")
    assert "ours. Not at all (3): " in verdict["text"]
    assert "neox-0.1b. Not at all (3): " in verdict["text"]
    tables = {block["title"]: block for block in blocks if block["kind"] == "table"}
    assert list(tables) == [
        "Side by side",
        "ours",
        "neox-0.1b",
        "Scripts: what the tokenizer splits",
        "KV cache and speed by context length",
    ]
    assert tables["ours"]["rows"][0][0] == "English (en)"
    assert "unknown text" not in tables["ours"]["columns"]
    page = (run / "report.html").read_text(encoding="utf-8")
    for word in ("English", "Hindi", "Swahili", "Devanagari", "beyond the model&#39;s context of 128 tokens"):
        assert word in page


def test_the_figures_are_exported(run: Path, models: dict[str, Path]) -> None:
    results = read_json(run / "results.json")
    assert results["models"].keys() == models.keys()
    ours = results["models"]["ours"]
    assert ours["languages"].keys() == {"en", "hi", "sw"}
    assert ours["model"]["context_length"] == 256
    parameters = sum(p.numel() for p in Decoder(preset("koine-0.5m", 300)).parameters())
    assert ours["model"]["parameters"] == parameters
    assert results["models"]["neox-0.1b"]["model"]["architecture"] == "GPTNeoXForCausalLM"
    speed = results["speed"]["models"]
    measured = {name: [(one["tokens"], one["runs"]) for one in found] for name, found in speed.items()}
    assert measured == {name: [(64, 2), (512, 0)] for name in models}
    # Keys and values of one layer, two heads of 8, in float32.
    assert speed["neox-0.1b"][0]["cache_bytes"] == 2 * 2 * 8 * 4 * 64
    assert results["speed"]["conditions"]["dtype"] == "float32"
    assert ours["text"]["scored_documents"] == 3 * (2 + 2)


def test_nothing_runs_beside_the_measurement_of_speed(models: dict[str, Path], tmp_path: Path) -> None:
    plan = make_plan(profile, {"model": tuple(models.values())}, runs=tmp_path)
    languages = {name for name in plan.nodes if name.startswith("languages/")}
    assert len(languages) == 2
    assert languages <= set(plan.nodes["speed"].parents)
    assert plan.threads_of("speed") == plan.threads


def rows(bits: list[float]) -> dict[str, Any]:
    return {"document_bits": bits}


def test_fewest_bits_needs_a_clear_difference() -> None:
    clear = {"a": rows([10.0, 20.0, 30.0]), "b": rows([20.0, 40.0, 60.0])}
    assert fewest_bits(clear) == ("a", "a, by 50 % (50–50)")
    unclear = (None, "no clear difference")
    assert fewest_bits({"a": rows([10.0, 30.0]), "b": rows([30.0, 11.0])}) == unclear
    assert fewest_bits({"a": rows([10.0]), "b": rows([20.0])}) == unclear


def test_small_shares_are_not_shown_as_none() -> None:
    shares = (None, 0.0, 0.00041, 0.004, 0.41)
    assert [percent(share) for share in shares] == [None, "0 %", "0.04 %", "0.4 %", "41 %"]


def test_text_that_is_not_parallel_has_no_columns_against_english(run: Path) -> None:
    results = read_json(run / "results.json")
    one = results["models"]["ours"]
    for row in one["languages"].values():
        for name in ("relative_bits", "relative_tokens", "bits_per_english_byte"):
            row[name] = None
        row["level"] = "not comparable"
    blocks = profile_blocks({"ours": one}, results["speed"])
    assert "No verdict, because the text is not parallel (3)" in blocks[0]["text"]
    (table,) = [block for block in blocks if block.get("title") == "Language by language"]
    assert not [column for column in table["columns"] if "English" in column]
    assert blocks[1]["title"] == "Bits per byte"


def test_models_have_the_names_of_their_folders(tmp_path: Path) -> None:
    a, b, other = tmp_path / "a" / "step", tmp_path / "b" / "step", tmp_path / "c-1.5b"
    assert model_names([a, b, other]) == {"a-step": a, "b-step": b, "c-1.5b": other}
    with pytest.raises(UserError, match="two models have the name"):
        model_names([a, a])
    with pytest.raises(UserError, match="no model is given"):
        model_names([])


def own_text(data: Path, out: Path, **changed: Any) -> None:
    out.mkdir()
    given: dict[str, Any] = {
        "fields": (),
        "languages": (),
        "parallel": False,
        "documents": 10,
        "scored_documents": 2,
        "max_document_bytes": 12,
        "max_bytes_per_language": 1_000,
        "max_bad_share": 0.0,
    }
    own_profile_text(data, **{**given, **changed}, out=out)


def test_texts_by_language_in_one_record_are_parallel(tmp_path: Path) -> None:
    texts_of = [{"en": f"the house number {n}", "de": f"das Haus Nummer {n}"} for n in range(4)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"translation": one}) + "\n" for one in texts_of))
    own_text(path, tmp_path / "out")
    texts = read_profile_texts(tmp_path / "out")
    assert about_text(tmp_path / "out")["parallel"] is True
    scored = {
        code: [one.parallel_id for one in texts if one.language == code and one.scored]
        for code in ("en", "de")
    }
    assert scored["en"] == scored["de"]
    assert len(scored["en"]) == 2
    # Parallel documents stay whole.
    assert {one.text for one in texts if one.language == "de"} == {f"das Haus Nummer {n}" for n in range(4)}


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    content = [
        {"id": f"{n}", "text": f"document {code} number {n}", "language": code}
        for code in ("en", "de", "hi")
        for n in range(5)
    ]
    content += [{"id": "9", "text": "only in English, and long", "language": "en"}]
    path.write_text("".join(json.dumps(one) + "\n" for one in content), encoding="utf-8")
    return path


def test_other_text_is_cut_and_not_parallel(records: Path, tmp_path: Path) -> None:
    own_text(records, tmp_path / "out", languages=("en", "deu"))
    texts = read_profile_texts(tmp_path / "out")
    assert {one.language for one in texts} == {"en", "de"}
    assert {len(one.text) for one in texts} == {12}
    assert {one.parallel_id for one in texts} == {None}
    assert sum(one.scored for one in texts) == 4


def test_records_of_one_id_can_be_declared_parallel(records: Path, tmp_path: Path) -> None:
    own_text(records, tmp_path / "out", parallel=True, scored_documents=100)
    texts = read_profile_texts(tmp_path / "out")
    scored = {
        code: {one.parallel_id for one in texts if one.language == code and one.scored}
        for code in ("en", "hi")
    }
    assert scored["en"] == scored["hi"] == {f"{n}" for n in range(5)}


def test_ids_that_no_other_language_has_are_no_parallel_text(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    content = [
        {"id": f"{code}-{n}", "text": "some text", "language": code}
        for code in ("en", "de")
        for n in range(3)
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in content))
    with pytest.raises(UserError, match="no id is in all of de, en"):
        own_text(path, tmp_path / "out", parallel=True)


def test_text_without_languages_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "some text"}) + "\n")
    with pytest.raises(UserError, match="no record has text and a language"):
        own_text(path, tmp_path / "out")
