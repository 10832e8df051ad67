"""`koine align score`: score completions by a reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koine.cli.answers import print_answer
from koine.cli.arguments import DEVICE, MODEL
from koine.cli.commands import Command
from koine.cli.outputs import OVERWRITE, InputFile, OutputFile, output_files, say_written
from koine.errors import UserError

if TYPE_CHECKING:
    from koine.align.reward_scores import RewardScorer
    from koine.align.rewards import Reward


@click.command(cls=Command)
@click.argument("completions", type=InputFile())
@click.option(
    "--reward",
    "reward_text",
    required=True,
    metavar="REWARD",
    help="Weighted sum of rewards, for example 0.7*language+0.3*length:most=20.",
)
@click.option("--reward-model", type=MODEL, help="Folder of the reward model for the reward `reward-model`.")
@click.option("--judge", type=MODEL, help="Model folder, or OWNER/NAME of the hub, for the reward `judge`.")
@click.option(
    "--judge-template",
    type=InputFile(),
    help="Prompt of the judge, with {conversation} and {answer}; it must ask for a last line `Mark: NUMBER`.",
)
@DEVICE
@click.option("--out", type=OutputFile(), required=True, help="JSON Lines file to write.")
@OVERWRITE
def score(
    completions: Path,
    reward_text: str,
    reward_model: Path | None,
    judge: Path | None,
    judge_template: Path | None,
    device: str,
    out: Path,
    overwrite: bool,
) -> None:
    """Score the rows of COMPLETIONS, each with `prompt` and `completion` or `completions`.

    Rows with `completions` become groups for `koine data tokenize --kind scored`. A completion that the reward
    fails for gets no score, and the failures are counted.
    """
    from koine.align.rewards import RewardOutcome, RewardSummary
    from koine.align.rewards.completions import read_completions, score_rows

    reward = open_reward(reward_text, judge, judge_template, device, reward_model)
    outcomes: list[RewardOutcome] = []
    with output_files({"--out": out}, overwrite=overwrite, reads=[completions]) as targets:
        rows = read_completions(completions, reward)
        target = targets["--out"]
        assert target is not None
        with target.open("w", encoding="utf-8") as file:
            for row in score_rows(rows, reward, outcomes):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        summary = RewardSummary.of(outcomes)
        if not outcomes:
            raise UserError("holds no completions", where=completions)
        summary.check()
    answer = {"scored": summary.scored, "mean": summary.mean, "failures": summary.failures, "written": out}
    print_answer(answer, lambda: _show(answer))
    say_written(out)


def _show(answer: dict[str, Any]) -> None:
    click.echo(f"{answer['scored']} completions scored, mean {answer['mean']:.4f}")
    for reason, count in answer["failures"].items():
        click.echo(f"{count} without a score: {reason}")


def _engine(judge: Path | None, device: str) -> Any:
    if judge is None:
        return None
    from koine.generate import LocalEngine
    from koine.hardware import chosen_device

    return LocalEngine(judge, device=chosen_device(device))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("cannot be read as text", where=path, hint="give a UTF-8 text file") from error


def open_reward(
    text: str,
    judge: Path | None,
    judge_template: Path | None,
    device: str,
    reward_model: Path | None = None,
) -> Reward:
    """Return the reward of --reward, with the judge of --judge and the model of --reward-model.

    Raises `UserError` where they do not fit.
    """
    from koine.align.rewards import RewardSpec

    spec = RewardSpec.parse(text)
    if "scorer" in spec.needs and reward_model is None:
        raise UserError(
            "the reward 'reward-model' needs a model", where="--reward", hint="give --reward-model MODEL"
        )
    if "scorer" not in spec.needs and reward_model is not None:
        raise UserError(
            "the reward has no reward model",
            where="--reward-model",
            hint="add reward-model to --reward, or leave it out",
        )
    if "engine" in spec.needs and judge is None:
        raise UserError("the reward 'judge' needs a model", where="--reward", hint="give --judge MODEL")
    if "engine" not in spec.needs and (judge or judge_template):
        raise UserError(
            "the reward has no judge", where="--judge", hint="add judge to --reward, or leave it out"
        )
    template = None if judge_template is None else _read_text(judge_template)
    scorer = None if reward_model is None else _scorer(reward_model, device)
    return spec.build(scorer=scorer, engine=_engine(judge, device), judge_template=template)


def _scorer(path: Path, device: str) -> RewardScorer:
    from koine.align.reward_scores import load_scorer
    from koine.hardware import chosen_device

    return load_scorer(path, device=chosen_device(device))
