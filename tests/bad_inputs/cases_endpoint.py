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
    bad_option("a temperature without end", "--temperature 1e999", "temperature is inf; it must be finite"),
    bad_option("a negative count of likeliest tokens", "--top-k -1", "top-k is -1; it must be at least 0"),
    bad_option("more likeliest tokens than any vocabulary has", "--top-k 99999999999999999999", "top-k is 99999999999999999999; it must be at most 2147483647"),
    bad_option("a top-p that is not a number", "--top-p nan", "top-p is nan; it must be a number"),
    bad_option("a negative min-p", "--min-p -0.1", "min-p is -0.1; it must be at least 0"),
    bad_option("a penalty of nothing", "--repetition-penalty 0", "repetition-penalty is 0.0; it must be greater than 0"),
    bad_option("a negative seed for an answer", "--seed -1", "seed is -1; it must be at least 0"),
    bad_option("a seed beyond 64 bits", "--seed 99999999999999999999", "seed is 99999999999999999999; it must be at most 9223372036854775807"),
    bad_option("an answer of no tokens", "--max-new-tokens 0", "max-new-tokens is 0; it must be at least 1"),
    bad_option("an answer longer than any context", "--max-new-tokens 99999999999", "max-new-tokens is 99999999999; it must be at most 2147483647"),
    bad_set("a setting of chat with a typo", "temperatur 0.5", "unknown setting 'temperatur'; did you mean 'temperature'?"),
    bad_set("a setting of chat that is no number", "temperature warm", "temperature is 'warm'; it must be a number"),
    bad_set("half a token of an answer", "max-new-tokens 1.5", "max-new-tokens is '1.5'; it must be an integer"),
    bad_set("a stop string as a setting of chat", "stop END", "unknown setting 'stop'; did you mean 'top-p' or 'top-k'?"),
    bad_set("a setting of chat out of range", "min-p 7", "min-p is 7.0; it must be at most 1"),
    bad_set("a setting of chat without its value", "top-k", "/set top-k; write /set NAME VALUE, such as /set temperature 0.5"),
    bad_set("a number of thousands of digits in chat", f"seed {'9' * 5000}", f"seed is '{'9' * 56}...; it must be an integer"),
)  # fmt: skip
