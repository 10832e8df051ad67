"""Chat templates render as in `transformers`; endless or failing ones end with one line."""

from __future__ import annotations

import time

import pytest

from koine.errors import UserError
from koine.tokenizer import template_limits
from koine.tokenizer.template import render_template

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie weit? <b>&\u201e東京\u201c ", "name": "Ada"},
    {"role": "assistant", "content": "  Nine.\n", "reasoning": "far"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

SOUND = {
    "tools and documents": "{% if tools is not none %}T{{ tools | tojson }}{% endif %}{% if documents is not none %}D{% endif %}x",
    "undefined": "{{ nothing }}{% if nothing is defined %}y{% endif %}{{ messages[0].nothing }}{{ messages[0]['name'] }}",
    "tojson": "{{ messages[1] | tojson }}{{ messages | tojson(indent=2) }}{{ messages[0] | tojson(separators=(',', ':')) }}",
    "tojson of ASCII": "{{ messages[1] | tojson(ensure_ascii=True) }}{{ messages[1] | tojson(ensure_ascii=False, sort_keys=true) }}",
    "strftime": "{{ strftime_now('%Y') }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "namespace and macros": "{% macro turn(m, n=1) %}{{ m.role ~ ': ' ~ m.content ~ n }}{% endmacro %}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ turn(m, n=ns.n) }}{% endfor %}{{ ns.n }}",
    "lists": "{% set all = [1, 'a'] + [messages[0].role] %}{{ all }}{{ {'a': 1, 'b': (1, 2)} }}{{ (1, 'x') }}{% for a, b in {'k': 2}.items() %}{{ a }}{{ b }}{% endfor %}"
    "{% set x, y = 1, 2 %}{{ x }}{{ y }}",
    "texts": "{{ 'a' * 3 }}{{ 'x'.join(['1', '2']) }}{{ '%s-%05d' % ('a', 7) }}{{ '{:>4}|{}'.format(1, 2) }}{{ ' a '.strip().upper() | replace('A', 'bb') }}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | length }}{{ 'a\nb' | indent(3) }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "blocks": "{% set x %}{{ messages[0].content }}{% endset %}{{ x | trim }}{{ x[::-1] }}{{ x[1:3] }}{{ not x }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ 7 % 4 }}",
    "reasoning": "{{ messages[2].reasoning_content }}{{ messages[2].thinking }}",
    "dict": "{{ dict(a=1).a }}{{ dict.fromkeys(['q']) }}{{ range(3) | list }}{{ 'a' in 'abc' }}",
    "whitespace": "  {%- if true %}\n  a\n  {% endif %}\n{# note #}\nb\n",
}


@pytest.mark.parametrize("name", SOUND)
def test_templates_render_as_in_transformers(name: str) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    want, _ = utilities.render_jinja_template(
        conversations=[MESSAGES], chat_template=SOUND[name], add_generation_prompt=True, **TOKENS
    )
    text, _ = render_template(SOUND[name], MESSAGES, tokens=TOKENS, generation_prompt=True)
    assert text == want[0]


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops that are filtered": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n > 1 %}{{ f(n - 1) }}{{ f(n - 2) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters over ranges": "{% for a in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the limit each of these takes hours; the bound here is generous."""
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    begin = time.monotonic()
    with pytest.raises(UserError, match="the chat template takes more than 0.3 seconds"):
        render_template(ENDLESS[name], MESSAGES, tokens=TOKENS, generation_prompt=False)
    assert time.monotonic() - begin < 60


GROW = "{{% set ns = namespace(x={0}) %}}{{% for i in range(60) %}}{1}{{% endfor %}}{{{{ ns.x }}}}"
LARGE = {
    "output": "{% for a in range(99999) %}{% for b in range(99999) %}"
    + "a" * 1000
    + "{% endfor %}{% endfor %}",
    "output of a variable": "{% set x = 'a' * 9999999 %}{% set y %}{% for a in range(99999) %}{{ x }}{% endfor %}{% endset %}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "times a list": "{{ [1] * 10 ** 9 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "factors": GROW.format("3", "{% set ns.x = ns.x * ns.x %}"),
    "center": "{{ 'a' | center(10 ** 9) }}",
    "a method's width": "{{ 'a'.ljust(10 ** 10) }}",
    "zfill": "{{ '1'.zfill(1000000000) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10 ** 7) }}",
    "a format's width": "{{ '%1000000000d' % 1 }}",
    "a precision": "{{ '%.1000000000f' | format(1) }}",
    "a width from the arguments": "{{ '%*d' % (1000000000, 1) }}",
    "a width in braces": "{{ '{:>1000000000}'.format(1) }}",
    "a width in inner braces": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "a mapping's width": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "a date's width": "{{ strftime_now('%1000000000d') }}",
    "bytes": "{{ (5).to_bytes(10 ** 10, 'big') }}",
    "doubled by ~": GROW.format("'a'", "{% set ns.x = ns.x ~ ns.x %}"),
    "doubled by +": GROW.format("'a'", "{% set ns.x = ns.x + ns.x %}"),
    "doubled by replace": GROW.format("'a'", "{% set ns.x = ns.x | replace('a', 'aa') %}"),
    "doubled in a block": GROW.format("'a'", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "doubled lists": GROW.format("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
    "doubled tuples": GROW.format("[1]", "{% set ns.x = (ns.x, ns.x) %}"),
    "doubled dictionaries": GROW.format("[1]", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    "replace by itself": "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "join by itself": "{% set x = 'a' * 1000000 %}{{ x | join(x) }}{{ x.join(x) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "indent": "{{ ('\n' * 1000000) | indent(1000000) }}",
    "indent of JSON": "{{ [1] | tojson(indent=10 ** 9) }}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "wide items": "{{ range(99999) | map('string') | map('center', 1000000) | list | length }}",
}


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_grows_without_end_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 120.0)
    with pytest.raises(UserError, match=r"^the chat template (makes|writes|asks)"):
        render_template(LARGE[name], MESSAGES, tokens=TOKENS, generation_prompt=False)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1 / 0 }}", "fails (ZeroDivisionError"),
        ("{{ 1 % 0 }}", "fails (ZeroDivisionError"),
        ("{% include 'other' %}", "fails (TypeError: no loader"),
        ("{% import 'other' as other %}", "fails (TypeError: no loader"),
        ("{% extends 'other' %}", "fails (TypeError: no loader"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}", "fails (RecursionError"),
        ("{{ " + "[" * 3000 + "]" * 3000 + " }}", "fails (RecursionError"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "fails (SyntaxError"),
        ("{{ range(10 ** 9) }}", "fails (OverflowError"),
        ("{{ nothing | tojson }}", "fails (TypeError"),
        ("{{ none() }}", "fails (TypeError"),
        ("{{ raise_exception('no\ntools') }}", "refuses these messages (no tools)"),
        ("{% for %}", "refuses these messages (Expected an expression"),
        ("{{ 1 | shout }}", "refuses these messages (No filter named 'shout'"),
        ("{{ messages[9].content.more }}", "refuses these messages ("),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages (access to attribute '__class__'"),
        ("{{ namespace(_a=1) }}", "refuses these messages (the name '_a'"),
        ("{{ messages.append(1) }}", "refuses these messages ("),
        ("a" * 100_001, "of 100,001 characters; give one of at most 100,000"),
        ("{{ strftime_now('%s' * 100000) }}", "gives strftime_now a text of more than 1,000 characters"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "fails (RecursionError"),
        ("{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}", "fails ("),
        ("{% set d = {} %}{% set x = d.update({'a': d}) %}{{ d }}", "refuses these messages ("),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        render_template(template, MESSAGES, tokens=TOKENS, generation_prompt=False)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_long_conversation_is_within_the_limits() -> None:
    """The limits grow with the messages: 20 MB of content, copied a few times."""
    messages = [{"role": "user", "content": "wide sea " * 250_000}] * 10
    template = "{% for m in messages %}{{ (m.role ~ m.content) | trim + eos_token }}{% endfor %}"
    text, _ = render_template(template, messages, tokens=TOKENS, generation_prompt=False)
    assert len(text) == sum(len(message["content"]) - 1 + len("user</s>") for message in messages)


def test_a_prompt_has_ids_also_where_earlier_turns_are_rewritten() -> None:
    """Thinking is removed from earlier messages, so their spans are unknown; a prompt does not need them."""
    from koine.tokenizer.template import completion_spans

    template = "{% for m in messages %}{{ m.content if not loop.last else 'last' }}{% endfor %}"
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert completion_spans(template, turns, tokens={}, generation_prompt=True) == ("ablast", [])
    with pytest.raises(UserError, match="rewrites earlier turns"):
        completion_spans(template, turns, tokens={}, generation_prompt=False)
