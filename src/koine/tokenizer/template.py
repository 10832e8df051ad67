"""Render chat templates of other models in a Jinja sandbox, and find the spans that the assistant wrote.

Templates get the same variables, filters and functions as in `transformers`' `apply_chat_template`. The
sandbox limits time and size (`template_limits`).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from koine.errors import UserError, first_line

_REASONING = ("reasoning_content", "thinking", "reasoning")
# Variable with the two characters around a completion span; no template can write this name.
_MARKS = "generation marks"
# A template is foreign code: whatever it raises is the template's fault. Jinja's own errors are besides.
_RAISED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,  # RecursionError among them
    SyntaxError,  # of the Python that jinja2 writes: loops nested too deeply
    TypeError,
    ValueError,
)


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """Compile a template in the sandbox, with the tags, filters and globals of `transformers`."""
    from jinja2 import TemplateError, nodes, pass_context
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.utils import Namespace

    from koine.tokenizer.template_limits import LimitedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}`: what the model writes."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        @pass_context
        def _mark(self, context: Any, caller: Callable[[], str]) -> str:
            opening, closing = context[_MARKS]
            return f"{opening}{caller()}{closing}"

    class SafeDict:
        """`dict`, and nothing more of the class."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class SafeNamespace(Namespace):
        """A namespace without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, given = args[0], dict(*args[1:], **kwargs)
            for name in given:
                _check_name(name)
            Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            Namespace.__setitem__(self, name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"the name {name!r} begins with an underscore")

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.add_filter("tojson", to_json)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.globals["dict"] = SafeDict()
    environment.globals["namespace"] = SafeNamespace
    return environment.from_string(template)


def check_template(template: str, *, where: str | Path) -> None:
    """Raise `UserError` for a chat template that is too long or does not compile."""
    from jinja2 import TemplateError

    from koine.tokenizer.template_limits import TooMuchError, check_long

    try:
        check_long(template)
        _compile(template)
    except UserError as error:
        raise UserError(error.what, where=where, hint=error.hint) from None
    except (TemplateError, TooMuchError, *_RAISED) as error:
        raise UserError(
            f"the chat template does not compile ({type(error).__name__}: {first_line(error)[:300]})",
            where=where,
            hint="repair it, or import another file of the model",
        ) from None


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Filter `tojson` of chat templates."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def strftime_now(format: str) -> str:
    """Format the current time, for templates."""
    return datetime.datetime.now().strftime(format)


def free_characters(texts: Sequence[str]) -> Iterator[str]:
    """Yield private-use characters that occur in none of the texts."""
    used = {character for text in texts for character in text if character >= "\U000f0000"}
    planes = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
    return (chr(code) for plane in planes for code in plane if chr(code) not in used)


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string in a nested value of lists and mappings."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tokens: Mapping[str, str],
    generation_prompt: bool,
) -> tuple[str, list[tuple[int, int]] | None]:
    """Render a template; return the text and the character spans of its `generation` blocks.

    The spans are `None` if the template has no such blocks.

    Args:
        template: Jinja text.
        messages: the conversation.
        tokens: variables of the template, such as `bos_token` and `eos_token`.
        generation_prompt: whether the text ends with the marker after which the assistant answers.

    Raises:
        UserError: the template rejects the messages, fails, or takes more time or space than
            `template_limits` allows.
    """
    from jinja2 import TemplateError

    from koine.tokenizer.template_limits import TooMuchError, check_long, limited

    check_long(template)
    texts = list(strings_of(messages))
    free = free_characters([template, *texts, *tokens.values()])
    marks = next(free), next(free)
    given = {
        "messages": [_with_reasoning(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": generation_prompt,
        **tokens,
        _MARKS: marks,
    }
    pieces: list[str] = []
    try:
        with limited(sum(map(len, texts))) as budget:
            length = 0
            for piece in _compile(template).generate(**given):
                pieces.append(piece)
                length += len(piece)
                budget.allow(length)
    except TemplateError as error:
        raise UserError(f"the chat template refuses these messages ({str(error)[:300]})") from None
    except TooMuchError as error:
        raise UserError(f"the chat template {error}", hint="give another template") from None
    except _RAISED as error:
        raise UserError(
            f"the chat template fails ({type(error).__name__}: {first_line(error)})", hint="fix the template"
        ) from None
    marked = "".join(pieces)
    if "endgeneration" not in template:
        return marked, None
    return _take_out(marked, *marks)


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with its reasoning under the names that templates read."""
    found = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if found is None:
        return dict(message)
    return {"thinking": found, **message, "reasoning_content": found}


def _take_out(marked: str, opening: str, closing: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without its marks, and the spans between them."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    length = start = 0
    for piece in re.split(f"({opening}|{closing})", marked):
        if piece == opening:
            start = length
        elif piece == closing:
            spans.append((start, length))
        else:
            parts.append(piece)
            length += len(piece)
    return "".join(parts), spans


def completion_spans(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tokens: Mapping[str, str],
    generation_prompt: bool,
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation; return it with the spans that the assistant wrote, end-of-turn marker included.

    If the template marks no generation, the span of an assistant's message is what it adds to the rendering
    of the messages before it with the generation prompt. If the template rewrites earlier turns, there is no
    such span: raises `UserError`, or returns no spans for a prompt, which is not trained on.
    """
    text, spans = render_template(template, messages, tokens=tokens, generation_prompt=generation_prompt)
    if spans is not None:
        return text, spans
    try:
        return text, _added_spans(template, messages, text, tokens=tokens)
    except UserError:
        if generation_prompt:
            return text, []
        raise


def _added_spans(
    template: str, messages: Sequence[Mapping[str, Any]], text: str, *, tokens: Mapping[str, str]
) -> list[tuple[int, int]]:
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise UserError(
                "the conversation begins with the assistant", hint="let the user or the system begin"
            )
        before, _ = render_template(template, messages[:index], tokens=tokens, generation_prompt=True)
        after, _ = render_template(template, messages[: index + 1], tokens=tokens, generation_prompt=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                "the chat template rewrites earlier turns, so the assistant's tokens cannot be found",
                hint="add {% generation %} marks to the template, or train on one answer per conversation",
            )
        spans.append((len(before), len(after)))
    return spans
