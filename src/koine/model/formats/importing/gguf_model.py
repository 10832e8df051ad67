"""Plan the import of a GGUF file."""

from __future__ import annotations

from typing import Any

import torch

from koine.errors import UserError
from koine.files import to_json
from koine.model.formats.importing.gguf_config import read_gguf_config
from koine.model.formats.importing.gguf_file import GgufFile
from koine.model.formats.importing.gguf_tensors import default_dtype, plan_tensors, quantisation
from koine.model.formats.importing.gguf_vocabulary import GgufVocabulary, read_gguf_vocabulary
from koine.model.formats.importing.plan import ImportPlan
from koine.model.formats.importing.sources import GgufSource
from koine.model.formats.model_card import ModelCard


def plan_gguf(source: GgufSource, dtype: torch.dtype | None) -> ImportPlan:
    """Read the header of a GGUF file and plan its import.

    dtype: of all tensors; None: float32 of quantised tensors, else that of the matrices.

    Raises `UserError` for a damaged file, and for what has no equal in `transformers` or is not known.
    """
    file = GgufFile(list(source.paths))
    try:
        config = read_gguf_config(file)
        kind = dtype or default_dtype(file)
        tensors = plan_tensors(file, config, kind)
        vocabulary = read_gguf_vocabulary(
            file, rows=config.sizes["v"], context=config.content["max_position_embeddings"]
        )
    except BaseException:
        file.close()
        raise
    end = list(vocabulary.end_ids)
    content = {
        **config.content,
        "dtype": str(kind).removeprefix("torch."),
        **vocabulary.ids,
        "eos_token_id": end[0],
    }
    generation = {**vocabulary.ids, "eos_token_id": end if len(end) > 1 else end[0]}
    types = quantisation(file.tensors)
    return ImportPlan(
        source=source.name,
        where=file.where,
        config=content,
        tensors=tuple(tensors),
        texts={"generation_config.json": to_json(_without_none(generation)), **vocabulary.files},
        card=_card(source, file, config.name, types),
        facts={
            "architecture": config.name,
            "class": config.architecture.model_class,
            "quantisation": types,
            **_about(vocabulary, rows=config.sizes["v"]),
        },
        reads=source.paths,
        close=file.close,
    )


def _about(vocabulary: GgufVocabulary, *, rows: int) -> dict[str, Any]:
    return {
        "vocabulary": {"model": vocabulary.kind, "tokens": vocabulary.tokens, "rows": rows},
        "chat_template": vocabulary.chat_template is not None,
    }


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _card(source: GgufSource, file: GgufFile, architecture: str, types: dict[str, Any]) -> ModelCard:
    name = file.metadata.get("general.name")
    name = name if isinstance(name, str) and name.strip() else file.where.stem
    license_name = file.metadata.get("general.license")
    languages = file.metadata.get("general.languages")
    listed = ", ".join(f"{kind}: {one['tensors']}" for kind, one in types.items())
    return ModelCard(
        title=" ".join(name.split())[:120],
        summary=f"Imported from the GGUF file `{file.where.name}` (architecture {architecture}; tensors by "
        f"type: {listed}). Quantised tensors hold what dequantisation gives, not the weights before it.",
        license=license_name if isinstance(license_name, str) else None,
        languages=tuple(one for one in languages if one) if isinstance(languages, list) else (),
        parameters={"source": source.name},
        tags=("gguf",),
    )


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise `UserError` for a dtype that weights are not written in."""
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"weights are not imported as {dtype}", hint="choose float32, bfloat16 or float16")
