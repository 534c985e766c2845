"""JSON schemas that clients send: their shape is checked before anything works on them.

What a schema means, and whether it can be enforced, the grammar library says.
"""

from collections.abc import Iterator
from typing import Any

from neuron_minimax.serving.protocol import RequestError

MAX_DEPTH = 32
# Where a schema has schemas: one, several in a list, or several by name.
ONE = ("items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else")
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def check_schema(schema: Any, name: str, param: str) -> None:
    """Raise RequestError when a schema is nested too deeply, or a keyword in it has a value of the
    wrong kind; it names the place below `name`.
    """
    check_depth(schema, name, param)
    pending = [(name, schema)]
    while pending:
        place, found = pending.pop()
        if isinstance(found, bool):
            continue
        if not isinstance(found, dict):
            raise _wrong(place, "a JSON schema", param)
        _check_keywords(place, found, param)
        pending += _parts(place, found)


def check_depth(value: Any, name: str, param: str, limit: int = MAX_DEPTH) -> None:
    """Raise RequestError when lists and objects in `value` are nested deeper than `limit`."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RequestError(f"{name} is nested deeper than {limit} levels", param=param)


def _check_keywords(place: str, schema: dict[str, Any], param: str) -> None:
    kinds = schema.get("type", "")
    if not isinstance(kinds, str) and not _are_strings(kinds):
        raise _wrong(f"{place}.type", "the name of a type or a list of names", param)
    if not _are_strings(schema.get("required", [])):
        raise _wrong(f"{place}.required", "a list of names", param)
    if not isinstance(schema.get("enum", []), list):
        raise _wrong(f"{place}.enum", "a list", param)
    if not isinstance(schema.get("$ref", ""), str):
        raise _wrong(f"{place}.$ref", "a string", param)
    for keyword in LISTED:
        if not isinstance(schema.get(keyword, []), list):
            raise _wrong(f"{place}.{keyword}", "a list of JSON schemas", param)
    for keyword in NAMED:
        if not isinstance(schema.get(keyword, {}), dict):
            raise _wrong(f"{place}.{keyword}", "an object of JSON schemas", param)


def _parts(place: str, schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the schemas within a schema whose keywords have the right kinds."""
    for keyword in ONE:
        if keyword in schema and not isinstance(schema[keyword], list):  # older drafts list items
            yield f"{place}.{keyword}", schema[keyword]
    for keyword in LISTED:
        for number, part in enumerate(schema.get(keyword, ())):
            yield f"{place}.{keyword}.{number}", part
    for keyword in NAMED:
        for key, part in schema.get(keyword, {}).items():
            yield f"{place}.{keyword}.{key[:64]}", part


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _wrong(place: str, expected: str, param: str) -> RequestError:
    return RequestError(f"{place[:400]}: expected {expected}", param=param)
