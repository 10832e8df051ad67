"""`koine align watch`: judge the checkpoints that a training left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from koine.cli.answers import print_answer
from koine.cli.arguments import DEVICE, LANGUAGE, MODEL, SOURCE
from koine.cli.commands import Command
from koine.cli.outputs import OVERWRITE, OutputFolder, say_written
from koine.cli.recording import recorded_output
from koine.errors import UserError

SAMPLING_OPTIONS = (
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="Most tokens of an answer.",
    ),
    click.option(
        "--temperature", type=float, default=0.5, show_default=True, help="Temperature of the answers."
    ),
    click.option("--top-p", type=float, default=0.75, show_default=True, help="Nucleus of the answers."),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Random seed of the first answer; answer i has this plus i, for every model.",
    ),
)


@click.command(cls=Command)
@click.argument("models", type=MODEL, nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--data",
    type=SOURCE,
    metavar="SOURCE",
    help="Held-out pairs: records with prompt, chosen and rejected.  [required without --prompts]",
)
@click.option(
    "--prompts",
    type=SOURCE,
    metavar="SOURCE",
    help="Records with prompts to answer: chats, pairs or texts.  [default: the prompts of --data]",
)
@click.option("--reference", type=MODEL, help="Model for the KL, such as the one before the training.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Number of pairs, and of prompts, of each language at most.",
)
@click.option("--language", type=LANGUAGE, help="Language of records that name none.")
@click.option("--out", type=OutputFolder(), required=True, help="Folder of the figures and the report.")
@DEVICE
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Precision.",
)
@SAMPLING_OPTIONS[0]
@SAMPLING_OPTIONS[1]
@SAMPLING_OPTIONS[2]
@SAMPLING_OPTIONS[3]
@OVERWRITE
def watch(
    models: tuple[Path, ...],
    data: str | None,
    prompts: str | None,
    reference: Path | None,
    out: Path,
    overwrite: bool,
    **options: Any,
) -> None:
    """Measure checkpoints of one training, in order, and judge whether they are over-optimised.

    MODEL... are model folders that any trainer left. The last number in a folder's name is its step; without
    one, the order given counts. Each gets the same pairs, prompts and seeds. The figures are those of the
    monitor of `koine align train`, by language, with a report.
    """
    from koine.files import atomic_directory, read_json
    from koine.plan.report.blocks import read_step_report
    from koine.plan.report.page import write_page
    from koine.steps.alignment import watch_models

    if data is None and prompts is None:
        raise UserError(
            "neither --data nor --prompts", hint="give held-out pairs, prompts to answer, or both"
        )
    parents = {"models": models, "reference": reference, "data": data, "prompts": prompts}
    reads = [*models, *(Path(path) for path in (data, prompts, reference) if path is not None)]
    with (
        recorded_output(out, parents, metrics=lambda folder: read_json(folder / "metrics.json")),
        atomic_directory(out, overwrite=overwrite, reads=reads) as folder,
    ):
        watch_models(
            {str(path): path for path in models},
            None if data is None else Path(data),
            None if prompts is None else Path(prompts),
            reference,
            out=folder,
            **options,
        )
        report = read_step_report(folder / "report.json")
        facts = [("models", str(len(models))), ("pairs", str(data)), ("prompts", str(prompts or data))]
        write_page(
            folder / "report.html", name=report.title, sections=[("Behaviour", report.blocks)], facts=facts
        )
    verdict = read_json(out / "verdict.json")
    figures = read_json(out / "metrics.json")
    answer = {"written": out, "verdict": verdict, "figures": figures, "report": out / "report.html"}
    print_answer(answer, lambda: click.echo(f"{verdict['text'][:1].upper()}{verdict['text'][1:]}."))
    say_written(out / "report.html")
