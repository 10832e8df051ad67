"""Chat in the terminal: input lines, streamed replies, commands, Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from koine.align.revise import revision_turns
from koine.errors import UserError, did_you_mean
from koine.generate.sampling import Sampling
from koine.serve.chat.conversation import Conversation, FittedPrompt
from koine.terminal import is_quiet, printable

if TYPE_CHECKING:
    from koine.generate.engine import StreamingEngine

HELP = """\
/help               show this help
/reset              clear the history; the system prompt stays
/system             show the system prompt
/system TEXT        set the system prompt (/system - removes it)
/set                show the sampling settings
/set NAME VALUE     change one, such as /set temperature 0.5
/quit               leave (also Ctrl-D)
//text              send a message that begins with a slash
Ctrl-C stops a reply; twice at the empty prompt, it leaves."""
COMPLETE_HELP = """\
/help               show this help
/set                show the sampling settings
/set NAME VALUE     change one, such as /set temperature 0.5
/quit               leave (also Ctrl-D)
//text              continue a text that begins with a slash
Ctrl-C stops a completion; twice at the empty prompt, it leaves."""
COMMANDS = ("/help", "/reset", "/system", "/set", "/quit")
PROMPT = "> "


class StopFlag:
    """Set by Ctrl-C to stop the running reply."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def ctrl_c_stops() -> Iterator[StopFlag]:
    """Let the first Ctrl-C set a flag; a second one raises `KeyboardInterrupt`."""
    stop = StopFlag()

    def handle(signum: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class Rate:
    """Speed of a reply: tokens, seconds to the first token, and seconds from the first to the last."""

    tokens: int
    first_seconds: float
    rest_seconds: float

    def described(self) -> str:
        """Return one line. Tokens per second exclude the first token, whose time is the prefill's."""
        after_first = self.tokens - 1
        speed = (
            f", {after_first / self.rest_seconds:.1f} tokens/s" if after_first > 0 < self.rest_seconds else ""
        )
        tokens = f"{self.tokens} token{'' if self.tokens == 1 else 's'}"
        return f"{tokens}{speed}, first after {self.first_seconds:.2f} s"


@dataclass(frozen=True)
class Reply:
    """A streamed reply.

    stopped: whether Ctrl-C stopped it. ended: whether the model ended it with a stop token.
    """

    text: str
    stopped: bool
    ended: bool
    rate: Rate


class Chat:
    """One conversation with one engine. Replies go to `out`, messages about the chat to `notices`."""

    def __init__(
        self,
        engine: StreamingEngine,
        *,
        system: str | None,
        sampling: Sampling,
        out: TextIO,
        notices: TextIO,
        interactive: bool,
        trained_context: int | None = None,
        complete: bool = False,
        revisions: int = 0,
        revision: str = "",
    ) -> None:
        """Begin a conversation.

        trained_context: tokens of the longest texts that the model was trained on, beyond which it warns.
        complete: continue each line as raw text, by itself, without a chat template.
        revisions: how often each reply is revised. Only the last one stays in the history, and without a
            terminal only that is shown.
        revision: the user's turn that asks for it.
        """
        self.revisions, self.revision = revisions, revision
        self.complete = complete
        self.trained_context = trained_context
        self.warned = False
        self.engine = engine
        self.conversation = Conversation(system=system)
        self.sampling = sampling
        self.out = out
        self.notices = notices
        self.interactive = interactive

    def handle(self, line: str) -> bool:
        """Handle one line, a command or a user message; return False for `/quit`."""
        if line.startswith("/") and not line.startswith("//"):
            return self.command(line)
        self.reply(line[1:] if line.startswith("//") else line)
        return True

    def command(self, line: str) -> bool:
        """Run a command; return False for `/quit`. Raises `UserError` for an unknown one or a wrong value."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return False
        if name == "/help":
            self.notice(COMPLETE_HELP if self.complete else HELP)
        elif self.complete and name in ("/reset", "/system"):
            raise UserError(f"{name} needs a chat", hint="with --complete each text is continued by itself")
        elif name == "/reset":
            self.conversation.reset()
            self.warned = False
            self.notice("(history cleared)")
        elif name == "/system":
            self.set_system(rest)
        elif name == "/set":
            self.set_sampling(rest)
        else:
            raise UserError(f"unknown command '{name}'", hint=did_you_mean(name, COMMANDS))
        return True

    def set_system(self, text: str) -> None:
        """Set the system prompt (`-` removes it, no text leaves it), and show it."""
        if text:
            self.conversation.system = None if text == "-" else text
        system = self.conversation.system
        self.notice("(no system prompt)" if system is None else f"(system prompt: {system})")

    def set_sampling(self, rest: str) -> None:
        """Change a sampling setting, `NAME VALUE`, and show all settings."""
        if rest:
            words = rest.replace("=", " ").split()
            if len(words) != 2:
                raise UserError(f"/set {rest}", hint="write /set NAME VALUE, such as /set temperature 0.5")
            self.sampling = self.sampling.replaced(words[0], words[1])
        self.notice(f"({self.sampling.described()})")

    def reply(self, message: str) -> None:
        """Stream the reply to a user message, or the rest of a text, then show its speed.

        A reply stopped by Ctrl-C stays in the history.
        """
        fitted = self.fit_text(message) if self.complete else self.fit_conversation(message)
        if fitted.dropped:
            turns = f"{fitted.dropped} oldest turn{'' if fitted.dropped == 1 else 's'}"
            self.note(
                f"(dropped the {turns}: the conversation exceeds the model's context "
                f"of {self.engine.context} tokens)"
            )
        sampling = replace(self.sampling, max_new_tokens=fitted.max_new_tokens)
        reply = self.stream(fitted.prompt, sampling, shown=self.interactive or not self.revisions)
        reply = self.revise(reply)
        self.write("\n")
        if not self.complete:
            self.conversation.add_assistant(reply.text)
        notes = [reply.rate.described()] if reply.rate.tokens else ["no token"]
        if reply.stopped:
            notes.append("stopped")
        elif not reply.ended:
            notes.append("cut at max-new-tokens" if sampling == self.sampling else "cut at the context's end")
        self.note(f"[{', '.join(notes)}]")
        self.warn_of_length(len(fitted.prompt) + reply.rate.tokens)

    def revise(self, reply: Reply) -> Reply:
        """Ask for better replies, one after another, and return the last one.

        The model reads the conversation and the reply before. Ctrl-C keeps the reply that it stops.
        """
        for number in range(1, self.revisions + 1):
            messages = revision_turns(self.conversation.messages(), reply.text, self.revision)
            prompt = self.engine.encode(messages)
            room = self.engine.context - len(prompt)
            if reply.stopped or room < 1:
                if not self.interactive:
                    self.write(reply.text)
                if not reply.stopped:
                    self.note(f"(no room in the model's context for revision {number})")
                return reply
            if self.interactive:
                self.write("\n")
                self.note(f"(revision {number} of {self.revisions})")
            sampling = replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))
            reply = self.stream(prompt, sampling, shown=self.interactive or number == self.revisions)
        return reply

    def fit_conversation(self, message: str) -> FittedPrompt:
        """Add a user message to the history, and return the prompt that fits into the context."""
        self.conversation.add_user(message)
        try:
            return self.conversation.fit(
                self.engine.encode, context=self.engine.context, reserve=self.sampling.max_new_tokens
            )
        except UserError:
            self.conversation.drop_unanswered()
            raise

    def fit_text(self, text: str) -> FittedPrompt:
        """Return the prompt of a text to continue. Raises `UserError` where it fills the context."""
        prompt = self.engine.encode_text(text)
        room = self.engine.context - len(prompt)
        if room < 1:
            raise UserError(
                f"the text is {len(prompt)} tokens long and the model's context holds {self.engine.context}",
                hint="give a shorter one",
            )
        return FittedPrompt(prompt, min(self.sampling.max_new_tokens, room), dropped=0)

    def warn_of_length(self, tokens: int) -> None:
        """Say once a conversation that it is longer than the texts of the training.

        tokens: of the conversation, the last reply included.
        """
        if self.trained_context is None or self.warned or tokens <= self.trained_context:
            return
        self.warned = True
        what, rest = ("text", "") if self.complete else ("conversation", "; /reset starts again")
        self.note(
            f"(the {what} has {tokens:,} tokens and the model was trained on at most "
            f"{self.trained_context:,} at a time: expect worse answers{rest})"
        )

    def stream(self, prompt: list[int], sampling: Sampling, *, shown: bool = True) -> Reply:
        """Write the reply piece by piece unless it is not to be shown, and return it."""
        write = self.write if shown else _write_nothing
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
                write(pieces[-1])
                if stop.requested:
                    break
            pieces.append(decoder.flush())
            write(pieces[-1])
            stopped = stop.requested and not ended
        return Reply("".join(pieces), stopped, ended, Rate(count, first - start, last - first))

    def write(self, text: str) -> None:
        """Write a piece of a reply."""
        # Escaped also where input comes through a pipe: a reply must not control a terminal.
        self.out.write(printable(text) if self.interactive or self.out.isatty() else text)
        self.out.flush()

    def note(self, text: str) -> None:
        """Print a line that nobody asked for, such as a reply's speed; nothing under `--quiet`."""
        if not is_quiet():
            self.notice(text)

    def notice(self, text: str) -> None:
        """Write a message about the chat, not to `out`: a script's output holds replies only."""
        dim, plain = ("\x1b[2m", "\x1b[0m") if self.interactive and self.notices.isatty() else ("", "")
        self.notices.write(f"{dim}{printable(text)}{plain}\n")
        self.notices.flush()


def _write_nothing(text: str) -> None:
    """Take a piece of a reply that is not shown."""


def run_interactive(chat: Chat) -> None:
    """Read lines at a prompt until /quit, Ctrl-D, or Ctrl-C twice at the empty prompt."""
    import readline  # noqa: F401  (line editing and history for input())

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
            chat.notice("(Ctrl-C again, /quit or Ctrl-D leaves)")
            continue
        interrupted = False
        if not line.strip():
            continue
        try:
            if not chat.handle(line):
                return
        except UserError as error:
            chat.notice(f"({error})")
        except KeyboardInterrupt:
            chat.conversation.drop_unanswered()
            chat.write("\n")
            chat.notice("(stopped)")


def run_lines(chat: Chat, lines: BinaryIO) -> None:
    """Reply to each line of a pipe or file. The first mistake raises `UserError`."""
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
    """Return whether standard input and output are a terminal. Characters that it cannot show become `?`."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    return sys.stdin.isatty() and sys.stdout.isatty()
