"""`koine align online`: train a model on its own scored completions."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click

from koine.cli.align.score import open_reward
from koine.cli.answers import print_answer
from koine.cli.arguments import DEVICE, MODEL
from koine.cli.commands import Command
from koine.cli.outputs import InputFile, OutputFolder
from koine.cli.recording import recorded_output
from koine.cli.training_options import LORA_PREFIX, setting_options, take
from koine.errors import UserError
from koine.model.lora.config import LoraConfig
from koine.train.settings import TrainSettings

if TYPE_CHECKING:
    from koine.align.online import OnlineSettings, ReferenceName
    from koine.align.prompts import Prompt
    from koine.model.language_model import LanguageModel

FIXED = ("spike_deviations", "spike_rise", "spike_window", "evaluate_every", "best_metric")
"""Settings without an option: the loss of a policy gradient is no likelihood, and may rise."""


def _training_options(command: Any) -> Any:
    for option in reversed((*setting_options(leave_out=FIXED), *setting_options(LoraConfig, LORA_PREFIX))):
        command = option(command)
    return command


@click.command(cls=Command)
@click.option(
    "--model", type=MODEL, required=True, help="Model folder, or OWNER/NAME of the hub, to start from."
)
@click.option(
    "--prompts",
    type=InputFile(),
    required=True,
    help="Rows with `prompt`, text or messages, and what the reward reads.",
)
@click.option(
    "--loss",
    required=True,
    metavar="LOSS",
    help="rloo or copg: policy gradients on all completions. dpo and others of pairs: the best against the worst. "
    "nll: fine-tuning on the best.",
)
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
@click.option("--k", type=int, default=4, show_default=True, help="Completions of each prompt.")
@click.option(
    "--prompts-per-step",
    type=int,
    default=16,
    show_default=True,
    help="Prompts of a step, over all processes.",
)
@click.option("--steps", type=int, default=100, show_default=True, help="Steps of each round.")
@click.option(
    "--draw-every",
    type=int,
    default=1,
    show_default=True,
    help="Steps between two draws; later ones train on completions of an earlier policy.",
)
@click.option(
    "--rounds",
    type=int,
    default=1,
    show_default=True,
    help="Trainings one after another, each with a new schedule and optimiser.",
)
@click.option(
    "--merge-weight",
    type=float,
    help="After each round, merge its model with this weight with the model that it started from.",
)
@click.option(
    "--reference",
    default="start",
    show_default=True,
    metavar="start|round|MODEL|none",
    help="Reference of the loss: the first model, that before each round, a model folder, or none.",
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Sampling temperature.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus sampling, for pairs only.")
@click.option(
    "--top-k", type=int, default=0, show_default=True, help="The k likeliest tokens, for pairs only."
)
@click.option(
    "--max-new-tokens", type=int, default=256, show_default=True, help="Most tokens of a completion."
)
@click.option(
    "--max-batch", type=int, default=64, show_default=True, help="Completions that are sampled at once."
)
@DEVICE
@click.option(
    "--out", type=OutputFolder(), required=True, help="Folder of the trained model, or of the rounds."
)
@click.option(
    "--dry-run", is_flag=True, help="Print how many completions and tokens would be drawn; train nothing."
)
@_training_options
def online(
    model: Path,
    prompts: Path,
    loss: str,
    reward_text: str,
    reward_model: Path | None,
    judge: Path | None,
    judge_template: Path | None,
    reference: str,
    device: str,
    out: Path,
    dry_run: bool,
    **options: Any,
) -> None:
    """Draw completions, score them, and train on them, step by step.

    Completions and scores are kept in OUT/rollouts. Run the same command again to resume.
    """
    from koine.align.online import ROLLOUTS, summary_of, train_online
    from koine.align.prompts import read_prompts
    from koine.tokenizer import load_tokenizer

    settings_of_drawing = _online_settings(loss, options)
    lora: LoraConfig = take(LoraConfig, options, LORA_PREFIX)
    settings = TrainSettings(spike_deviations=0, **options)
    place = _reference(reference)
    if lora.rank and settings_of_drawing.rounds > 1:
        raise UserError(
            "an adapter cannot be trained in rounds: the next one would start from the adapter alone",
            hint="train one round, or without --lora-rank",
        )
    reward = open_reward(reward_text, judge, judge_template, device, reward_model)
    tokenizer = load_tokenizer(model)
    rows = read_prompts(prompts, tokenizer)
    if dry_run:
        _print_counts(settings_of_drawing, rows)
        return

    def prepare(policy: LanguageModel, folder: Path) -> None:
        if lora.rank:
            from koine.model.lora.adapter import add_lora

            add_lora(policy, lora, base=folder, seed=settings.seed)

    parents = {"model": model, "prompts": prompts, "judge": judge, "reward_model": reward_model}
    with recorded_output(out, parents, metrics=lambda folder: {}):
        last = train_online(
            model,
            rows,
            reward,
            reward_name=reward_identity(reward_text, reward_model, judge, judge_template),
            online=settings_of_drawing,
            settings=settings,
            tokenizer=tokenizer,
            out=out,
            reference=place,
            device=device,
            prepare=prepare,
        )
    if os.environ.get("RANK", "0") != "0":
        return
    folders = [out] if settings_of_drawing.rounds == 1 else sorted(out.glob("round-*"))
    rounds = [{"folder": folder, **summary_of(folder / ROLLOUTS)} for folder in folders]
    print_answer({"written": last, "rounds": rounds}, lambda: _show(rounds))


def reward_identity(text: str, reward_model: Path | None, judge: Path | None, template: Path | None) -> str:
    """Return the text of a reward with digests of the rest: the weights of its models, the template.

    A folder of other weights under the same name is another reward; a copy of a folder is the same one.
    """
    from koine.model.formats.tensor_digest import folder_digest

    parts = [text]
    for name, model in (("reward model", reward_model), ("judge", judge)):
        if model is not None:
            # Pickled weights have no digest: the folder must then stay where it is.
            digest = folder_digest(model)
            parts.append(f"{name} {digest[:16] if digest else model.absolute()}")
    if template is not None:
        parts.append(f"template {hashlib.sha256(template.read_bytes()).hexdigest()[:16]}")
    return "; ".join(parts)


def _reference(text: str) -> ReferenceName | Path:
    from koine.align.online import ReferenceName

    if text in get_args(ReferenceName):
        return cast("ReferenceName", text)
    if not Path(text).is_dir():
        raise UserError(
            "no such model directory", where=text, hint="give start, round, none or a model folder"
        )
    return Path(text)


def _online_settings(loss: str, options: dict[str, Any]) -> OnlineSettings:
    from koine.align.loss_spec import LossSpec
    from koine.align.online import OnlineSettings
    from koine.generate.sampling import Sampling

    names = ("temperature", "top_p", "top_k", "max_new_tokens")
    sampling = Sampling(**{name: options.pop(name) for name in names})
    fields = ("k", "steps", "rounds", "draw_every", "merge_weight", "max_batch")
    return OnlineSettings(
        loss=LossSpec.parse(loss),
        prompts=options.pop("prompts_per_step"),
        sampling=sampling,
        **{name: options.pop(name) for name in fields},
    )


def _print_counts(online: OnlineSettings, prompts: list[Prompt]) -> None:
    drawn = online.prompts * online.steps * online.rounds
    read = sum(len(prompt.tokens) for prompt in prompts) * drawn // len(prompts)
    answer = {
        "prompts": len(prompts),
        "epochs": drawn / len(prompts),
        "completions": drawn * online.k,
        "prompt_tokens": read,
        "new_tokens_at_most": drawn * online.k * online.sampling.max_new_tokens,
    }

    def show() -> None:
        click.echo(
            f"{answer['completions']:,} completions of {len(prompts):,} prompts ({answer['epochs']:.1f} epochs)"
        )
        click.echo(f"{read:,} tokens of prompts, at most {answer['new_tokens_at_most']:,} new ones")

    print_answer(answer, show)


def _show(rounds: list[dict[str, Any]]) -> None:
    for one in rounds:
        mean = "none" if one["mean_score"] is None else f"{one['mean_score']:.4f}"
        click.echo(f"{one['folder']}: {one['scored']:,} completions scored, mean {mean}")
        for reason, count in one["failures"].items():
            click.echo(f"{count:,} without a score: {reason}")
