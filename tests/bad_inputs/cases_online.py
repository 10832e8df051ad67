"""Bad inputs of online training and of revisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import worlds
from .case import Case

ONLINE = "align online --model model --prompts prompts.jsonl --reward length:most=3 --out new"


def with_prompts(*rows: Any) -> Callable[[Path], None]:
    """Write a model, and prompts.jsonl."""

    def prepare(folder: Path) -> None:
        worlds.having("model")(folder)
        worlds.write_lines(folder / "prompts.jsonl", list(rows) or [{"id": "a", "prompt": "Hallo"}])

    return prepare


CASES = (
    Case(
        mistake="a policy gradient with one completion of each prompt",
        command=f"{ONLINE} --loss copg --k 1",
        prepare=with_prompts(),
        says="k is 1: the loss 'copg:beta=0.1' compares the completions of a prompt; draw 2 or more of each",
    ),
    Case(
        mistake="truncated sampling for a policy gradient",
        command=f"{ONLINE} --loss rloo --top-p 0.9 --top-k 50",
        prepare=with_prompts(),
        says="top-k, top-p: a policy gradient needs completions of the policy itself; sample with a temperature only, or choose a loss of pairs",
    ),
    Case(
        mistake="greedy decoding for a policy gradient",
        command=f"{ONLINE} --loss rloo --temperature 0",
        prepare=with_prompts(),
        says="a temperature of 0 draws the same completion k times; choose a temperature above 0, such as 1",
    ),
    Case(
        mistake="a loss of labelled answers, online",
        command=f"{ONLINE} --loss kto",
        prepare=with_prompts(),
        says="the loss 'kto:beta=0.1' takes groups that rollouts do not make; choose one of scored completions (rloo, copg) or of pairs (dpo, nll, ...)",
    ),
    Case(
        mistake="a loss that needs a reference, without one",
        command=f"{ONLINE} --loss copg --reference none",
        prepare=with_prompts(),
        says="the loss copg:beta=0.1 needs a reference; give --reference start or --reference MODEL",
    ),
    Case(
        mistake="prompts without a prompt",
        command=f"{ONLINE} --loss rloo",
        prepare=with_prompts({"question": "Hallo"}),
        says="prompts.jsonl, line 1: the prompt is None; give text, or messages that end with the one to answer",
    ),
    Case(
        mistake="a prompt that ends with an answer",
        command=f"{ONLINE} --loss rloo",
        prepare=with_prompts({"prompt": [{"role": "assistant", "content": "Hallo"}]}),
        says="prompts.jsonl, line 1: the prompt ends with an answer; give text, or messages that end with the one to answer",
    ),
    Case(
        mistake="two prompts of one id",
        command=f"{ONLINE} --loss rloo",
        prepare=with_prompts({"id": "a", "prompt": "Hallo"}, {"id": "a", "prompt": "Servus"}),
        says="prompts.jsonl, line 2: the id 'a' stands at line 1 too; give each prompt its own",
    ),
    Case(
        mistake="more new tokens than the model's context holds",
        command=f"{ONLINE} --loss rloo --max-new-tokens 1000000",
        prepare=with_prompts(),
        says="prompt 'a': has … tokens, and with 1000000 new ones more than the … of the model's context; leave it out, or ask for fewer new tokens",
    ),
    Case(
        mistake="a revision of a model that was not trained to revise",
        command="chat model --once Hallo --revise 1",
        prepare=with_prompts(),
        says="model: was not trained to revise: its training.json names no turn that asks for it; train it with the loss srpo, or give the turn by --revision",
    ),
    Case(
        mistake="a turn that asks for a revision, and no revision",
        command="chat model --once Hallo --revision Again",
        prepare=with_prompts(),
        says="--revision without revisions; say how many: --revise 1",
    ),
    Case(
        mistake="a revision of a text that is continued",
        command="chat model --complete --once Hallo --revise 1",
        prepare=with_prompts(),
        says="--revise needs a chat; leave out --complete",
    ),
)
