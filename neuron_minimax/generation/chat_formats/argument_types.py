"""Arguments of tool calls that a model writes as plain text, typed by the tool's JSON schema."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
MAX_VARIANTS = 16  # of an object's form
MAX_CHOICES_DEPTH = 3  # of alternatives in alternatives that list texts
SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class ObjectVariant:
    """One form of an object that a schema allows: its properties, those that it has to have, and
    the schema of all others, if any.
    """

    properties: Mapping[str, Any]
    required: frozenset[str]
    others: Any = None

    @property
    def names(self) -> list[str]:
        """The properties in the order of the schema; what is only required comes last."""
        return [*self.properties, *sorted(self.required - self.properties.keys())]


@dataclass(frozen=True, kw_only=True)
class ParameterType:
    """What a parameter may be: JSON types (none: anything), and its values where they are texts of
    a list.
    """

    types: frozenset[str] = frozenset()
    choices: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        """Say whether every value is a text as it stands."""
        return self.types <= {"string"}

    @property
    def streams(self) -> bool:
        """Say whether a piece of a value is final before the whole is known."""
        return self.is_text and not self.choices

    def spell(self, text: str) -> str:
        """Return the JSON of the value that `text` spells."""
        if text not in self.choices and text.strip() in self.choices:
            text = text.strip()
        return valid_json(typed_value(text, self.types), text)


def valid_json(value: Any, text: str) -> str:
    """Return the JSON of a value, with U+FFFD for each half of a surrogate pair; that of the `text`
    which spells it where the value is nested too deeply for others to read.
    """
    try:
        spelled = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        spelled = json.dumps(text, ensure_ascii=False)
    return SURROGATE.sub("\ufffd", spelled)


def parameter_type(parameters: Any, name: str) -> ParameterType:
    """Return what parameter `name` of a tool's `parameters` may be."""
    schema = parameter_schema(parameters, name)
    reader = _Reader(parameters)
    return ParameterType(types=reader.allowed(schema), choices=reader.texts(schema))


def declared_parameters(parameters: Any) -> list[str]:
    """Return the names that a tool's `parameters` declare."""
    return list(
        dict.fromkeys(name for variant in object_variants(parameters) for name in variant.names)
    )


def parameter_schema(parameters: Any, name: str) -> Mapping[str, Any]:
    """Return the schema of parameter `name` in a tool's `parameters`; empty when there is none."""
    variants = object_variants(parameters)
    found = [each.properties[name] for each in variants if each.properties.get(name) is not None]
    found = found or [each.others for each in variants if isinstance(each.others, Mapping)]
    different = [each for place, each in enumerate(found) if each not in found[:place]]
    return {"anyOf": different} if len(different) > 1 else _mapping((different or [None])[0])


def object_variants(schema: Any, root: Any = None, depth: int = 0) -> list[ObjectVariant]:
    """Return the forms of objects that `schema` allows, through references and alternatives; one
    without properties when it says nothing. `root` is what references point into, the schema itself
    unless given.
    """
    root = schema if root is None else root
    schema = _mapping(schema)
    properties = schema.get("properties")
    required = schema.get("required")
    others = schema.get("additionalProperties")
    own = ObjectVariant(
        properties=_mapping(properties),
        required=frozenset(
            name
            for name in (required if isinstance(required, list) else ())
            if isinstance(name, str)
        ),
        others=others if isinstance(others, Mapping) else None,
    )
    if depth > MAX_DEPTH:
        return [own]
    merged = [own]
    for alternatives in _alternatives(schema, root):
        forms = [
            form
            for part in alternatives[:MAX_VARIANTS]
            if "object" in (allowed_types(part, root) or {"object"})
            for form in object_variants(part, root, depth + 1)
        ]
        merged = [_both(one, form) for one in merged for form in forms[:MAX_VARIANTS]] or merged
        merged = merged[:MAX_VARIANTS]
    return merged


def _alternatives(schema: Mapping[str, Any], root: Any) -> Iterator[list[Any]]:
    """Yield the lists of schemas of which an object has to be one each."""
    if "$ref" in schema:
        yield [_resolve(schema, root)]
    for part in _list(schema.get("allOf"))[:MAX_VARIANTS]:
        yield [part]
    for keyword in ("anyOf", "oneOf"):
        if _list(schema.get(keyword)):
            yield schema[keyword]


def _both(one: ObjectVariant, other: ObjectVariant) -> ObjectVariant:
    """Return the form of an object that has both forms."""
    properties = dict(one.properties)
    for name, schema in other.properties.items():
        known = properties.get(name)
        properties[name] = schema if known in (None, schema) else {"allOf": [known, schema]}
    return ObjectVariant(
        properties=properties,
        required=one.required | other.required,
        others=one.others if other.others is None else other.others,
    )


def with_definitions(schema: Mapping[str, Any], root: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema that stands alone: with the definitions of `root` that it may refer to."""
    return {name: root[name] for name in ("$defs", "definitions") if name in root} | dict(schema)


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

    def texts(self, schema: Any, depth: int = 0) -> tuple[str, ...]:
        """Return the texts that `schema` lists as values, through references and alternatives; none
        where it allows any other text.
        """
        schema = _resolve(schema, self._root)
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else _list(schema["enum"])
            return tuple(value for value in values[:MAX_VALUES] if isinstance(value, str))
        for keyword in ("anyOf", "oneOf", "allOf"):
            parts = _list(schema.get(keyword))[:MAX_VARIANTS] if depth < MAX_CHOICES_DEPTH else []
            each = [self.texts(part, depth + 1) for part in parts if "string" in self.allowed(part)]
            if keyword == "allOf":
                each = [found for found in each if found][:1]
            if each and all(each):
                return tuple(dict.fromkeys(text for found in each for text in found))
        return ()

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


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else NOTHING


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")
