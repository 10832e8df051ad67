"""Checks of steps before a run: that what they foresee is what the steps then make, and what they refuse."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import koine.steps
from koine.combine import upcycle_bam, upcycle_btx, upcycle_nexus
from koine.errors import KoineWarning, UserError
from koine.model import Decoder, ModelConfig, preset, save_model
from koine.model.formats.config_json import read_config
from koine.plan import PlannedInput
from koine.plan.step import StepInfo
from koine.steps import checks, estimates
from koine.steps.corpora import sample_corpus
from koine.steps.corpus_files import load_roles
from koine.steps.facts import CorpusFacts, ModelFacts, TokenizerFacts, TokensFacts, corpus_facts
from koine.steps.text_mixture import TextSource, adaptation_sources
from tests.steps.worlds import CONFIG, mixture, settings, write_world

SAMPLE: dict[str, Any] = {
    "languages": ("en", "de", "zh", "sw"),
    "primary_cluster": "european",
    "primary_languages": (),
    "documents_per_language": 60,
    "questions_per_language": 30,
    "code_bytes": 20_000,
}
AWAY = PlannedInput(Path("away"), exists=False)


def planned(facts: Any) -> PlannedInput:
    return PlannedInput(Path("later"), exists=False, facts=facts)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def there(path: Path) -> PlannedInput:
    return PlannedInput(path, exists=True)


def test_every_step_that_can_be_given_something_wrong_has_a_check() -> None:
    without = set()
    for module in pkgutil.iter_modules(koine.steps.__path__, "koine.steps."):
        for name, value in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction):
            info = getattr(value, "__koine_step__", None)
            if isinstance(info, StepInfo) and info.check is None:
                without.add(name)
    assert without == {
        "compare_arms",
        "compare_domains",
        "compare_lengths",
        "compare_profiles",
        "code_domain",
    }


def test_the_sample_world_is_as_foreseen(tmp_path: Path) -> None:
    with pytest.warns(KoineWarning, match="no questions in sw"):
        found = checks.sample(**SAMPLE)
    sample_corpus(**SAMPLE, seed=0, out=tmp_path)
    roles = load_roles(tmp_path)
    assert (found.primary, found.expanded, found.chat) == (roles.primary, roles.expanded, roles.chat)
    lines = (tmp_path / "documents-heldout" / "de.jsonl").read_text(encoding="utf-8").splitlines()
    assert found.heldout_documents == len(lines)
    after = corpus_facts(there(tmp_path))
    assert after is not None
    assert replace(after, heldout_documents=found.heldout_documents, part_bytes=found.part_bytes) == found
    for part, size in after.part_bytes.items():
        assert size / 1.5 < found.part_bytes[part] < size * 1.5, part
    disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert disk / 1.5 < estimates.sample(**SAMPLE).disk_bytes < disk * 1.5


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"languages": ("en", "xx")}, "languages has 'xx', which is no language; did you mean"),
        ({"languages": ("en", "bo")}, r"languages has 'bo' \(Tibetan\), of which CLDR knows too little"),
        ({"languages": ("en", "de", "en")}, "languages names 'en' twice"),
        ({"languages": ("de", "zh", "deu")}, "languages names 'de' and 'deu', the same language, twice"),
        ({"languages": ("en", "de")}, "every language of the data is a primary one"),
        ({"languages": ("zh", "hi")}, r"no primary language \(european\) is in the data"),
        (
            {"primary_languages": ("fr",)},
            "primary_languages has fr, and languages has not; possible are: en, de",
        ),
        ({"primary_languages": ("qq",)}, "primary_languages has 'qq', which is no language"),
    ],
)
def test_languages_that_cannot_be_written_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        checks.sample(**{**SAMPLE, **changed})


def test_chats_need_a_language_with_questions() -> None:
    corpus = planned(CorpusFacts(primary=("af",), expanded=("sw",), chat=(), part_bytes={}))
    tokenizer = planned(TokenizerFacts(vocab_size=600))
    assert checks.tokens(corpus, tokenizer, part="documents") == TokensFacts(vocab_size=600)
    with pytest.raises(
        UserError, match=r"none of the languages has questions to learn chatting from \(af, sw\)"
    ):
        checks.tokens(corpus, tokenizer, part="questions/train")


def own(data: Path, **changed: Any) -> CorpusFacts | None:
    given: dict[str, Any] = {
        "fields": (),
        "languages": (),
        "max_bytes_per_language": 1000,
        "min_bytes_per_language": 100,
        "max_bad_share": 0.0,
        "primary_cluster": "none",
        "primary_languages": ("en",),
    }
    return checks.own_corpus(there(data), **{**given, **changed})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    records = [{"text": "x" * 50, "language": code} for code in ("en", "de", "de", "hi") for _ in range(4)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_users_text_is_looked_at(text: Path) -> None:
    found = own(text)
    assert found is not None
    assert (found.primary, found.expanded, found.document_bytes) == (("en",), ("de", "hi"), 50)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"languages": ("en", "sw")},
            "languages has sw, of which the data have no text; they have: de, en, hi",
        ),
        (
            {"min_bytes_per_language": 900},
            r"no language has 900 bytes of text \(by language: de 400, en 200, hi 200\)",
        ),
        (
            {"min_bytes_per_language": 2000},
            "min_bytes_per_language is 2000, and at most 1000 are taken of each",
        ),
        ({"min_bytes_per_language": 300}, r"no primary language \(en\) is in the data"),
        ({"fields": ("text",)}, "'text' is not NAME=COLUMN"),
        ({"fields": ("txt=text",)}, "unknown field 'txt'"),
        (
            {"fields": ("text=content",)},
            r"--set fields=text=COLUMN\), or allow more \(--set max_bad_share=SHARE\)",
        ),
    ],
)
def test_text_that_cannot_be_used_is_refused(text: Path, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        own(text, **changed)


def test_of_large_data_only_the_beginning_is_judged(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koine.data.preview.PREVIEW_BYTES", 60)
    assert own(text, languages=("sw",), min_bytes_per_language=900) is None


def test_a_domain_of_chats_counts_them(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    path = tmp_path / "chats.jsonl"
    given: dict[str, Any] = {"domain": "maths", "fields": (), "max_bytes": 1000, "max_bad_share": 0.0}
    path.write_text(json.dumps({"messages": turns, "language": "en"}) + "\n")
    with pytest.raises(UserError, match="the domain 'maths' has 1 documents; give more"):
        checks.domain_text(there(path), **given)
    path.write_text(path.read_text() * 2)
    found = checks.domain_text(there(path), **given)
    assert found is not None
    assert found.document_bytes == 4


def train(model: PlannedInput | None = None, **changed: Any) -> ModelFacts | None:
    given: dict[str, Any] = {
        "tokens": {"documents": planned(TokensFacts(vocab_size=600))},
        "tokenizer": planned(TokenizerFacts(vocab_size=600)),
        "mixture": mixture([TextSource(name="documents")], 2),
        "settings": settings(2),
        "config": CONFIG,
    }
    return checks.training(model, **{**given, **changed})


def test_a_new_model_is_as_foreseen(world: Path) -> None:
    found = train()
    assert found is not None
    assert found.config == read_config(world / "model")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"tokenizer": planned(TokenizerFacts(vocab_size=599))},
            "has 599 tokens, and the new model is asked to have 600",
        ),
        (
            {"tokens": {"a": planned(TokensFacts(vocab_size=601))}},
            "the tokens of 'a' have 601 ids, and the model knows 600",
        ),
        (
            {"config": replace(CONFIG, max_position_embeddings=95)},
            r"rows have 96 tokens \(sequence_length\).* at most 95",
        ),
        ({"config": None}, "a new model needs a config"),
        ({"tokenizer": None}, "a new model needs a tokenizer"),
    ],
)
def test_what_does_not_fit_a_new_model_is_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        train(**changed)


def test_a_longer_context_is_counted() -> None:
    short = replace(CONFIG, max_position_embeddings=95)
    found = train(config=short, context_length=96, rope_theta=5e4)
    assert found is not None
    assert found.config == replace(short, max_position_embeddings=96, rope_theta=5e4)


def test_languages_of_a_source_must_be_in_the_corpus() -> None:
    corpus = planned(CorpusFacts(primary=("en",), expanded=("de",), chat=(), part_bytes={}))
    sources = adaptation_sources(("sw",), 0.2)
    with pytest.raises(
        UserError, match="'adapted' names sw, and the corpus has no text of it; possible are: en, de"
    ):
        train(mixture=mixture(sources, 2), corpus=corpus)
    train(mixture=mixture(adaptation_sources((), 0.2), 2), corpus=corpus)


def test_surprises_are_said() -> None:
    with pytest.warns(KoineWarning, match="micro_batch_size is 3, and batch_size 2"):
        train(settings=settings(2, micro_batch_size=3))
    long_window = preset("koine-0.5m", 600, window=96)
    with pytest.warns(KoineWarning, match="window is 96, and rows have 96 tokens"):
        train(config=long_window)
    corpus = planned(CorpusFacts(heldout_documents=4, part_bytes={}))
    with pytest.warns(KoineWarning, match="evaluation_documents is 5, and the corpus holds out 4"):
        checks.evaluation(corpus, AWAY, documents_per_language=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.evaluation(corpus, AWAY, documents_per_language=4)


@pytest.fixture
def qwen(tmp_path: Path, world: Path) -> Path:
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt_neox", "hidden_size": 8}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((world / "model" / name).read_bytes())
    return folder


REFUSED = "is a model of type gpt_neox, .* it computes cohere, .* and not upcycled"


def test_another_architecture_is_refused_wherever_it_comes_from(qwen: Path, world: Path) -> None:
    seed, other = there(qwen), there(world / "model")
    with pytest.raises(UserError, match=f"{qwen.name}: {REFUSED}"):
        train(seed, config=None)
    with pytest.raises(UserError, match=REFUSED):
        checks.evaluation(AWAY, seed, documents_per_language=1)
    with pytest.raises(UserError, match=REFUSED):
        checks.combined(seed, {}, {}, **COMBINED)
    with pytest.raises(UserError, match=REFUSED):
        checks.combined(other, {"a": seed}, {}, **COMBINED)
    # A model that is made of it is refused too, by the folder that was given.
    moved = checks.moved(seed, other, AWAY, method="subword-mean")
    with pytest.raises(UserError, match=f"{qwen.name}: {REFUSED}"):
        train(planned(moved), config=None)


COMBINED: dict[str, Any] = {
    "method": "nexus",
    "top_k": 1,
    "attention_top_k": 0,
    "encoder": "tfidf",
    "domain_size": 4,
}


@pytest.mark.parametrize("method", ["btx", "bam", "bam-shared-kv", "nexus", "nexus-linear"])
def test_a_mixture_is_as_foreseen(world: Path, tmp_path: Path, method: str) -> None:
    import torch

    seed, experts = world / "model", {"a": world / "model", "b": world / "model"}
    given = {**COMBINED, "method": method, "top_k": 2, "attention_top_k": 2 if "bam" in method else 0}
    found = checks.combined(there(seed), {name: there(path) for name, path in experts.items()}, {}, **given)
    if method == "btx":
        upcycle_btx(seed, experts, tmp_path / "out", top_k=2)
    elif method.startswith("bam"):
        attention = "kv-experts" if method == "bam" else "shared-kv"
        upcycle_bam(seed, experts, tmp_path / "out", top_k=2, attention=attention, attention_top_k=2)
    else:
        domains = torch.randn(2, 4) if method == "nexus" else None
        upcycle_nexus(seed, experts, tmp_path / "out", top_k=2, domains=domains)
    real = read_config(tmp_path / "out")
    assert found is not None
    assert found.config is not None
    assert without_losses(found.config) == without_losses(real)
    # One expert more, and no second of the same name.
    grown = checks.grown(planned(found), there(seed), AWAY, domain="c")
    assert grown is not None
    assert grown.config is not None
    assert grown.config.mixture is not None
    assert grown.config.mixture.experts[-1] == "c"
    with pytest.raises(UserError, match="has an expert 'a' already"):
        checks.grown(planned(found), there(seed), AWAY, domain="a")


def without_losses(config: ModelConfig) -> ModelConfig:
    """Leave out the factors of router losses, which change no size."""
    assert config.mixture is not None
    return replace(config, mixture=replace(config.mixture, load_balancing=0.0, z_loss=0.0))


def test_branches_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    seed = there(world / "model")
    branches = {name: planned(None) for name in ("a", "b")}
    for changed, says in (
        ({"top_k": 3}, "top_k is 3; it must lie between 1 and the 2 experts"),
        (
            {"method": "bam", "attention_top_k": 4},
            "attention_top_k is 4; it must lie between 1 and the 3 experts",
        ),
        ({"method": "mix"}, "method is 'mix'"),
        ({"encoder": "nowhere"}, "encoder is 'nowhere'; possible are: tfidf, svd, hidden"),
    ):
        with pytest.raises(UserError, match=says):
            checks.combined(seed, branches, {}, **{**COMBINED, **changed})
    small = replace(CONFIG, hidden_size=32)
    save_model(Decoder(small), tmp_path / "small", tokenizer=world / "model")
    with pytest.raises(UserError, match="hidden_size is 32, and 64"):
        checks.combined(seed, {"a": there(tmp_path / "small")}, {}, **COMBINED)
    with pytest.warns(KoineWarning, match="attention_top_k is 1, and only bam"):
        checks.combined(seed, branches, {}, **{**COMBINED, "attention_top_k": 1})
    mixed = checks.combined(seed, branches, {}, **COMBINED)
    with pytest.raises(UserError, match="is a mixture of experts already"):
        checks.combined(planned(mixed), branches, {}, **COMBINED)
    with pytest.raises(UserError, match="is a dense model"):
        checks.grown(seed, seed, AWAY, domain="c")


def test_a_merge_is_planned_before_it_runs(world: Path, tmp_path: Path) -> None:
    model = there(world / "model")
    given: dict[str, Any] = {"method": "linear", "weights": (0.5, 0.5), "seed": 0}
    found = checks.merged([model, model], **given)
    assert found is not None
    assert found.config == read_config(model.path)
    with pytest.raises(UserError, match="3 weights for 2 models"):
        checks.merged([model, model], **{**given, "weights": (1.0, 1.0, 1.0)})
    with pytest.raises(UserError, match="ties needs the common ancestor; give --set base=MODEL"):
        checks.merged([AWAY, model], **{**given, "method": "ties"})
    save_model(Decoder(replace(CONFIG, hidden_size=32)), tmp_path / "small", tokenizer=world / "model")
    with pytest.raises(UserError, match="hidden_size is 32"):
        checks.merged([model, there(tmp_path / "small")], **given)


@pytest.mark.parametrize(
    "function", [train, lambda model: checks.evaluation(AWAY, model, documents_per_language=1)]
)
def test_a_folder_that_is_no_model_is_refused(function: Any, world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a file, not the folder of a model"):
        function(there(world / "model" / "config.json"))
    with pytest.raises(UserError, match=r"holds no config\.json, so it is no model"):
        function(there(tmp_path))
