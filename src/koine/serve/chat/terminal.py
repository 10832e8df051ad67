"""The terminal's side of a chat: reading lines, streaming answers, commands, Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from koine.errors import UserError, did_you_mean
from koine.generate.sampling import Sampling
from koine.serve.chat.conversation import Conversation
from koine.terminal import printable

if TYPE_CHECKING:
    from koine.generate.engine import StreamingEngine

HELP = """\
/help               this page
/reset              forget the conversation; the system text stays
/system             show the system text
/system TEXT        set it (/system - removes it)
/set                show the sampling settings
/set NAME VALUE     change one, such as /set temperature 0.5
/quit               leave (also Ctrl-D)
//text              a message that begins with a slash
Ctrl-C stops an answer; at the empty prompt, twice, it leaves."""
COMMANDS = ("/help", "/reset", "/system", "/set", "/quit")
PROMPT = "> "


class Stop:
    """Whether Ctrl-C asked to stop what is running."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def ctrl_c_stops() -> Iterator[Stop]:
    """Inside, the first Ctrl-C sets the flag; a second one interrupts wherever the program is."""
    stop = Stop()

    def handle(signum: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class Rate:
    """How fast an answer came: tokens written, seconds to the first and from the first to the last."""

    tokens: int
    first_seconds: float
    rest_seconds: float

    def described(self) -> str:
        """Tokens per second leave the first token out: its time is the prompt's."""
        after_first = self.tokens - 1
        speed = (
            f", {after_first / self.rest_seconds:.1f} tokens/s" if after_first > 0 < self.rest_seconds else ""
        )
        return f"{self.tokens} token{'' if self.tokens == 1 else 's'}{speed}, first after {self.first_seconds:.2f} s"


class Chat:
    """One conversation with one engine; answers go to `out`, remarks to `remarks`."""

    def __init__(
        self,
        engine: StreamingEngine,
        *,
        system: str | None,
        sampling: Sampling,
        out: TextIO,
        remarks: TextIO,
        interactive: bool,
    ) -> None:
        self.engine = engine
        self.conversation = Conversation(system=system)
        self.sampling = sampling
        self.out = out
        self.remarks = remarks
        self.interactive = interactive

    def handle(self, line: str) -> bool:
        """Carry out one line, a command or a question; False where it asks to leave."""
        if line.startswith("/") and not line.startswith("//"):
            return self.command(line)
        self.answer(line[1:] if line.startswith("//") else line)
        return True

    def command(self, line: str) -> bool:
        """Carry out a command; raises `UserError` for an unknown one or a wrong value."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return False
        if name == "/help":
            self.remark(HELP)
        elif name == "/reset":
            self.conversation.reset()
            self.remark("(forgot the conversation)")
        elif name == "/system":
            self.set_system(rest)
        elif name == "/set":
            self.set_sampling(rest)
        else:
            raise UserError(f"unknown command '{name}'", hint=did_you_mean(name, COMMANDS))
        return True

    def set_system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == "-" else text
        system = self.conversation.system
        self.remark("(no system text)" if system is None else f"(system: {system})")

    def set_sampling(self, rest: str) -> None:
        if rest:
            words = rest.replace("=", " ").split()
            if len(words) != 2:
                raise UserError(f"/set {rest}", hint="write /set NAME VALUE, such as /set temperature 0.5")
            self.sampling = self.sampling.replaced(words[0], words[1])
        self.remark(f"({self.sampling.described()})")

    def answer(self, question: str) -> None:
        """Ask, stream the answer as it comes, and say how fast it was; what Ctrl-C leaves of it stays in the history."""
        self.conversation.add_user(question)
        try:
            fitted = self.conversation.fit(
                self.engine.encode, context=self.engine.context, reserve=self.sampling.max_new_tokens
            )
        except UserError:
            self.conversation.drop_unanswered()
            raise
        if fitted.dropped:
            turns = f"{fitted.dropped} oldest turn{'' if fitted.dropped == 1 else 's'}"
            self.remark(
                f"(forgot the {turns}: the conversation is longer than the model's {self.engine.context} tokens)"
            )
        sampling = replace(self.sampling, max_new_tokens=fitted.max_new_tokens)
        text, stopped, ended, rate = self.stream(fitted.prompt, sampling)
        self.write("\n")
        self.conversation.add_assistant(text)
        notes = [rate.described()] if rate.tokens else ["no token"]
        if stopped:
            notes.append("stopped")
        elif not ended:
            notes.append("cut at max-new-tokens" if sampling == self.sampling else "cut at the context's end")
        self.remark(f"[{', '.join(notes)}]")

    def stream(self, prompt: list[int], sampling: Sampling) -> tuple[str, bool, bool, Rate]:
        """Write the answer piece by piece; (its text, whether Ctrl-C stopped it, whether it ended by itself, its rate)."""
        decoder = self.engine.tokenizer.stream_decoder()
        pieces: list[str] = []
        count, ended = 0, False
        start = first = last = time.perf_counter()
        with ctrl_c_stops() as stop:
            for token in self.engine.stream(prompt, sampling):
                last = time.perf_counter()
                count += 1
                if count == 1:
                    first = last
                ended = token.stops
                pieces.append("" if ended else decoder.push(token.id))
                self.write(pieces[-1])
                if stop.asked:
                    break
            pieces.append(decoder.flush())
            self.write(pieces[-1])
            stopped = stop.asked and not ended
        return "".join(pieces), stopped, ended, Rate(count, first - start, last - first)

    def write(self, text: str) -> None:
        # Also where the questions come through a pipe: a terminal must not obey an answer.
        self.out.write(printable(text) if self.interactive or self.out.isatty() else text)
        self.out.flush()

    def remark(self, text: str) -> None:
        """Something about the chat that is not part of an answer; kept out of a script's output."""
        dim, plain = ("\x1b[2m", "\x1b[0m") if self.interactive and self.remarks.isatty() else ("", "")
        self.remarks.write(f"{dim}{printable(text)}{plain}\n")
        self.remarks.flush()


def run_interactive(chat: Chat) -> None:
    """Read lines at a prompt until /quit, Ctrl-D, or Ctrl-C twice at the empty prompt."""
    import readline  # noqa: F401  (line editing and recall of earlier questions for input())

    interrupted = False
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            chat.write("\n")
            return
        except KeyboardInterrupt:
            chat.write("\n")
            if interrupted:
                return
            interrupted = True
            chat.remark("(Ctrl-C again, /quit or Ctrl-D leaves)")
            continue
        interrupted = False
        if not line.strip():
            continue
        try:
            if not chat.handle(line):
                return
        except UserError as error:
            chat.remark(f"({error})")
        except KeyboardInterrupt:
            chat.conversation.drop_unanswered()
            chat.write("\n")
            chat.remark("(stopped)")


def run_lines(chat: Chat, lines: BinaryIO) -> None:
    """Answer each line of a pipe or file in turn; the first mistake ends it with a `UserError`."""
    for number, raw in enumerate(lines, start=1):
        try:
            line = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UserError(
                f"line {number} is not UTF-8",
                where="standard input",
                hint="convert it, for example with iconv",
            ) from None
        if line.strip() and not chat.handle(line):
            return


def standard_streams() -> bool:
    """Whether a person sits at standard input and output; characters that the terminal lacks become `?`."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    return sys.stdin.isatty() and sys.stdout.isatty()
