"""Arguments of tool calls that a model writes as plain text, typed by the tool's JSON schema."""

import json
from collections.abc import Mapping
from typing import Any

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
MAX_REFERENCES = 16


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
    return _allowed(schema, root, MAX_REFERENCES)


def typed_value(text: str, types: frozenset[str]) -> Any:
    """Return the value that `text` spells among the JSON `types`, else the text itself.

    The template writes strings bare and everything else as JSON, so where a string and another type
    are both allowed (nullable strings, `anyOf`), the other type wins when the text is valid JSON of
    it.
    """
    if types <= {"string"}:
        return text
    try:
        value = json.loads(text, parse_constant=_refuse)
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


def _allowed(schema: Any, root: Any, budget: int) -> frozenset[str]:
    schema = _resolve(schema, root)
    kinds = schema.get("type")
    if isinstance(kinds, str):
        kinds = [kinds]
    types = frozenset(kinds if isinstance(kinds, list) else ())
    if not types:
        types = _implied(schema, root, budget)
    return types | {"null"} if types and schema.get("nullable") is True else types


def _implied(schema: Mapping[str, Any], root: Any, budget: int) -> frozenset[str]:
    """Return the types of a schema without `type`, from its values, alternatives or structure."""
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return frozenset(
            TYPE_OF_PYTHON[type(value)] for value in values if type(value) in TYPE_OF_PYTHON
        )
    for keyword in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(keyword)
        if not isinstance(parts, list) or budget <= 0:
            continue
        types = [found for part in parts if (found := _allowed(part, root, budget - 1))]
        if types:
            return frozenset.intersection(*types) if keyword == "allOf" else frozenset.union(*types)
    if "properties" in schema:
        return frozenset({"object"})
    return frozenset({"array"}) if "items" in schema else frozenset()


def _resolve(schema: Any, root: Any) -> Mapping[str, Any]:
    """Follow local `$ref` pointers (RFC 6901) inside `root`; an unresolved one says nothing."""
    schema = _mapping(schema)
    for _ in range(MAX_REFERENCES):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#"):
            return schema
        found = root
        for part in reference[1:].split("/")[1:]:
            found = _mapping(found).get(part.replace("~1", "/").replace("~0", "~"))
        schema = _mapping(found)
    return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")
