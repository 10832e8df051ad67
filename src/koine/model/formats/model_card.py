"""Model cards: the `README.md` of a model directory, with the metadata that the Hugging Face Hub reads.

Licence and languages come from the cards of the models that this one is made from; nothing is invented. Their
text is not copied.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from koine import __version__
from koine.errors import UserError
from koine.files import read_json_object, write_atomically
from koine.files.stand_ins import sources_of
from koine.model.formats.weight_files import ADAPTER_CONFIG
from koine.plan.command_line import recorded_command

CARD = "README.md"

Relation = Literal["finetune", "merge", "quantized", "adapter"]
"""Relation of a model to its parents, in the Hub's words (`base_model_relation`)."""

NO_LANGUAGE = ("und", "zxx", "mul")
"""Codes for undetermined, no and several languages."""

_HUB_CACHE = re.compile(r"models--(?P<name>[^/]+)/snapshots/")
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
_AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "image-text-to-text": "AutoModelForImageTextToText",
}


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A model that another one is made from: its folder and what it is to the other."""

    path: Path
    role: str

    @property
    def name(self) -> str:
        """The id on the Hub if the folder lies in its cache, else the path."""
        found = _HUB_CACHE.search(self.path.absolute().as_posix() + "/")
        if found is not None:
            return found["name"].replace("--", "/")
        if (sources := sources_of(self.path)) is not None:
            return "+".join(Parent(path=source, role=self.role).name for source in sources)
        place = self.path.absolute()
        here = Path.cwd()
        return (place.relative_to(here) if place.is_relative_to(here) else place).as_posix()


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Content of a model card that is not in the model's folder.

    Attributes:
        title: The heading.
        summary: What was done, in one paragraph of Markdown.
        parents: The models that this one is made from.
        relation: What it is to them; None without parents.
        languages: BCP-47 codes of the data, besides the parents' own languages.
        data: Rows of the table of training data: name, languages and size.
        parameters: JSON values that the result depends on.
        figures: Figures of the evaluation.
        tags: The Hub's tags, besides `koine`.
        license: What the source itself declares, of a model without parents.
    """

    title: str
    summary: str
    parents: tuple[Parent, ...] = ()
    relation: Relation | None = None
    languages: tuple[str, ...] = ()
    data: tuple[tuple[str, str, str], ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    license: str | None = None


def write_model_card(folder: Path, card: ModelCard) -> None:
    """Write the card of a model into its folder, which holds the model's `config.json` already."""
    write_atomically(folder / CARD, card_text(folder, card))


def card_text(folder: Path, card: ModelCard) -> str:
    """Return a card as Markdown, with its metadata as YAML on top."""
    from huggingface_hub import ModelCardData

    config = _read_config(folder)
    metadata = [_metadata(parent.path) for parent in card.parents]
    license_fields, license_text = joined_license([parent.name for parent in card.parents], metadata)
    if not card.parents and card.license is not None:
        license_fields = {"license": card.license}
        license_text = f"`{card.license}`, as the file that it was imported from declares."
    pipeline = _pipeline(folder, config, metadata)
    library = _library(folder, config)
    names = list(dict.fromkeys(parent.name for parent in card.parents))
    fields = {
        "base_model": (names[0] if len(names) == 1 else names) if names else None,
        "base_model_relation": card.relation if names else None,
        "library_name": library,
        "language": _languages(card.languages, metadata) or None,
        "pipeline_tag": pipeline,
        "tags": list(dict.fromkeys(("koine", *card.tags))),
        **license_fields,
    }
    sections = [
        f"# {card.title}",
        card.summary,
        _parents_section(card, metadata),
        f"## Licence\n\n{license_text}",
        _data_section(card),
        _figures_section(card),
        _making_section(card),
        _loading_section(library, pipeline),
    ]
    text = "\n\n".join(section for section in sections if section)
    return f"---\n{ModelCardData(**fields).to_yaml().rstrip()}\n---\n\n{text}\n"


def joined_license(names: list[str], metadata: list[dict[str, Any]]) -> tuple[dict[str, str], str]:
    """Return the metadata fields of the licence of a model made from others, and a sentence about them.

    Args:
        names: the parents.
        metadata: of their cards.

    It is the parents' licence where all declare the same one. Where they differ it is `other`; where one
    declares none, there is none.
    """
    if not names:
        return (
            {},
            "No licence is declared. Add `license` to the metadata above before you publish this model.",
        )
    keys = ("license", "license_name", "license_link")
    declared = {
        name: {key: _joined(one[key]) for key in keys if one.get(key)}
        for name, one in zip(names, metadata, strict=True)
    }
    unknown = [name for name, found in declared.items() if "license" not in found]
    if unknown:
        return {}, (
            f"No licence is declared here, because {_listed(unknown)} declare{'s' * (len(unknown) == 1)} none "
            "in a model card. Find out what it is before you publish this model."
        )
    first, *others = declared.values()
    if all(other == first for other in others):
        return dict(
            first
        ), f"`{first['license']}`, as {_listed(declared)} declare{'s' * (len(declared) == 1)}."
    each = "; ".join(
        f"`{name}`: `{found.get('license_name', found['license'])}`" for name, found in declared.items()
    )
    return {"license": "other"}, (
        f"The models that this one is made from have different licences ({each}), so the metadata say `other`. "
        "All of them apply. Read them before you use or publish this model."
    )


def _joined(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _listed(names: Iterable[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _metadata(model: Path) -> dict[str, Any]:
    """Return the metadata of a model's card, with the licence of its `config.json` where it has no other.

    A card that is missing or damaged declares nothing.
    """
    import yaml
    from huggingface_hub import metadata_load

    found: dict[str, Any] = {}
    try:
        if (model / CARD).is_file():
            found = metadata_load(model / CARD) or {}
    except (ValueError, yaml.YAMLError):
        pass
    declared = _read_config(model).get("license")
    return {**({"license": declared} if isinstance(declared, str) else {}), **found}


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return read_json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    except UserError:
        # Whoever opens the model reports a damaged configuration; the card goes without it.
        return {}


def _languages(own: Iterable[str], metadata: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the languages of the data and of the parents' cards, each once."""
    codes = list(own)
    for one in metadata:
        declared = one.get("language") or []
        codes += (
            [declared] if isinstance(declared, str) else [code for code in declared if isinstance(code, str)]
        )
    return [code for code in dict.fromkeys(codes) if code not in NO_LANGUAGE]


def _library(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "modules.json").is_file():
        return "sentence-transformers"
    if (folder / ADAPTER_CONFIG).is_file():
        return "peft"
    if config.get("model_type") == "koine":
        return "koine"
    return "transformers" if config.get("model_type") else None


def _pipeline(folder: Path, config: Mapping[str, Any], metadata: list[dict[str, Any]]) -> str | None:
    """Return the Hub's name of the model's task: by its class, else as all its parents' cards say."""
    if (folder / "modules.json").is_file():
        return "sentence-similarity"
    if (folder / ADAPTER_CONFIG).is_file():
        return "text-generation"
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    if name.endswith("ForConditionalGeneration") and "vision_config" in config:
        return "image-text-to-text"
    for ending, task in _PIPELINES.items():
        if name.endswith(ending):
            return task
    tasks = {one.get("pipeline_tag") for one in metadata}
    return str(tasks.pop()) if len(tasks) == 1 and None not in tasks else None


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _parents_section(card: ModelCard, metadata: list[dict[str, Any]]) -> str:
    if not card.parents:
        return ""
    rows = [
        (
            parent.role,
            f"`{parent.name}`",
            _joined(one.get("license_name") or one.get("license") or "not declared"),
        )
        for parent, one in zip(card.parents, metadata, strict=True)
    ]
    text = f"## Made from\n\n{_table(('role', 'model', 'licence'), rows)}"
    if any(not _is_hub_id(parent) for parent in card.parents):
        text += (
            "\n\nLocal folders are named by their paths. Replace them in the metadata by ids of the Hub before "
            "you publish this model, because the Hub accepts only those."
        )
    return text


def _is_hub_id(parent: Parent) -> bool:
    return _HUB_CACHE.search(parent.path.absolute().as_posix() + "/") is not None


def _data_section(card: ModelCard) -> str:
    if not card.data:
        return ""
    return f"## Data\n\n{_table(('source', 'languages', 'size'), card.data)}"


def _figures_section(card: ModelCard) -> str:
    if not card.figures:
        return ""
    rows = [(f"`{name}`", f"{value:.6g}") for name, value in card.figures.items()]
    return f"## Evaluation\n\n{_table(('figure', 'value'), rows)}"


def _making_section(card: ModelCard) -> str:
    lines = [f"## How it was made\n\nWith Koine {__version__}."]
    command = koine_command()
    if command is not None:
        lines.append(f"```bash\n{command}\n```")
    if card.parameters:
        text = json.dumps(card.parameters, indent=2, ensure_ascii=False, default=str)
        lines.append(f"```json\n{text}\n```")
    return "\n\n".join(lines)


def koine_command() -> str | None:
    """Return the command of this process as you would type it; None where it is not Koine's own."""
    words = recorded_command()
    program = Path(words[0]) if words else Path()
    if program.name == "__main__.py" and program.parent.name == "koine":
        return shlex.join(["python", "-m", "koine", *words[1:]])
    return shlex.join(["koine", *words[1:]]) if program.stem == "koine" else None


def _loading_section(library: str | None, pipeline: str | None) -> str:
    folder = "path/to/this/folder"
    if library == "sentence-transformers":
        code = (
            "from sentence_transformers import SentenceTransformer\n\n"
            f'model = SentenceTransformer("{folder}")'
        )
    elif library == "koine":
        code = (
            "from pathlib import Path\n\nfrom koine.model import load_model\n"
            "from koine.tokenizer import load_tokenizer\n\n"
            f'model, tokenizer = load_model(Path("{folder}")), load_tokenizer(Path("{folder}"))'
        )
    elif library == "peft":
        code = (
            "from peft import AutoPeftModelForCausalLM\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{folder}")'
        )
    elif library == "transformers":
        name = _AUTO_CLASSES.get(pipeline or "", "AutoModel")
        code = (
            f"from transformers import {name}, AutoTokenizer\n\n"
            f'model = {name}.from_pretrained("{folder}")\ntokenizer = AutoTokenizer.from_pretrained("{folder}")'
        )
    else:
        return ""
    return f"## Use\n\n```python\n{code}\n```"
