"""Real schemas: every document that the mask allows is valid, or the schema is refused."""

from __future__ import annotations

import datetime
import json
import random
import re
from typing import Any

import jsonschema
import pytest

from koine.errors import UserError
from koine.generate.grammar.grammar import Grammar, GrammarState
from koine.generate.grammar.patterns import pattern_excluding, portable_pattern
from koine.generate.grammar.supported_schema import FORMAT_PATTERNS, to_supported_schema
from koine.tokenizer import Tokenizer, train_tokenizer

FORMATS = jsonschema.FormatChecker()


@FORMATS.checks("date-time")
def is_date_time(value: object) -> bool:
    """RFC 3339; `jsonschema` itself checks it only where another package is installed."""
    if not isinstance(value, str):
        return True
    try:
        datetime.datetime.fromisoformat(value)
    except ValueError:
        return False
    return re.fullmatch(r"[^T]{10}T[\d:.]+(Z|[+-]\d\d:\d\d)", value) is not None


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


FEW = {"type": "integer", "minimum": 0, "maximum": 20}
DATE = {"type": "string", "format": "date"}
SCHEMAS: dict[str, dict[str, Any]] = {
    **{f"format {name}": {"type": "string", "format": name} for name in (
        "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")},
    "any text or date": {"format": "date"},
    "29 February": {**DATE, "pattern": "-02-29$"},
    "29 February, a moment": {"type": "string", "format": "date-time", "pattern": "-02-29T"},
    "dates in a list": {"type": "array", "items": DATE, "maxItems": 2},
    "a date behind a reference": {"$ref": "#/$defs/default", "$defs": {"default": DATE}},
    "a date behind an anchor": {"$ref": "#x", "$defs": {"a": {"$anchor": "x", **DATE}}},
    "a date under a pattern": {"type": "object", "patternProperties": {"^d": DATE}, "maxProperties": 1},
    "a date in parts": {"allOf": [{"type": "string"}, {"format": "date"}]},
    "a date of a draft-7 pair": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [FEW, DATE],
                                 "additionalItems": False, "minItems": 2},
    "a map": {"type": "object", "additionalProperties": FEW},
    "a map of two": {"type": "object", "additionalProperties": FEW, "minProperties": 2},
    "an open object": {"type": "object", "properties": {"a": FEW, "ab": FEW, "": FEW, '"\\': FEW}, "required": ["a"]},
    "an open object of texts": {"type": "object", "properties": {"a": FEW}, "additionalProperties": {"type": "string", "maxLength": 2}},
    "open parts": {"allOf": [{"type": "object", "properties": {"a": FEW}}, {"properties": {"b": FEW}}]},
    "anything": {},
    "a list of anything": {"type": "array", "maxItems": 2, "uniqueItems": False},
    r"\D": {"type": "string", "pattern": r"^\D{2}$"},
    r"\W": {"type": "string", "pattern": r"^\W[^\w]$"},
    r"\S": {"type": "string", "pattern": r"^\S[^\s]\s$"},
    "classes": {"type": "string", "pattern": r"^[\W_][^\W][^\d][\w-]$"},
    ".": {"type": "string", "pattern": "^.{3}$"},
    "escapes": {"type": "string", "pattern": r"^\^\$\.\*\+\?\(\)\[\]\{\}\|\\\/\x41\u0042\-$"},
    "2^53": {"type": "integer", "minimum": 2**53 - 3, "maximum": 2**53},
    "constants": {"enum": [0.1, 1e-7, -0.0, 1.0, 5e-324, 2**53, -(2**53), 1.5e10]},
    "quarters": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 2},
    "sevens": {"type": "integer", "multipleOf": 7.0, "minimum": -50, "maximum": 50},
    "bounds": {"type": "integer", "minimum": 3, "exclusiveMinimum": 5.5, "maximum": 9.5, "exclusiveMaximum": 9},
    "a range": {"type": "number", "minimum": -0.25, "maximum": 1e-3},
    "a large number that says nothing": {"type": "null", "default": 10**30, "examples": [10**30], "$defs": {"a": {"minimum": 10**30}}},
    "a tree": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    "a list with an end": closed({"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        {"en": lambda: ['{"a": 1, "ab": [2]}'] * 9},
        vocab_size=300,
        scheme="natural",
        english_share=None,
        min_frequency=2,
    )


def drawn(state: GrammarState, tokenizer: Tokenizer, seed: int) -> str | None:
    """Sample a document under the masks, ends and rare characters preferred; None where it is too long."""
    draw = random.Random(seed)
    ids: list[int] = []
    while len(ids) < 150:
        allowed = state.mask().nonzero().flatten().tolist()
        assert allowed, f"nothing may follow {tokenizer.decode(ids)}"
        ends = [token for token in allowed if token in (tokenizer.end_of_turn_id, tokenizer.eos_id)]
        closing = [token for token in allowed if tokenizer.token_bytes(token)[:1] in (b'"', b"]", b"}")]
        rare = [token for token in allowed if tokenizer.token_bytes(token)[:1] >= b"\xc2"]
        chance = draw.random()
        choices = ends if chance < 0.5 else closing if chance < 0.7 else rare if chance < 0.8 else allowed
        token = draw.choice(choices or allowed)
        state.advance(token)
        if state.finished:
            return tokenizer.decode(ids)
        ids.append(token)
    return None


@pytest.mark.parametrize("name", SCHEMAS)
def test_documents_that_the_mask_allows_are_valid(name: str, tokenizer: Tokenizer) -> None:
    schema = SCHEMAS[name]
    grammar = Grammar.from_json_schema(schema, tokenizer)
    old = "draft-07" in schema.get("$schema", "")
    kind = jsonschema.Draft7Validator if old else jsonschema.Draft202012Validator
    validator = kind(schema, format_checker=FORMATS)
    documents = {drawn(grammar.start(), tokenizer, seed) for seed in range(30)} - {None}
    assert documents

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs), pairs
        return dict(pairs)

    for text in documents:
        validator.validate(json.loads(str(text), object_pairs_hook=unique))


FLAG = {"type": "boolean"}


@pytest.mark.parametrize(
    "pattern", ["^[0-2]$", "^\\d{1,2}$", "^ab[01]$", "^(a|ab|abc)$"], ids=["few", "many", "long", "begun"]
)
def test_no_key_repeats_where_the_keys_run_out(pattern: str, tokenizer: Tokenizer) -> None:
    """Drawn with a bent for the comma: the last key is not begun, nor a comma written, where none is left."""
    inner = {"type": "object", "patternProperties": {pattern: FLAG}, "additionalProperties": False}
    grammar = Grammar.from_json_schema(closed({"x": inner, "y": inner}), tokenizer)
    most = 0
    for seed in range(12):
        draw, state, ids = random.Random(seed), grammar.start(), list[int]()
        while not state.finished and len(ids) < 200:
            allowed = state.mask().nonzero().flatten().tolist()
            commas = [token for token in allowed if b"," in tokenizer.token_bytes(token)]
            token = draw.choice(commas if commas and draw.random() < 0.8 else allowed)
            state.advance(token)
            ids.append(token)
        keys = re.findall(r'"(?:[xy]": {)?"?([0-9abc]+)": ', tokenizer.decode(ids).partition('"y"')[0])
        assert len(set(keys)) == len(keys), tokenizer.decode(ids)
        most = max(most, len(keys))
    assert most >= 2


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "integer", "minimum": 10**20, "maximum": 10**20 + 5}, "#/minimum: 100000000000000000000 is beyond 2^53"),
        ({"type": "integer", "minimum": -(2**63), "maximum": 0}, "#/minimum: -9223372036854775808 is beyond"),
        ({"type": "integer", "exclusiveMaximum": 2**53 + 2}, "#/exclusiveMaximum"),
        ({"type": "number", "minimum": 1e300}, "#/minimum: 1e+300 is beyond"),
        ({"const": 10**20 + 3}, "#/const"),
        ({"enum": [{"a": [2**64]}]}, "#/enum: 18446744073709551616 is beyond"),
        ({"anyOf": [{"type": "null"}, {"minimum": 10**4000}]}, "#/anyOf/1/minimum: 10000000000000000000... (4001 digits)"),
        ({"$ref": "#/$defs/a", "$defs": {"a": closed({"b": {"maximum": 10**20}})}}, "#/$defs/a/properties/b/maximum"),
        ({"type": "number", "multipleOf": 0.1}, "#/multipleOf: 0.1 has no exact form"),
        ({"type": "integer", "multipleOf": 1e-9}, "no exact form"),
        ({"multipleOf": -1}, "#/multipleOf: -1 is out of range"),
        ({"multipleOf": 0}, "#/multipleOf: 0 is out of range"),
        ({"type": "integer", "multipleOf": 10**7}, "#/multipleOf: 10000000 is out of range"),
        ({"maxLength": 2**32}, "#/maxLength: 4294967296 is too large"),
        ({"minItems": 10**30, "type": "array"}, "#/minItems"),
        ({"format": "time"}, "whether a time has an offset"),
        ({"format": "unknown"}, "Unknown format: unknown"),
        ({"type": "string", "format": "zipcode"}, "Unknown format: zipcode"),
        ({"type": ["string", "null"], "format": "uid"}, "did you mean 'uuid'"),
        ({"type": "string", "const": "2023-02-29", "format": "date"}, "cannot be used"),
        ({"type": "array", "items": [{"type": "null"}]}, "#/items: it is a list"),
        ({"minimum": 1, "exclusiveMinimum": True}, "#/exclusiveMinimum: it is true or false"),
        ({"type": "array", "items": {"x-guidance": {"lenient": True}}}, "#/items/x-guidance"),
        ({"$ref": "#/properties/x/enum/0", "properties": {"x": {"enum": [{}]}}}, "leads to no schema"),
        ({"$ref": "#"}, "no document of it ever ends"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "ever ends"),
        (closed({"a": {"$ref": "#"}}), "ever ends"),
        (closed({"a": {"allOf": [{"type": "object"}, {"$ref": "#"}]}}), "ever ends"),
        (closed({"a": {"anyOf": [{"$ref": "#"}, closed({"b": {"$ref": "#"}})]}}), "ever ends"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "ever ends"),
        ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, "ever ends"),
        ({"type": "object", "patternProperties": {"^x": {}}, "additionalProperties": True}, "beside patternProperties"),
        ({"type": "object", "patternProperties": {"^x": {}}, "minProperties": 2}, "beside patternProperties"),
        ({"$ref": "http://example.com/a.json"}, "cannot be used"),
        ({"$ref": "file:///etc/passwd"}, "cannot be used"),
        *(({"pattern": pattern}, "engines read differently") for pattern in (
            r"^\p{L}$", r"\PL", "[[:alpha:]]", "[a&&b]", "[a--c]", "[a~~b]", r"\Aa\z", "(?x)a", "a*+", "a++", "a{2}+", "[]a]", "[^]a]", r"\x{41}", r"\Qa\E")),
        ({"pattern": "(?=a)"}, "look-around"),
        (json.loads('{"items":' * 150 + "{}" + "}" * 150), "recursion limit"),
        (json.loads('{"items":' * 900 + "{}" + "}" * 900), "nested too deeply|recursion"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_schema_that_no_mask_can_enforce_is_refused(schema: Any, says: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError) as raised:
        Grammar.from_json_schema(schema, tokenizer)
    assert any(part in str(raised.value) for part in says.split("|")), str(raised.value)
    assert len(str(raised.value)) < 700


def test_every_day_of_four_hundred_years_and_no_other() -> None:
    """The calendar repeats after that; the pattern against `datetime`."""
    pattern = re.compile(FORMAT_PATTERNS["date"])
    for year in range(2000, 2400):
        for month in range(14):
            for day in range(33):
                text = f"{year:04}-{month:02}-{day:02}"
                try:
                    datetime.date(year, month, day)
                    right = True
                except ValueError:
                    right = False
                assert (pattern.search(text) is not None) == right, text
    assert not pattern.search("0000-01-01")
    assert pattern.search("0004-02-29")
    assert not pattern.search("0100-02-29")


@pytest.mark.parametrize("names", [[""], ["a"], ["a", "ab", "b"], ["", "日本", 'x"\\']])
def test_a_pattern_excludes_only_the_given_texts(names: list[str]) -> None:
    pattern = re.compile(
        re.sub(r"\\x\{([0-9a-f]+)\}", lambda code: re.escape(chr(int(code[1], 16))), pattern_excluding(names))
    )
    for text in [*names, "", "a", "b", "c", "ab", "abc", "ba", "日", "日本", "日本語", 'x"', 'x"\\', 'x"\\y']:
        assert (pattern.search(text) is None) == (text in names), text


def test_syntax_that_all_engines_share_is_unchanged() -> None:
    for pattern in (
        r"^[a-c]{2}$",
        r"a|b",
        r"^(?:ab)+?$",
        r"^\++$",
        r"^a\\+$",
        r"[+*?]+",
        r"(?i)^k$",
    ):
        assert portable_pattern(pattern, "#") == pattern


def test_the_callers_schema_is_not_changed() -> None:
    schema = {"type": "object", "properties": {"a": {"format": "date"}}}
    before = json.dumps(schema)
    held, free_keys = to_supported_schema(schema)
    assert json.dumps(schema) == before != json.dumps(held)
    assert free_keys
    assert not to_supported_schema(closed({"a": {"type": "null"}}))[1]


def test_a_limit_of_the_library_is_the_users_error(tokenizer: Tokenizer) -> None:
    """A token that the mask allows and the library refuses is the library's limit, not the caller's error."""
    schema = {"type": "array", "items": {"type": "null"}, "minItems": 10**9}
    state = Grammar.from_json_schema(schema, tokenizer).start()

    def draw() -> None:
        for _ in range(30):
            state.advance(int(state.mask().nonzero()[0]))

    with pytest.raises(UserError, match="too complex"):
        draw()
