"""`koine align revise`: let a model revise its answers."""

from __future__ import annotations

import json
from pathlib import Path

import click

from koine.cli.answers import print_answer
from koine.cli.arguments import DEVICE, MODEL
from koine.cli.commands import Command
from koine.cli.outputs import OVERWRITE, InputFile, OutputFile, output_files, say_written


@click.command(cls=Command)
@click.option("--model", type=MODEL, required=True, help="Model folder, or OWNER/NAME of the hub.")
@click.option("--prompts", type=InputFile(), required=True, help="Rows with `prompt`, text or messages.")
@click.option(
    "--times", type=click.IntRange(min=1), default=1, show_default=True, help="Revisions of each answer."
)
@click.option(
    "--revision",
    metavar="TEXT",
    help="The user's turn that asks for a revision.  [default: that of the model's training]",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy decoding.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of sampling.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Most tokens of an answer.")
@DEVICE
@click.option("--out", type=OutputFile(), required=True, help="JSON Lines file to write.")
@OVERWRITE
def revise(
    model: Path,
    prompts: Path,
    times: int,
    revision: str | None,
    temperature: float,
    seed: int,
    max_new_tokens: int,
    device: str,
    out: Path,
    overwrite: bool,
) -> None:
    """Answer prompts, and revise each answer; every row gets `completions`, the last revision last."""
    from koine.align.prompts import read_prompts
    from koine.align.revise import revise as revised
    from koine.align.revise import revision_for
    from koine.generate import LocalEngine
    from koine.generate.sampling import Sampling
    from koine.hardware import chosen_device
    from koine.tokenizer import load_tokenizer

    turn = revision_for(model, revision)
    sampling = Sampling(temperature=temperature, seed=seed, max_new_tokens=max_new_tokens)
    rows = read_prompts(prompts, load_tokenizer(model))
    with output_files({"--out": out}, overwrite=overwrite, reads=[model, prompts]) as targets:
        engine = LocalEngine(model, device=chosen_device(device))
        answers = revised(
            engine, [list(row.messages) for row in rows], revision=turn, times=times, sampling=sampling
        )
        target = targets["--out"]
        assert target is not None
        with target.open("w", encoding="utf-8") as file:
            for row, found in zip(rows, answers, strict=True):
                written = {**row.record, "completions": [one.text for one in found], "revision": turn}
                file.write(json.dumps(written, ensure_ascii=False) + "\n")
    changed = sum(found[-1].text != found[0].text for found in answers)
    answer = {"answers": len(rows), "changed": changed, "written": out}
    print_answer(answer, lambda: click.echo(f"{changed} of {len(rows)} answers changed"))
    say_written(out)
