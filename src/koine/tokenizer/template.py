"""Chat templates of other models: Jinja in a sandbox, with the spans that the model itself wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from koine.errors import UserError

# Private-use characters mark a span of completion inside the rendered text and are taken out again.
_OPEN, _CLOSE = "\U0010fff0", "\U0010fff1"


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}`: what the model writes."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _strftime_now(format: str) -> str:
    import datetime

    return datetime.datetime.now().strftime(format)


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tokens: Mapping[str, str],
    generation_prompt: bool,
) -> tuple[str, list[tuple[int, int]] | None]:
    """The rendered text, and the character spans of `generation` blocks (None where the template has none).

    tokens: what the template may name, such as `bos_token` and `eos_token`.
    Raises `UserError` where the template refuses the messages.
    """
    import jinja2

    try:
        marked = _compile(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=generation_prompt,
            **tokens,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses these messages ({error})") from None
    if "endgeneration" not in template:
        return marked, None
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    length = start = 0
    for piece in _split(marked):
        if piece == _OPEN:
            start = length
        elif piece == _CLOSE:
            spans.append((start, length))
        else:
            parts.append(piece)
            length += len(piece)
    return "".join(parts), spans


def _split(marked: str) -> list[str]:
    import re

    return [piece for piece in re.split(f"({_OPEN}|{_CLOSE})", marked) if piece]


def completion_spans(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tokens: Mapping[str, str],
    generation_prompt: bool,
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character spans that the assistant wrote, its end-of-turn marker included.

    Where the template marks no generation, the span of an assistant's message is what it adds to the rendering of the
    messages before it with the generation prompt. Raises `UserError` where the template rewrites earlier turns, so
    that no such span exists.
    """
    text, spans = render_template(template, messages, tokens=tokens, generation_prompt=generation_prompt)
    if spans is not None:
        return text, spans
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise UserError(
                "the conversation begins with the assistant", mend="let the user or the system begin"
            )
        before, _ = render_template(template, messages[:index], tokens=tokens, generation_prompt=True)
        after, _ = render_template(template, messages[: index + 1], tokens=tokens, generation_prompt=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                "the chat template rewrites earlier turns, so the tokens that the assistant wrote cannot be told",
                mend="add {% generation %} marks to the template, or train on one answer per conversation",
            )
        spans.append((len(before), len(after)))
    return text, spans
