"""The model card of a training, written beside the model and into every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.model.formats.model_card import ModelCard, Parent
from koine.train.progress import final_metrics

if TYPE_CHECKING:
    from koine.data.batch import StepBatches
    from koine.data.shards import TokenSource
    from koine.train.export import OutputFolder
    from koine.train.settings import TrainSettings

_WHAT = {
    "LanguageModelling": ("next-token prediction on documents", ("continued-pretraining",)),
    "SupervisedFineTuning": ("supervised fine-tuning on chats", ("sft",)),
    "BradleyTerry": ("the Bradley-Terry loss on pairs of answers", ("reward-model",)),
}


def training_card(
    data: StepBatches,
    settings: TrainSettings,
    identity: dict[str, Any],
    output: OutputFolder,
    *,
    steps_done: int,
    stopped: str | None = None,
) -> ModelCard:
    """Return the card of a model after `steps_done` steps.

    Args:
        data: the batches.
        settings: the training's.
        identity: of the training (`koine.train.fingerprint.training_identity`).
        output: its folder, with the metrics, and the folder that it started from.
        steps_done: steps whose weights the card describes.
        stopped: why a stop rule ended the training there; None: it did not.
    """
    objective = str(identity["objective"]["class"])
    what, tags = _WHAT.get(objective, (f"the objective `{objective}`", ()))
    mixture = data.mixture
    total = sum(phase.steps for phase in mixture.phases)
    tokens = sum(shape.tokens * steps for shape, steps in mixture.shapes().items())
    length = f"{total:,} steps, {tokens:,} tokens"
    if steps_done < total:
        length = f"{steps_done:,} of {length} planned"
    if stopped is not None:
        length += f"; it ended there because {stopped}"
    parents: tuple[Parent, ...] = ()
    if output.init_from is None:
        title, start, tags = (
            "A language model trained from random weights",
            "random weights",
            ("pretraining",),
        )
    else:
        parents = (Parent(path=output.init_from, role="start of the training"),)
        title, start = f"{output.init_from.absolute().name}, trained further", f"`{parents[0].name}`"
    adapter = identity.get("adapter")
    if adapter is not None:
        of = f" of {parents[0].path.absolute().name}" if parents else ""
        title, tags = f"A LoRA adapter{of}", (*tags, "lora")
    rows, languages = _data(data)
    figures = dict(final_metrics(output.path / "metrics.jsonl"))
    figures = {"training loss, mean of the last steps": figures.pop("loss"), **figures}
    return ModelCard(
        title=title,
        summary=f"Trained from {start} by {what}: {length}.",
        parents=parents,
        relation=None if not parents else "adapter" if adapter else "finetune",
        languages=languages,
        data=rows,
        parameters={
            "objective": identity["objective"],
            "settings": settings.to_json(),
            **({} if adapter is None else {"adapter": adapter}),
            "mixture": identity["mixture"],
        },
        figures=figures,
        tags=tags,
    )


def _data(data: StepBatches) -> tuple[tuple[tuple[str, str, str], ...], tuple[str, ...]]:
    """Return the rows of the table of data, and all languages that are drawn; none for other data orders."""
    opened: dict[Path, TokenSource] = getattr(data, "sources", {})
    rows: dict[str, tuple[str, str, str]] = {}
    languages: dict[str, None] = {}
    for phase in data.mixture.phases:
        for source in phase.all_sources:
            if source.path not in opened:
                continue
            totals = opened[source.path].totals()
            drawn = [code for code in totals if source.languages is None or source.languages.get(code)]
            tokens = sum(totals[code]["tokens"] for code in drawn)
            documents = sum(totals[code]["documents"] for code in drawn)
            rows[source.name] = (
                f"`{source.name}`",
                ", ".join(drawn),
                f"{documents:,} documents, {tokens:,} tokens",
            )
            languages |= dict.fromkeys(drawn)
    return tuple(rows.values()), tuple(languages)
