"""Arguments of tool calls that a model writes as plain text, typed by the tool's JSON schema."""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

TYPE_OF_PYTHON = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    dict: "object",
    list: "array",
}
PYTHON_SPELLINGS = {"True": True, "False": False, "None": None}
NOTHING: Mapping[str, Any] = {}
MAX_REFERENCES = 16
MAX_DEPTH = 16  # of alternatives in alternatives
MAX_POINTER = 1024  # characters of a $ref
MAX_SCHEMAS = 1000  # looked at for one parameter; what is beyond says nothing
MAX_VALUES = 1000  # of an enum


def parameter_schema(parameters: Any, name: str) -> Mapping[str, Any]:
    """Return the schema of parameter `name` in a tool's `parameters`; empty when there is none."""
    parameters = _resolve(parameters, parameters)
    properties = parameters.get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    return _mapping(found if found is not None else parameters.get("additionalProperties"))


def allowed_types(schema: Any, root: Any) -> frozenset[str]:
    """Return the JSON types that `schema` allows; empty when it says nothing.

    `root` holds the definitions that `$ref` points to.
    """
    return _Reader(root).allowed(schema)


def typed_value(text: str, types: frozenset[str]) -> Any:
    """Return the value that `text` spells among the JSON `types`, else the text itself.

    The template writes strings bare and everything else as JSON, so where a string and another type
    are both allowed (nullable strings, `anyOf`), the other type wins when the text is valid JSON of
    it.
    """
    if types <= {"string"}:
        return text
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        if "string" in types or text.strip() not in PYTHON_SPELLINGS:
            return text
        value = PYTHON_SPELLINGS[text.strip()]
    kind = TYPE_OF_PYTHON[type(value)]
    if kind in types or (kind == "integer" and "number" in types):
        return value
    if kind == "number" and "integer" in types and value == int(value):
        return int(value)
    return text


class _Reader:
    """Reads the types of schemas, each schema once: alternatives may refer to themselves."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._found: dict[int, frozenset[str]] = {}

    def allowed(self, schema: Any, depth: int = 0) -> frozenset[str]:
        schema = _resolve(schema, self._root)
        known = self._found.get(id(schema))
        if known is not None:
            return known
        if depth > MAX_DEPTH or len(self._found) == MAX_SCHEMAS:
            return frozenset()
        self._found[id(schema)] = frozenset()  # within itself a schema says nothing
        types = _named(schema) or self._implied(schema, depth)
        if types and schema.get("nullable") is True:
            types |= {"null"}
        self._found[id(schema)] = types
        return types

    def _implied(self, schema: Mapping[str, Any], depth: int) -> frozenset[str]:
        """Return the types of a schema without `type`, from its values, alternatives or
        structure.
        """
        if "const" in schema or isinstance(schema.get("enum"), list):
            values = [schema["const"]] if "const" in schema else schema["enum"][:MAX_VALUES]
            return frozenset(
                TYPE_OF_PYTHON[type(value)] for value in values if type(value) in TYPE_OF_PYTHON
            )
        for keyword in ("anyOf", "oneOf", "allOf"):
            parts = schema.get(keyword)
            if not isinstance(parts, list):
                continue
            each = (self.allowed(part, depth + 1) for part in parts[:MAX_SCHEMAS])
            types = [found for found in each if found]
            if types:
                return (
                    frozenset.intersection(*types)
                    if keyword == "allOf"
                    else frozenset.union(*types)
                )
        if "properties" in schema:
            return frozenset({"object"})
        return frozenset({"array"}) if "items" in schema else frozenset()


def _named(schema: Mapping[str, Any]) -> frozenset[str]:
    """Return the types that `type` names."""
    kinds = schema.get("type")
    names = kinds[:MAX_VALUES] if isinstance(kinds, list) else [kinds]
    return frozenset(name for name in names if isinstance(name, str))


def _resolve(schema: Any, root: Any) -> Mapping[str, Any]:
    """Follow local `$ref` pointers (RFC 6901) inside `root`; an unresolved one says nothing."""
    schema = _mapping(schema)
    for _ in range(MAX_REFERENCES):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#"):
            return schema
        if len(reference) > MAX_POINTER:
            return NOTHING
        found = root
        for part in reference[1:].split("/")[1:]:
            found = _mapping(found).get(part.replace("~1", "/").replace("~0", "~"))
        schema = _mapping(found)
    return NOTHING


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else NOTHING


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")
