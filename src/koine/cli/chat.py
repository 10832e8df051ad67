"""`koine chat`: chat with a model in the terminal, or through a pipe."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click

from koine.cli.arguments import DEVICE, MODEL
from koine.cli.commands import Command
from koine.errors import UserError
from koine.generate.sampling import Sampling
from koine.terminal import is_quiet

DEFAULT = Sampling()


@click.command(cls=Command, answers=False)
@click.argument("model", type=MODEL)
@click.option("--once", metavar="TEXT", help="Print the reply to one message, then exit.")
@click.option(
    "--complete",
    is_flag=True,
    help="Continue each text instead of answering it: no chat template, no history.",
)
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option(
    "--temperature",
    type=float,
    default=DEFAULT.temperature,
    show_default=True,
    help="Sampling temperature; 0 is greedy decoding.",
)
@click.option(
    "--top-k",
    type=int,
    default=DEFAULT.top_k,
    show_default=True,
    help="Sample from the k likeliest tokens; 0: all.",
)
@click.option(
    "--top-p",
    type=float,
    default=DEFAULT.top_p,
    show_default=True,
    help="Nucleus sampling: sample from the likeliest tokens with this total probability.",
)
@click.option(
    "--min-p",
    type=float,
    default=DEFAULT.min_p,
    show_default=True,
    help="Sample from tokens with at least this share of the likeliest token's probability.",
)
@click.option(
    "--repetition-penalty",
    type=float,
    default=DEFAULT.repetition_penalty,
    show_default=True,
    help="Above 1: make tokens of the text so far less likely.",
)
@click.option(
    "--seed", type=int, help="Random seed; the same seed gives the same replies.  [default: fresh each time]"
)
@click.option(
    "--max-new-tokens",
    type=int,
    default=DEFAULT.max_new_tokens,
    show_default=True,
    help="Maximum number of tokens of a reply.",
)
@click.option(
    "--revise",
    "revisions",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Let the model revise each reply this many times (of a model trained by the loss srpo).",
)
@click.option(
    "--revision",
    metavar="TEXT",
    help="The turn that asks for a revision.  [default: that of the model's training]",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Dtype of the weights; auto: as saved.",
)
@DEVICE
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's own]")
def chat(
    model: Path,
    once: str | None,
    complete: bool,
    system: str | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    max_new_tokens: int,
    revisions: int,
    revision: str | None,
    dtype: str,
    device: str,
    threads: int | None,
) -> None:
    """Chat with MODEL, a model directory or OWNER/NAME of the hub, in the terminal.

    Replies stream as they are generated. /help lists the commands. Ctrl-C stops a reply, not the program.
    Without a terminal, each line of standard input is a message: echo "Hello" | koine chat MODEL
    A base model has no chat template; --complete continues text: koine chat MODEL --complete < texts.txt
    """
    if complete and system is not None:
        raise UserError("--system needs a chat", hint="write it into the text that --complete continues")
    if revisions and complete:
        raise UserError("--revise needs a chat", hint="leave out --complete")
    if revision is not None and not revisions:
        raise UserError("--revision without revisions", hint="say how many: --revise 1")
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    from koine.align.revise import revision_for
    from koine.generate.local_engine import LocalEngine
    from koine.hardware import chosen_device
    from koine.serve.chat.opening import read_opening
    from koine.serve.chat.terminal import Chat, run_interactive, run_lines, standard_streams
    from koine.tokenizer.tokenizer import lacks_chat_template

    if not complete and lacks_chat_template(model):
        raise UserError(
            "no chat template: a base model continues text",
            where=model,
            hint="use --complete, or add a chat_template.jinja to the folder",
        )
    turn = revision_for(model, revision) if revisions else ""
    engine = LocalEngine(
        model, dtype=None if dtype == "auto" else dtype, device=chosen_device(device), threads=threads
    )
    interactive = standard_streams()
    opening = read_opening(model)
    if complete:
        opening = replace(opening, examples=None)
    session = Chat(
        engine,
        system=system,
        sampling=sampling,
        out=sys.stdout,
        notices=sys.stderr,
        interactive=interactive,
        trained_context=opening.trained_context,
        complete=complete,
        revisions=revisions,
        revision=turn,
    )
    if once is not None:
        session.reply(once)
    elif interactive:
        if not is_quiet():
            session.notice("\n".join(opening.lines(engine.described(), engine.context)))
        run_interactive(session)
    else:
        run_lines(session, sys.stdin.buffer)
