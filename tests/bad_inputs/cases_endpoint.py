"""Bad inputs around drawing an answer: the settings of `chat`, on its command line and in its pipe."""

from __future__ import annotations

from . import worlds
from .case import Case

CHAT = "chat model"


def bad_set(mistake: str, words: str, says: str) -> Case:
    """A setting changed within a conversation, through a pipe."""
    return Case(
        mistake=mistake,
        command=CHAT,
        prepare=worlds.having("model"),
        during=worlds.standard_input(f"/set {words}\nHello\n".encode()),
        simulated=f"the first line of standard input is `/set {words}`",
        says=says,
    )


def bad_option(mistake: str, option: str, says: str) -> Case:
    return Case(mistake=mistake, command=f"{CHAT} --once Hello {option}", says=says)


CASES = (
    bad_option("a temperature without end", "--temperature 1e999", "temperature is inf; give 0 (greedy) or more"),
    bad_option("a negative count of likeliest tokens", "--top-k -1", "top-k is -1; give 0 (all tokens) or more"),
    bad_option("more likeliest tokens than any vocabulary has", "--top-k 99999999999999999999", "top-k is 99999999999999999999; give a number below 2^31"),
    bad_option("a top-p that is not a number", "--top-p nan", "top-p is nan; give above 0 and at most 1"),
    bad_option("a negative min-p", "--min-p -0.1", "min-p is -0.1; give from 0 to 1"),
    bad_option("a penalty of nothing", "--repetition-penalty 0", "repetition-penalty is 0.0; give above 0; 1 changes nothing"),
    bad_option("a negative seed for an answer", "--seed -1", "seed is -1; give an integer from 0"),
    bad_option("a seed beyond 64 bits", "--seed 99999999999999999999", "seed is 99999999999999999999; give an integer from 0"),
    bad_option("an answer of no tokens", "--max-new-tokens 0", "max-new-tokens is 0; give at least 1"),
    bad_option("an answer longer than any context", "--max-new-tokens 99999999999", "max-new-tokens is 99999999999; give a number below 2^31"),
    bad_set("a setting of chat with a typo", "temperatur 0.5", "unknown setting 'temperatur'; did you mean 'temperature'?"),
    bad_set("a setting of chat that is no number", "temperature warm", "temperature is 'warm'; give a number"),
    bad_set("half a token of an answer", "max-new-tokens 1.5", "max-new-tokens is '1.5'; give an integer"),
    bad_set("a stop string as a setting of chat", "stop END", "unknown setting 'stop'; did you mean 'top-p' or 'top-k'?"),
    bad_set("a setting of chat out of range", "min-p 7", "min-p is 7.0; give from 0 to 1"),
    bad_set("a setting of chat without its value", "top-k", "/set top-k; write /set NAME VALUE, such as /set temperature 0.5"),
    bad_set("a number of thousands of digits in chat", f"seed {'9' * 5000}", f"seed is '{'9' * 56}...; give an integer"),
)  # fmt: skip
