"""Profile models by language: how well does each serve whom, what would adapting cost, how fast is it?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from koine.data.hub_data import dataset_folder
from koine.errors import UserError
from koine.hardware import chosen_dtype, usable_cores
from koine.hub import model_folder
from koine.plan import FinishedRun, Parameter, Plan
from koine.plan.finished_run import read_verdict
from koine.plan.formatting import hanging
from koine.recipes.closings import aligned
from koine.recipes.parameters import DType, FieldNames, FormatName, MaxBadShare, Seed
from koine.steps.profile import compare_profiles, measure_speed, profile_model
from koine.steps.profile_text import own_profile_text, sample_profile_text


def profile(
    plan: Plan,
    *,
    model: Annotated[
        tuple[Path, ...], Parameter("Folder of a model of any class, or OWNER/NAME of the hub; several: A,B.")
    ],
    data: Annotated[
        Path | None,
        Parameter("Your text, with a language in each record; none: parallel text of the sample world."),
    ] = None,
    fields: FieldNames = (),
    format: FormatName = "",
    languages: Annotated[
        tuple[str, ...],
        Parameter("Language codes to use; empty: 40 of the sample world, or all of the data."),
    ] = (),
    parallel: Annotated[
        bool, Parameter("Records of your text that have one id are translations of each other.")
    ] = False,
    primary_languages: Annotated[
        tuple[str, ...],
        Parameter(
            "Languages that the models were trained on; empty: those that the profile finds served well."
        ),
    ] = (),
    documents: Annotated[
        int, Parameter("Documents of each language for the tokenizer.", unit="documents", low=1)
    ] = 100,
    scored_documents: Annotated[
        int, Parameter("Documents of each language for bits per byte.", unit="documents", low=1)
    ] = 10,
    max_document_bytes: Annotated[
        int,
        Parameter("Length to which a document of your text is cut, unless parallel.", unit="bytes", low=1),
    ] = 2_000,
    max_bytes_per_language: Annotated[
        int, Parameter("Most of your text that is read of each language.", unit="bytes", low=1)
    ] = 200_000,
    lengths: Annotated[
        tuple[int, ...], Parameter("Tokens of context at which speed is measured.", unit="tokens", low=2)
    ] = (512, 8_192, 32_768),
    repeats: Annotated[int, Parameter("Runs of each length.", unit="runs", low=1)] = 3,
    max_seconds: Annotated[
        float,
        Parameter("Most time of a length: fewer runs, or none if one takes longer.", unit="seconds", above=0),
    ] = 60.0,
    dtype: DType = "auto",
    max_bad_share: MaxBadShare = 0.01,
    seed: Seed = 0,
) -> None:
    """Show how well models serve each language, what adapting them would cost, and how fast they are."""
    # Speed is that of the whole machine, and nothing may run beside it.
    plan.threads = plan.threads or usable_cores()
    precision = chosen_dtype(dtype)
    models = {
        name: plan.input(model_folder(path), name=f"given/{artifact_name(name)}")
        for name, path in model_names(model).items()
    }
    if data is None:
        from koine.data.sample.parallel import PARALLEL_LANGUAGES

        text = plan.step(
            sample_profile_text,
            name="text",
            languages=languages or PARALLEL_LANGUAGES,
            documents=documents,
            scored_documents=scored_documents,
            seed=seed,
        )
    else:
        text = plan.step(
            own_profile_text,
            name="text",
            data=plan.input(dataset_folder(data), name="data"),
            fields=fields,
            record_format=format,
            languages=languages,
            parallel=parallel,
            documents=documents,
            scored_documents=scored_documents,
            max_document_bytes=max_document_bytes,
            max_bytes_per_language=max_bytes_per_language,
            max_bad_share=max_bad_share,
        )
    profiles = {
        name: plan.step(
            profile_model,
            name=f"languages/{artifact_name(name)}",
            text=text,
            model=one,
            primary_languages=primary_languages,
            dtype=precision,
            seed=seed,
        )
        for name, one in models.items()
    }
    speed = plan.step(
        measure_speed,
        name="speed",
        text=text,
        models=models,
        profiles=profiles,
        lengths=lengths,
        repeats=repeats,
        max_seconds=max_seconds,
        dtype=precision,
    )
    page = plan.step(compare_profiles, name="page", profiles=profiles, speed=speed)
    plan.export(page / "results.json", "results.json")
    plan.closing(profile_answer, page=page)


def model_names(paths: Sequence[Path]) -> dict[str, Path]:
    """Return the models by the last part of their path; two of one name get the part before it too.

    Raises `UserError` for no model, or one that is given twice.
    """
    if not paths:
        raise UserError("no model is given", hint="for example --set model=models/a,models/b")
    found: dict[str, Path] = {}
    last = [path.absolute().name for path in paths]
    for path, name in zip(paths, last, strict=True):
        own = f"{path.absolute().parent.name}-{name}" if last.count(name) > 1 else name
        if artifact_name(own) in map(artifact_name, found):
            raise UserError(f"two models have the name '{own}'", hint="give each once, or rename a folder")
        found[own] = path
    return found


def artifact_name(name: str) -> str:
    """Return a model's name with the characters that an artifact's name may have."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "model"


def profile_answer(run: FinishedRun, page: Path) -> str:
    """Return the verdict of the page, and where the page and its figures are."""
    lines = [""]
    verdict = read_verdict(page)
    if verdict is not None:
        question, answer = verdict
        lines += [question, *(line for part in answer.splitlines() for line in hanging("  ", part)), ""]
    places = [
        ("the page", run.path(run.folder / "report.html")),
        ("its figures", run.path(run.folder / "results.json")),
    ]
    return "\n".join([*lines, aligned(places)])
