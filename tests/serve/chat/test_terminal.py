"""Replies, history and commands of the chat, with a scripted engine."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence

import pytest

from koine.errors import UserError
from koine.generate.engine import Token
from koine.generate.messages import Message
from koine.generate.sampling import Sampling
from koine.serve.chat.terminal import Chat, Rate, run_lines
from koine.terminal import printable, quiet_output
from koine.tokenizer import Tokenizer, train_tokenizer
from koine.tokenizer.special import SMALLEST_VOCABULARY


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes only: every character outside ASCII takes several tokens."""
    return train_tokenizer({"de": lambda: ["ein Text"]}, vocab_size=SMALLEST_VOCABULARY, scheme="uniform")


class Scripted:
    """An engine that streams given replies, byte by byte."""

    def __init__(self, tokenizer: Tokenizer, answers: list[str], *, context: int = 1000) -> None:
        self.tokenizer = tokenizer
        self.answers = answers
        self.context = context
        self.prompts: list[list[Message]] = []
        self.texts: list[str] = []
        self.samplings: list[Sampling] = []
        self.before_token: Callable[[int], None] = lambda count: None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        self.prompts.append([dict(message) for message in messages])
        return self.tokenizer.encode_messages(messages, generation_prompt=True)[0]

    def encode_text(self, text: str) -> list[int]:
        self.texts.append(text)
        return self.tokenizer.encode_prompt(text)

    def stream(self, prompt: list[int], sampling: Sampling) -> Iterator[Token]:
        self.samplings.append(sampling)
        ids = self.tokenizer.encode(self.answers.pop(0))[: sampling.max_new_tokens - 1]
        for count, token in enumerate(ids):
            self.before_token(count)
            yield Token(token, -1.0, False)
        yield Token(self.tokenizer.eos_id, -0.5, True)


class Sink(io.StringIO):
    """Keeps every write separately."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def chat_with(
    engine: Scripted, *, interactive: bool = False, system: str | None = None
) -> tuple[Chat, Sink, Sink]:
    out, notices = Sink(), Sink()
    chat = Chat(engine, system=system, sampling=Sampling(), out=out, notices=notices, interactive=interactive)
    return chat, out, notices


def test_a_reply_streams_in_complete_characters_and_joins_the_history(tokenizer: Tokenizer) -> None:
    engine = Scripted(tokenizer, ["κοινή 👩‍👩‍👧 हिन्दी", "ja"])
    chat, out, notices = chat_with(engine)
    assert chat.handle("Wie heißt das?")
    assert out.getvalue() == "κοινή 👩‍👩‍👧 हिन्दी\n"
    assert all("\ufffd" not in piece for piece in out.pieces)
    assert len([piece for piece in out.pieces if piece]) > 10  # it came in pieces
    assert "tokens/s, first after" in notices.getvalue()
    chat.handle("Wirklich?")
    assert [message["content"] for message in engine.prompts[-1]] == [
        "Wie heißt das?",
        "κοινή 👩‍👩‍👧 हिन्दी",
        "Wirklich?",
    ]


def test_a_reply_cut_inside_a_character_shows_one_replacement_character(tokenizer: Tokenizer) -> None:
    engine = Scripted(tokenizer, [])
    chat, out, notices = chat_with(engine)
    half = tokenizer.encode("a€")[:-1]
    engine.stream = lambda prompt, sampling: iter([Token(token, -1.0, False) for token in half])  # type: ignore[method-assign]
    chat.handle("?")
    assert out.getvalue() == "a\ufffd\n"
    assert "cut at max-new-tokens" in notices.getvalue()


def test_ctrl_c_stops_the_reply_and_keeps_its_text(tokenizer: Tokenizer) -> None:
    engine = Scripted(tokenizer, ["abcdefgh", "weiter"])
    chat, out, notices = chat_with(engine)

    def interrupt(count: int) -> None:
        if count == 3:
            os.kill(os.getpid(), signal.SIGINT)

    engine.before_token = interrupt
    before = signal.getsignal(signal.SIGINT)
    chat.handle("?")
    assert out.getvalue() == "abcd\n"
    assert "stopped" in notices.getvalue()
    assert signal.getsignal(signal.SIGINT) == before
    engine.before_token = lambda count: None
    chat.handle("go on")
    assert engine.prompts[-1][1] == {"role": "assistant", "content": "abcd"}


def test_commands(tokenizer: Tokenizer) -> None:
    engine = Scripted(tokenizer, ["eins", "zwei", "drei"])
    chat, _, notices = chat_with(engine, system="kurz")
    chat.handle("a")
    chat.handle("/system sei höflich")
    chat.handle("b")
    assert engine.prompts[-1][0] == {"role": "system", "content": "sei höflich"}
    chat.handle("/reset")
    chat.handle("/system -")
    chat.handle("/set temperature 0.5")
    chat.handle("/set top-k=7")
    chat.handle("//c")
    assert engine.prompts[-1] == [{"role": "user", "content": "/c"}]
    assert (engine.samplings[-1].temperature, engine.samplings[-1].top_k) == (0.5, 7)
    chat.handle("/help")
    for word in ("/reset", "/system", "/set", "/quit", "Ctrl-C", "temperature 0.5"):
        assert word in notices.getvalue()
    assert chat.handle("/quit") is False


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/rest", "unknown command '/rest'; did you mean '/reset'"),
        ("/set temprature 1", "unknown setting 'temprature'; did you mean 'temperature'"),
        ("/set temperature", "/set temperature; write /set NAME VALUE"),
        ("/set top-p 3", "top-p is 3.0; it must be at most 1"),
    ],
)
def test_a_wrong_command_is_refused_and_changes_nothing(tokenizer: Tokenizer, line: str, says: str) -> None:
    chat, _, _ = chat_with(Scripted(tokenizer, []))
    with pytest.raises(UserError) as error:
        chat.handle(line)
    assert says in str(error.value)
    assert chat.sampling == Sampling()


def test_dropped_turns_are_reported(tokenizer: Tokenizer) -> None:
    engine = Scripted(tokenizer, ["b" * 20, "d" * 20], context=64)
    chat, _, notices = chat_with(engine)
    chat.handle("a" * 10)
    chat.handle("c" * 10)
    assert (
        "dropped the 2 oldest turns: the conversation exceeds the model's context of 64 tokens"
        in notices.getvalue()
    )


def test_a_conversation_longer_than_the_training_texts_is_named_once(tokenizer: Tokenizer) -> None:
    engine = Scripted(tokenizer, ["b" * 5, "d" * 30, "e", "f" * 60])
    chat, _, notices = chat_with(engine)
    chat.trained_context = 48
    chat.handle("a" * 5)
    assert "trained on" not in notices.getvalue()
    chat.handle("c")
    assert "the model was trained on at most 48 at a time: expect worse answers" in notices.getvalue()
    chat.handle("c")
    assert notices.getvalue().count("trained on") == 1
    chat.handle("/reset")
    chat.handle("c")
    assert notices.getvalue().count("trained on") == 2


def test_quiet_prints_replies_and_answers_to_commands_only(tokenizer: Tokenizer) -> None:
    engine = Scripted(tokenizer, ["b" * 20, "d" * 20], context=64)
    chat, out, notices = chat_with(engine)
    chat.trained_context = 8
    with quiet_output():
        chat.handle("a" * 10)
        chat.handle("c" * 10)
        assert notices.getvalue() == ""
        chat.handle("/system")
    assert out.getvalue() == "b" * 20 + "\n" + "d" * 20 + "\n"
    assert notices.getvalue() == "(no system prompt)\n"


def test_a_message_that_does_not_fit_is_removed(tokenizer: Tokenizer) -> None:
    chat, _, _ = chat_with(Scripted(tokenizer, [], context=16))
    with pytest.raises(UserError, match="context holds 16"):
        chat.handle("x" * 40)
    assert chat.conversation.turns == []


def test_lines_of_a_pipe_are_messages_and_only_replies_are_written(tokenizer: Tokenizer) -> None:
    chat, out, _ = chat_with(Scripted(tokenizer, ["eins", "zwei"]))
    run_lines(chat, io.BytesIO(b"erste\r\n\n  \nzweite Frage ohne Ende"))
    assert out.getvalue() == "eins\nzwei\n"
    with pytest.raises(UserError, match="standard input: line 2 is not UTF-8"):
        run_lines(chat_with(Scripted(tokenizer, ["eins"]))[0], io.BytesIO(b"a\nb\xff\n"))


def test_a_reply_cannot_control_the_terminal(tokenizer: Tokenizer) -> None:
    chat, out, _ = chat_with(Scripted(tokenizer, ["a\x1b[2Jb\tc\n\x07"]), interactive=True)
    chat.handle("?")
    assert out.getvalue() == "a\\x1b[2Jb\tc\n\\x07\n"
    assert printable("\u0085\u200d👩") == "\\x85\u200d👩"


def test_the_rate_excludes_the_first_token() -> None:
    assert Rate(tokens=11, first_seconds=2.0, rest_seconds=5.0).described() == (
        "11 tokens, 2.0 tokens/s, first after 2.00 s"
    )
    assert Rate(tokens=1, first_seconds=0.5, rest_seconds=0.0).described() == "1 token, first after 0.50 s"


def test_a_text_is_continued_by_itself(tokenizer: Tokenizer) -> None:
    """No template and no history: the engine gets the raw text, with its spaces, and room for what fits."""
    engine, out, notices = Scripted(tokenizer, ["lag", " und rot", "!"], context=40), Sink(), Sink()
    chat = Chat(
        engine, system=None, sampling=Sampling(max_new_tokens=30), out=out, notices=notices,
        interactive=False, complete=True, trained_context=18,
    )  # fmt: skip
    run_lines(chat, io.BytesIO("  Die Straße \n\n//blau\nein Text ohne Ende\n".encode()))
    assert engine.texts == ["  Die Straße ", "/blau", "ein Text ohne Ende"]
    assert (engine.prompts, chat.conversation.turns) == ([], [])
    assert out.getvalue() == "lag\n und rot\n!\n"
    # 40 tokens of context; BOS, and a byte a token.
    assert [one.max_new_tokens for one in engine.samplings] == [40 - 15, 30, 40 - 19]
    assert (
        "the text has 19 tokens and the model was trained on at most 18 at a time: expect worse answers)"
        in (notices.getvalue())
    )
    with pytest.raises(UserError, match="the text is 41 tokens long and the model's context holds 40"):
        chat.handle("a" * 40)
    for command in ("/reset", "/system Kurz."):
        with pytest.raises(UserError, match="needs a chat; with --complete"):
            chat.handle(command)
    chat.handle("/help")
    assert "/reset" not in notices.getvalue().partition("/help  ")[2]
