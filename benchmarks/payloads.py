"""Requests that are cheap to send and costly to work on; the tests send the same."""

import json
from collections.abc import Mapping
from typing import Any

Attack = tuple[str, bytes]  # a path, and a body
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "a"}]


def chat(**fields: Any) -> Attack:
    return CHAT, json.dumps({"messages": MESSAGES, "max_tokens": 8} | fields).encode()


def tool(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


def forced(parameters: Mapping[str, Any]) -> Attack:
    return chat(tools=tool(parameters), tool_choice="required")


def answered(schema: Mapping[str, Any]) -> Attack:
    json_schema = {"name": "s", "schema": schema}
    return chat(response_format={"type": "json_schema", "json_schema": json_schema})


def objects_of(schema: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], **more}


def widening(*widths: int) -> dict[str, Any]:
    """Definitions that refer in a ring to each other, each so many times."""
    names = [f"#/$defs/x{number}" for number in range(len(widths))]
    rings = {
        f"x{number}": {"anyOf": [objects_of({"$ref": names[(number + 1) % len(widths)]})] * width}
        for number, width in enumerate(widths)
    }
    return objects_of({"anyOf": [{"$ref": name} for name in names]}, **{"$defs": rings})


def chain(length: int) -> dict[str, Any]:
    links = {f"x{number}": {"$ref": f"#/$defs/x{number + 1}"} for number in range(length)}
    return objects_of(
        {"$ref": "#/$defs/x0"}, **{"$defs": links | {f"x{length}": {"type": "integer"}}}
    )


def repeated(item: str, count: int) -> str:
    return "[" + ",".join([item] * count) + "]"


ITSELF = {"anyOf": [{"$ref": "#/$defs/x"}] * 10}
# What is answered with a refusal.
REFUSED: dict[str, Attack] = {
    "stop of 400,000 numbers": (
        CHAT,
        f'{{"messages": [], "stop": {repeated("1", 400_000)}}}'.encode(),
    ),
    "content of 290,000 numbers": (
        CHAT,
        f'{{"messages": [{{"role": "user", "content": {repeated("1", 290_000)}}}]}}'.encode(),
    ),
    "prompt of a million objects": (
        "/v1/completions",
        f'{{"prompt": {repeated("{}", 1_000_000)}}}'.encode(),
    ),
    "prompt of 140,000 objects": (
        "/v1/completions",
        f'{{"prompt": {repeated("{}", 140_000)}}}'.encode(),
    ),
    "200,000 unknown fields": (
        CHAT,
        json.dumps({str(number): 0 for number in range(200_000)}).encode(),
    ),
    "an unknown field whose name has 8 MB": (CHAT, json.dumps({"a" * 8_000_000: 1}).encode()),
    "an unknown field whose name has a million control characters": (
        CHAT,
        json.dumps({"\x01" * 1_000_000: 1}).encode(),
    ),
    "arguments of a function whose name has 8 MB": chat(
        messages=[
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "a" * 8_000_000, "arguments": "["}}],
            }
        ]
    ),
    "8 MB of one letter": (
        CHAT,
        json.dumps({"messages": [{"role": "user", "content": "a" * 8_000_000}]}).encode(),
    ),
    "8 MB to /tokenize": ("/tokenize", json.dumps({"prompt": "a b " * 2_000_000}).encode()),
    "250,000 tokens to /detokenize": (
        "/detokenize",
        f'{{"tokens": {repeated("5", 250_000)}}}'.encode(),
    ),
    "type as a list of objects": forced(objects_of({"type": [{"type": "string"}]})),
    "a chain of 20,000 references": answered(chain(20_000)),
    "a reference elsewhere": answered({"$ref": "http://127.0.0.1:9/schema.json"}),
    "enum of 90,000 values": answered({"enum": [f"value {number}" for number in range(90_000)]}),
}
# What is good, or can be told to be bad only while it is answered.
ANSWERED: dict[str, Attack] = {
    "anyOf of itself": forced(objects_of(ITSELF, **{"$defs": {"x": ITSELF}})),
    "multiples of a large number": answered({"type": "integer", "multipleOf": 99_991}),
    "a ring of anyOf, widths 3, 3, 2": forced(widening(3, 3, 2)),
    "4,000 optional properties": answered(
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(4_000)}}
    ),
    "a pattern that doubles": answered({"type": "string", "pattern": "^[ab]*a[ab]{24}$"}),
    "strings of 10^9 characters": answered(
        {"type": "string", "minLength": 10**9, "maxLength": 10**9}
    ),
    "lists of 10^9 strings": answered(
        {"type": "array", "items": {"type": "string"}, "minItems": 10**9}
    ),
    "100,000 values in a tool": chat(
        tools=tool(objects_of({"type": "string"}) | {"x": dict.fromkeys(map(str, range(99_000)))}),
    ),
    "16 choices with 20 log probabilities": chat(n=16, logprobs=True, top_logprobs=20),
    "16 stop strings of 256": chat(stop=["a" * (240 + number) for number in range(16)]),
}
