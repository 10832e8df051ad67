"""`koine chat`: talk to a model in the terminal, or through a pipe."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from koine.generate.sampling import Sampling

DEFAULT = Sampling()


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--once", metavar="QUESTION", help="Answer one question and leave.")
@click.option("--system", metavar="TEXT", help="Text that sets the scene before the conversation.")
@click.option(
    "--temperature",
    type=float,
    default=DEFAULT.temperature,
    show_default=True,
    help="Divides the logits; 0 always takes the likeliest token.",
)
@click.option(
    "--top-k", type=int, default=DEFAULT.top_k, show_default=True, help="Keep the k likeliest tokens; 0: all."
)
@click.option(
    "--top-p",
    type=float,
    default=DEFAULT.top_p,
    show_default=True,
    help="Keep the likeliest tokens up to this probability.",
)
@click.option(
    "--min-p",
    type=float,
    default=DEFAULT.min_p,
    show_default=True,
    help="Keep tokens at least this share as likely as the likeliest.",
)
@click.option(
    "--repetition-penalty",
    type=float,
    default=DEFAULT.repetition_penalty,
    show_default=True,
    help="Above 1 discourages tokens that were there before.",
)
@click.option("--seed", type=int, help="Same seed, same answers.  [default: fresh each time]")
@click.option(
    "--max-new-tokens",
    type=int,
    default=DEFAULT.max_new_tokens,
    show_default=True,
    help="The longest answer.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Precision of the weights; auto: as saved.",
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, mps, ..."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's own]")
def chat(
    model: Path,
    once: str | None,
    system: str | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    max_new_tokens: int,
    dtype: str,
    device: str,
    threads: int | None,
) -> None:
    """Talk to MODEL, a model directory, in the terminal.

    Answers stream as they are written; /help lists the commands. Ctrl-C stops an answer, not the program. Without a
    terminal, each line of standard input is a question: echo "Hello" | koine chat MODEL
    """
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    from koine.generate.local_engine import LocalEngine
    from koine.serve.chat.terminal import Chat, run_interactive, run_lines, standard_streams

    engine = LocalEngine(model, dtype=None if dtype == "auto" else dtype, device=device, threads=threads)
    interactive = standard_streams()
    conversation = Chat(
        engine,
        system=system,
        sampling=sampling,
        out=sys.stdout,
        remarks=sys.stderr,
        interactive=interactive,
    )
    if once is not None:
        conversation.answer(once)
    elif interactive:
        conversation.remark(f"{engine.described()}; /help lists the commands")
        run_interactive(conversation)
    else:
        run_lines(conversation, sys.stdin.buffer)
