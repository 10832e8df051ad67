"""Model cards: what the Hub's own reader finds in them, and where licence and languages come from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard as HubCard
from huggingface_hub import ModelCardData

from koine.model.formats.model_card import ModelCard, Parent, card_text, koine_command, write_model_card


def parent(folder: Path, card: str | None, **config: Any) -> Parent:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Parent(path=folder, role="merged")


def written(tmp_path: Path, *parents: Parent, config: dict[str, Any] | None = None, **fields: Any) -> HubCard:
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    content = config or {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(content))
    card = ModelCard(title="A title", summary="What was done.", parents=parents, **fields)
    write_model_card(folder, card)
    found = HubCard.load(folder / "README.md")
    # The reader's own check of the fields' types, strictly.
    ModelCardData(ignore_metadata_errors=False, **found.data.to_dict())
    return found


APACHE = "---\nlicense: apache-2.0\nlanguage: [de, 'no']\n---\n# A parent's own text\n"


def test_what_the_parents_declare_alike_is_declared(tmp_path: Path) -> None:
    one = parent(tmp_path / "one", APACHE)
    two = parent(tmp_path / "two", "---\nlicense: apache-2.0\nlanguage: hi\n---\n")
    card = written(tmp_path, one, two, relation="merge", languages=("sw", "und"), tags=("merge",))
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["sw", "de", "no", "hi"]
    assert card.data.base_model == [one.name, two.name]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert card.data.tags == ["koine", "merge"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert "A parent's own text" not in card.text


def test_another_licence_is_taken_with_its_name_and_link(tmp_path: Path) -> None:
    link = "license: other\nlicense_name: llama3\nlicense_link: https://example.org/licence"
    card = written(tmp_path, parent(tmp_path / "one", f"---\n{link}\n---\n"), relation="finetune")
    assert (card.data.license, card.data.license_name) == ("other", "llama3")
    assert card.data.license_link == "https://example.org/licence"
    assert isinstance(card.data.base_model, str)


def test_licences_in_conflict_are_other_and_named(tmp_path: Path) -> None:
    card = written(
        tmp_path,
        parent(tmp_path / "one", APACHE),
        parent(tmp_path / "two", "---\nlicense: cc-by-nc-4.0\n---\n"),
        relation="merge",
    )
    assert card.data.license == "other"
    assert "apache-2.0" in card.text
    assert "cc-by-nc-4.0" in card.text
    assert "All of them apply" in card.text


@pytest.mark.parametrize(
    "card",
    [None, "no metadata", "---\nlicense: [\n---\n", "---\n- a list\n---\n", "---\nlanguage: de\n---\n"],
)
def test_an_unknown_licence_is_left_out_with_the_reason(tmp_path: Path, card: str | None) -> None:
    found = written(
        tmp_path, parent(tmp_path / "one", APACHE), parent(tmp_path / "two", card), relation="merge"
    )
    assert found.data.license is None
    assert "declares none" in found.text


def test_a_model_without_parents_has_neither_base_nor_licence(tmp_path: Path) -> None:
    card = written(tmp_path, languages=("de", "zh-Hant"))
    fields = card.data.to_dict()
    assert not {"license", "base_model", "base_model_relation"} & fields.keys()
    assert fields["language"] == ["de", "zh-Hant"]
    assert "No licence is declared" in card.text


def test_a_licence_in_config_json_counts(tmp_path: Path) -> None:
    card = written(tmp_path, parent(tmp_path / "one", None, license="mit"), relation="finetune")
    assert card.data.license == "mit"


def test_parents_in_the_hubs_cache_have_their_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = parent(tmp_path / "hub/models--some--model-7b/snapshots/abc", APACHE)
    assert snapshot.name == "some/model-7b"
    assert parent(tmp_path / "hub/models--gpt2/snapshots/abc", None).name == "gpt2"
    monkeypatch.chdir(tmp_path)
    assert Parent(path=tmp_path / "models/a", role="x").name == "models/a"
    assert "Local folders" not in written(tmp_path, snapshot, relation="finetune").text
    assert "Local folders" in written(tmp_path, parent(tmp_path / "b", APACHE), relation="finetune").text


@pytest.mark.parametrize(
    ("config", "library", "task"),
    [
        ({"model_type": "koine", "architectures": ["KoineForCausalLM"]}, "koine", "text-generation"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "transformers", "fill-mask"),
        (
            {
                "model_type": "aya_vision",
                "architectures": ["AyaVisionForConditionalGeneration"],
                "vision_config": {},
            },
            "transformers",
            "image-text-to-text",
        ),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "transformers", None),
    ],
)
def test_library_and_task(tmp_path: Path, config: dict[str, Any], library: str, task: str | None) -> None:
    card = written(tmp_path, config=config)
    assert (card.data.library_name, card.data.pipeline_tag) == (library, task)


def test_sentence_models_are_loaded_by_their_library(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/modules.json").write_text("[]")
    card = written(tmp_path)
    assert (card.data.library_name, card.data.pipeline_tag) == (
        "sentence-transformers",
        "sentence-similarity",
    )
    assert "SentenceTransformer(" in card.text


def test_figures_data_and_command_are_in_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/koine", "merge", "linear", "a b", "https://me:secret@host/x"])
    card = written(
        tmp_path, figures={"bits|x": 1.25}, data=(("`web`", "de", "3 documents"),), parameters={"t": 1}
    )
    assert "| `bits\\|x` | 1.25 |" in card.text
    assert "| `web` | de | 3 documents |" in card.text
    assert "koine merge linear 'a b' 'https://***@host/x'" in card.text
    assert '"t": 1' in card.text
    assert "secret" not in card.text


def test_only_our_own_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/koine/__main__.py", "run", "quickstart"])
    assert koine_command() == "python -m koine run quickstart"
    monkeypatch.setattr(sys, "argv", ["my_script.py", "--x"])
    assert koine_command() is None
    assert "```bash" not in card_text(tmp_path, ModelCard(title="t", summary="s"))
