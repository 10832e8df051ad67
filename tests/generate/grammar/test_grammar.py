"""Whatever is sampled under a grammar's masks is a valid document (`json`, `jsonschema`)."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from koine.errors import UserError
from koine.generate.grammar.grammar import Grammar, GrammarState
from koine.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

CITIES = ["東京", "क्षेत्र", "Orléans", "Orle\u0301ans", "🇨🇭", '"\\']
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "city": {"enum": CITIES},
            "count": {"type": "integer", "minimum": -3, "maximum": 120},
            "sure": {"type": "boolean"},
        },
        "required": ["name", "city", "count"],
        "additionalProperties": False,
    },
    "array": {
        "type": "array",
        "items": {"anyOf": [{"type": "null"}, {"const": "日本"}, {"type": "string", "pattern": "^[a-ü]{1,3}$"}]},
        "minItems": 1,
        "maxItems": 4,
    },
    "nested": {
        "$defs": {"point": {"type": "array", "prefixItems": [{"enum": [0, 1.5]}], "items": False, "minItems": 1}},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/point"}, "b": {"type": "object", "additionalProperties": False}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Merges inside and across the things that JSON is made of, and within multi-byte characters."""
    texts = [
        json.dumps({"name": f"x{i}", "city": city}, ensure_ascii=False) for i in range(40) for city in CITIES
    ]
    return train_tokenizer(
        {"ja": lambda: texts}, vocab_size=330, scheme="natural", english_share=None, min_frequency=2
    )  # fmt: skip


def walk(state: GrammarState, draw: random.Random) -> list[int]:
    """Ids drawn uniformly from the masks, up to the end of the answer."""
    ids = []
    while True:
        allowed = state.mask().nonzero().flatten().tolist()
        assert allowed, "nothing may follow"
        token = draw.choice(allowed)
        state.advance(token)
        if state.finished:
            return ids
        ids.append(token)


def force(state: GrammarState, ids: list[int]) -> None:
    for token in ids:
        assert state.mask()[token]
        state.advance(token)


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_walks_give_documents_of_the_schema(name: str, tokenizer: Tokenizer) -> None:
    grammar = Grammar.from_json_schema(SCHEMAS[name], tokenizer)
    validator = jsonschema.Draft202012Validator(SCHEMAS[name])
    drawn = set()
    for seed in range(60):
        ids = walk(grammar.start(), random.Random(seed))
        # strictly: a half character would raise
        text = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8")
        assert text == tokenizer.decode(ids)
        validator.validate(json.loads(text))
        drawn.add(text)
    assert len(drawn) > 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("value", [*CITIES, "<BOS_TOKEN>", "e\u0301", ["a", {"b": None}]], ids=ascii)
def test_every_value_can_be_reached(value: Any, seed: int, tokenizer: Tokenizer) -> None:
    # NFD text and the names of special tokens too, which `encode` would change or might obey
    state = Grammar.from_json_schema({"enum": [*CITIES, value]}, tokenizer).start()
    rest = json.dumps(value, ensure_ascii=False).encode()
    draw = random.Random(seed)
    while rest:
        assert not state.complete
        allowed = state.mask().nonzero().flatten().tolist()
        fitting = [token for token in allowed if rest.startswith(tokenizer.token_bytes(token))]
        token = draw.choice(fitting)
        state.advance(token)
        rest = rest.removeprefix(tokenizer.token_bytes(token))
    assert state.complete
    assert state.mask().nonzero().flatten().tolist() == [tokenizer.end_of_turn_id]


@pytest.mark.parametrize("value", ["東京は", "e\u0301e\u0301", "<BOS_TOKEN>", "a  b"], ids=ascii)
def test_the_only_possible_text_is_generated_whatever_is_sampled(value: str, tokenizer: Tokenizer) -> None:
    grammar = Grammar.from_json_schema({"const": value}, tokenizer)
    for seed in range(5):
        ids = walk(grammar.start(), random.Random(seed))
        assert tokenizer.decode(ids) == json.dumps(value, ensure_ascii=False)


def test_the_end_token_is_allowed_exactly_where_the_document_is_complete(tokenizer: Tokenizer) -> None:
    state = Grammar.from_json_schema({"type": "integer", "minimum": 0, "maximum": 120}, tokenizer).start()
    end = tokenizer.end_of_turn_id
    assert not state.complete
    assert not state.mask()[end]
    force(state, tokenizer.encode("1"))
    # whole, and yet it may go on
    assert state.complete
    assert state.mask()[end]
    assert state.mask()[tokenizer.encode("2")[0]]
    force(state, tokenizer.encode("20"))
    assert state.mask().nonzero().flatten().tolist() == [end]
    assert not state.finished
    state.advance(end)
    assert state.finished
    assert state.mask().nonzero().flatten().tolist() == [end]
    state.advance(end)
    with pytest.raises(ValueError, match="after the end"):
        state.advance(tokenizer.encode("1")[0])


def test_masks_cover_the_vocabulary_and_no_special_token(tokenizer: Tokenizer) -> None:
    state = Grammar.from_json_schema({"type": "string", "maxLength": 30}, tokenizer).start()
    force(state, tokenizer.encode('"'))
    mask = state.mask()
    assert mask.shape == (tokenizer.vocab_size,)
    assert mask.dtype == torch.bool
    ids = tokenizer.vocabulary()
    assert not mask[[ids[token] for token in SPECIAL_TOKENS]].any()
    # the words of a special token, spelled out, are text like any other
    force(state, tokenizer.encode('<BOS_TOKEN>"'))
    assert state.complete


def test_states_of_one_grammar_are_independent(tokenizer: Tokenizer) -> None:
    grammar = Grammar.from_json_schema(SCHEMAS["object"], tokenizer)
    first, second = grammar.start(), grammar.start()
    before = second.mask()
    force(first, tokenizer.encode('{"name": "'))
    assert torch.equal(second.mask(), before)
    assert not torch.equal(first.mask(), before)


def test_a_token_that_is_not_allowed_is_refused(tokenizer: Tokenizer) -> None:
    state = Grammar.from_json_schema({"type": "integer"}, tokenizer).start()
    with pytest.raises(ValueError, match="does not allow token"):
        state.advance(tokenizer.encode("x")[0])


@pytest.mark.parametrize("seed", range(5))
def test_regular_expressions_and_lark_grammars(seed: int, tokenizer: Tokenizer) -> None:
    draw = random.Random(seed)
    date = Grammar.from_regex(r"[0-9]{4}-(0[1-9]|1[0-2])", tokenizer)
    assert re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", tokenizer.decode(walk(date.start(), draw)))
    verdict = Grammar.from_lark('start: ("A" | "B") "=" /[0-9]/', tokenizer)
    assert re.fullmatch(r"[AB]=\d", tokenizer.decode(walk(verdict.start(), draw)))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "strng"}, "strng"),
        ({"type": "object", "properties": 3}, "properties must be an object"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"type": "string", "pattern": "(["}, "unclosed character class"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"enum": [{1, 2}]}, "is no JSON"),
        ({"const": "\ud800"}, "is no JSON"),
        (["type"], "is no JSON object"),
    ],
)
def test_a_bad_schema_is_the_users_error(schema: Any, says: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as raised:
        Grammar.from_json_schema(schema, tokenizer)
    assert "<state>" not in str(raised.value)


def test_a_bad_pattern_is_the_users_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="the regular expression cannot be used"):
        Grammar.from_regex("(", tokenizer)
    with pytest.raises(UserError, match="the grammar cannot be used"):
        Grammar.from_lark("stop: 1", tokenizer)


def test_without_the_library_the_command_is_named(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install"):
        Grammar.from_json_schema({"type": "null"}, tokenizer)


def test_a_vocabulary_that_is_not_bytes_is_refused() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(models.WordLevel({"<s>": 0, "▁a": 1}, unk_token="<s>"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": '{"eos_token": "<s>"}'}
    with pytest.raises(UserError, match="byte-level"):
        Grammar.from_json_schema({"type": "null"}, Tokenizer(files))


@pytest.mark.parametrize("leading_space", [True, False])
def test_a_byte_fallback_vocabulary_is_constrained_too(leading_space: bool, tmp_path: Path) -> None:
    """Llama's and Gemma's vocabularies: `▁` and `<0xE0>` stand for bytes."""
    from koine.tokenizer import load_tokenizer
    from tests.tokenizer.conftest import save_metaspace

    tokenizer = load_tokenizer(save_metaspace(tmp_path / "one", leading_space=leading_space))
    for seed in range(3):
        state = Grammar.from_json_schema({"enum": ["東京", "the map"]}, tokenizer).start()
        ids = [token for token in walk(state, random.Random(seed)) if tokenizer.token_bytes(token)]
        assert json.loads(b"".join(map(tokenizer.token_bytes, ids))) in ("東京", "the map")
        assert json.loads(tokenizer.decode(ids)) in ("東京", "the map")
