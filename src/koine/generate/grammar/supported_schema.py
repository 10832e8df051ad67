"""Reduce a JSON schema to what the grammar library enforces exactly, or refuse it.

Every document that the mask allows must be valid. The library accepts some schemas and enforces something
else: numbers in 64-bit floating point, formats in part. These are rewritten or refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NoReturn
from urllib.parse import unquote

from koine.errors import UserError, did_you_mean
from koine.generate.grammar.patterns import pattern_excluding, portable_pattern
from koine.generate.grammar.schema import schema_text

MAX_EXACT = 2**53
"""Above this, the library cannot tell neighbouring integers apart."""

MAX_LENGTH = 2**31 - 1
MAX_MULTIPLE = 100_000
"""The grammar of the multiples of n has n states; this many take seconds."""

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_FOURTH = "(?:0[48]|[2468][048]|[13579][26])"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|(?:[0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29)"
)
_TIME = (
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:[.][0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
# Written as patterns: the library ignores leap years, and allows a leap second in any minute.
FORMAT_PATTERNS = {"date": f"^{_DATE}$", "date-time": f"^{_DATE}T{_TIME}$"}
SUPPORTED_FORMATS = ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Formats that the library enforces exactly."""

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LENGTHS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_ONE = ("additionalProperties", "additionalItems")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties")
_OLD_DRAFTS = ("draft-03", "draft-04", "draft-06", "draft-07", "2019-09")


def to_supported_schema(schema: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return an equivalent schema that the library enforces exactly.

    The second value says whether an object may have keys that the schema does not name.
    Raises `UserError` for a schema that the library would accept and not enforce.
    """
    root: dict[str, Any] = json.loads(schema_text(schema))
    try:
        rewriter = _SchemaRewriter(root)
        rewriter.rewrite(root, "#")
        if not rewriter.can_end(root, frozenset()):
            _refuse(
                "#",
                "no document of it ever ends: it must hold itself",
                "let it end, with null or fewer items",
            )
    except RecursionError:
        raise UserError(
            "the JSON schema cannot be used (it is nested too deeply)", hint="flatten it"
        ) from None
    return root, rewriter.free_keys


class _SchemaRewriter:
    """Visits every schema that can be reached from the root, once, and changes it in place."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        text = json.dumps(root)
        # Where schemas are merged, the library needs key patterns that do not overlap.
        self.merges = '"allOf"' in text
        self.old = any(draft in str(root.get("$schema", "")) for draft in _OLD_DRAFTS)
        self.free_keys = False
        self._visited: set[int] = set()
        self._steps = 0

    def rewrite(self, schema: Any, place: str) -> None:
        self.free_keys = self.free_keys or _is_loose(schema)
        if not isinstance(schema, dict) or id(schema) in self._visited:
            return
        self._visited.add(id(schema))
        if "x-guidance" in schema:
            _refuse(f"{place}/x-guidance", "it changes what the grammar enforces", "leave it out")
        self._numbers(schema, place)
        self._items(schema, place)
        for name in _ONE:
            self.rewrite(schema.get(name), f"{place}/{name}")
        for name in _LISTS:
            for number, inner in enumerate(_list(schema.get(name))):
                self.rewrite(inner, f"{place}/{name}/{number}")
        for name in _MAPS:
            for key, inner in _map(schema.get(name)).items():
                self.rewrite(inner, f"{place}/{name}/{key:.40}")
        if isinstance(schema.get("$ref"), str):
            target = self._target(schema["$ref"], place)
            self.rewrite(target, schema["$ref"])
        self._texts(schema, place)
        self._keys(schema, place)

    def _numbers(self, schema: dict[str, Any], place: str) -> None:
        for name in _BOUNDS:
            if isinstance(schema.get(name), bool) and not self.old:
                _refuse(f"{place}/{name}", "it is true or false, as in draft 4", "give the number itself")
            _check_number(schema.get(name), f"{place}/{name}")
        for name in _LENGTHS:
            value = schema.get(name)
            if isinstance(value, int) and value > MAX_LENGTH:
                _refuse(f"{place}/{name}", f"{_shown(value)} is too large", f"give at most {MAX_LENGTH}")
        for name in ("const", "enum"):
            _check_numbers_in(schema.get(name), f"{place}/{name}")
        if "multipleOf" in schema:
            _check_multiple(schema["multipleOf"], f"{place}/multipleOf")

    def _items(self, schema: dict[str, Any], place: str) -> None:
        items = schema.get("items")
        if isinstance(items, list):
            if not self.old:
                _refuse(f"{place}/items", "it is a list, as in draft 2019-09 and before", "write prefixItems")
            for number, inner in enumerate(items):
                self.rewrite(inner, f"{place}/items/{number}")
        self.rewrite(items, f"{place}/items")
        if schema.get("uniqueItems") is False:
            del schema["uniqueItems"]

    def _texts(self, schema: dict[str, Any], place: str) -> None:
        if isinstance(schema.get("pattern"), str):
            schema["pattern"] = portable_pattern(schema["pattern"], f"{place}/pattern")
        name = schema.get("format")
        kinds = schema.get("type", "string")
        if not isinstance(name, str) or "string" not in ([kinds] if isinstance(kinds, str) else _list(kinds)):
            return
        if name in FORMAT_PATTERNS:
            del schema["format"]
            if "pattern" in schema:
                schema["allOf"] = [*_list(schema.get("allOf")), {"pattern": FORMAT_PATTERNS[name]}]
            else:
                schema["pattern"] = FORMAT_PATTERNS[name]
        elif name == "time":
            _refuse(
                f"{place}/format",
                "validators disagree whether a time has an offset",
                'give a pattern such as "^([01][0-9]|2[0-3]):[0-5][0-9]$"',
            )
        elif name not in SUPPORTED_FORMATS:
            known = [*SUPPORTED_FORMATS, *FORMAT_PATTERNS]
            _refuse(f"{place}/format", f"Unknown format: {name:.40}", did_you_mean(name, known))
        elif name == "hostname":
            schema["allOf"] = [*_list(schema.get("allOf")), {"maxLength": 253}]

    def _keys(self, schema: dict[str, Any], place: str) -> None:
        """Restrict undeclared keys: a declared key spelled with escapes must not be among them."""
        patterns = _map(schema.get("patternProperties"))
        if patterns:
            schema["patternProperties"] = {
                portable_pattern(pattern, f"{place}/patternProperties"): inner
                for pattern, inner in patterns.items()
            }
        names = _map(schema.get("properties"))
        others = schema.get("additionalProperties", True)
        least = schema.get("minProperties")
        if patterns and isinstance(least, int) and least > max(1, len(_list(schema.get("required")))):
            _refuse(
                f"{place}/minProperties",
                "it stands beside patternProperties",
                "declare the keys, and require them",
            )
        if names and not patterns and others is not False and not self.merges:
            schema["patternProperties"] = {pattern_excluding(list(names)): others}
            schema["additionalProperties"] = False
        elif patterns and "additionalProperties" not in schema and not self.merges:
            schema["additionalProperties"] = False
        elif patterns and others is not False and not self.merges:
            _refuse(
                f"{place}/additionalProperties",
                "it stands beside patternProperties",
                "set it to false, or leave it out",
            )

    def _target(self, reference: str, place: str) -> Any:
        """Return the target of a reference inside the schema; None where it is the library's to resolve."""
        _, _, pointer = reference.partition("#")
        if not reference.startswith("#") or (pointer and not pointer.startswith("/")):
            return None
        found: Any = self.root
        keyword = True  # whether the next step is a schema keyword, and not a name of the user's
        for step in pointer.split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict):
                if keyword and name in ("const", "enum", "default", "examples"):
                    _refuse(f"{place}/$ref", f"'{reference:.60}' leads to no schema", "put it under $defs")
                keyword = not (keyword and name in (*_MAPS, "$defs", "definitions"))
                found = found.get(name)
            elif isinstance(found, list) and name.isascii() and name.isdigit():
                found = found[int(name)] if int(name) < len(found) else None
            else:
                return None
        return found

    def can_end(self, schema: Any, above: frozenset[int]) -> bool:
        """Return whether a document of `schema` can be finite.

        above: schemas that must contain this one.
        """
        self._steps += 1
        if not isinstance(schema, dict) or self._steps > 20_000:
            return True
        if id(schema) in above:
            return False
        above = above | {id(schema)}
        if "$ref" in schema and not self.can_end(self._target(str(schema["$ref"]), "#"), above):
            return False
        if not all(self.can_end(inner, above) for inner in _list(schema.get("allOf"))):
            return False
        for name in ("anyOf", "oneOf"):
            ways = _list(schema.get(name))
            if ways and not any(self.can_end(inner, above) for inner in ways):
                return False
        kinds = schema.get("type")
        if kinds == "object":
            names = _map(schema.get("properties"))
            if not all(
                self.can_end(names.get(key), above)
                for key in _list(schema.get("required"))
                if isinstance(key, str)
            ):
                return False
        least = schema.get("minItems")
        if kinds == "array" and isinstance(least, int) and least > 0:
            first = _list(schema.get("prefixItems"))
            needed = [*first[:least], *([schema.get("items")] if least > len(first) else [])]
            return all(self.can_end(inner, above) for inner in needed)
        return True


def _is_loose(schema: Any) -> bool:
    """Return whether a schema allows object keys that it does not name."""
    if schema is True:
        return True
    if not isinstance(schema, dict) or not {"const", "enum", "$ref", "allOf", "anyOf", "oneOf"}.isdisjoint(
        schema
    ):
        return False
    kinds = schema.get("type", ["object", "array"])
    kinds = [kinds] if isinstance(kinds, str) else _list(kinds)
    open_object = (
        bool(schema.get("patternProperties")) or schema.get("additionalProperties", True) is not False
    )
    return ("object" in kinds and open_object) or ("array" in kinds and schema.get("items", True) is True)


def _check_number(value: Any, place: str) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > MAX_EXACT:
        _refuse(
            place,
            f"{_shown(value)} is beyond 2^53, where the grammar would round it",
            "give a smaller number",
        )


def _check_numbers_in(value: Any, place: str) -> None:
    _check_number(value, place)
    for inner in value.values() if isinstance(value, dict) else _list(value):
        _check_numbers_in(inner, place)


def _check_multiple(value: Any, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not 0 < value <= MAX_MULTIPLE:
        _refuse(
            place, f"{_shown(value)} is out of range", f"give a number above 0 and at most {MAX_MULTIPLE}"
        )
    if Decimal(repr(value)) != Decimal(value):
        _refuse(
            place,
            f"{value} has no exact form in floating point, and validators disagree about its multiples",
            "give an integer, 0.5 or 0.25, or a pattern in a string",
        )


def _shown(number: float) -> str:
    try:
        text = str(number)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} digits)"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _refuse(place: str, why: str, hint: str) -> NoReturn:
    raise UserError(f"the JSON schema cannot be used ({place}: {why})", hint=hint)
