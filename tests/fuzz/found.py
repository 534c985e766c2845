"""What fuzzing has found, each as the smallest change of an input that shows it."""

import json
from collections.abc import Callable
from typing import Any

from tests.fuzz.mutations import DEEP, Pairs, Raw, written

Edit = Callable[[bytes], bytes]
ESCAPES = '"\\u001b[2J\\u001b]0;owned\\u0007"'
NORM = "model.norm.weight"


def put(*place_and_text: Any) -> Edit:
    """Put JSON text (the last argument) at a place (the keys before it); the last may be new."""
    *path, text = place_and_text

    def change(data: bytes) -> bytes:
        document: Any = json.loads(data, object_pairs_hook=Pairs)
        place = document
        for key in path[:-1]:
            place = dict(place)[key] if isinstance(place, Pairs) else place[key]
        if isinstance(place, Pairs):
            keys = [key for key, _ in place]
            where = keys.index(path[-1]) if path[-1] in keys else len(keys)
            place[where : where + 1] = [(path[-1], Raw(text))]
        else:
            place[path[-1]] = Raw(text)
        return written(document).encode()

    return change


def whole(contents: bytes) -> Edit:
    """Replace all of it."""
    return lambda data: contents


def text(contents: str) -> Edit:
    """Replace all of it by a text."""
    return whole(contents.encode())


def in_header(edit: Edit) -> Edit:
    """Edit the header of a safetensors file, and its length."""

    def change(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        header = edit(data[8:end])
        return len(header).to_bytes(8, "little") + header + data[end:]

    return change


def flip(place: int) -> Edit:
    """Flip one bit of a byte (negative: from the end)."""

    def change(data: bytes) -> bytes:
        edited = bytearray(data)
        edited[place] ^= 1
        return bytes(edited)

    return change


def _long_index(data: bytes) -> bytes:
    index = json.loads(data)
    shard = index["weight_map"][NORM]
    index["weight_map"] |= {f"model.extra.{number}.weight": shard for number in range(300_000)}
    return json.dumps(index).encode()


def _wrong_expert(data: bytes) -> bytes:
    """The first chosen expert has a number that no expert has."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    place = start + header["expert_index"]["data_offsets"][0]
    return data[:place] + (515).to_bytes(2, "little") + data[place + 2 :]


def _flipped_weight(data: bytes) -> bytes:
    """A bit of a tensor in the archive, whose reader takes it without looking at its checksum."""
    return flip(len(data) // 3)(data)


def quantization(key: str, text: str) -> Edit:
    """Put JSON text into a field of the quantization section."""
    return put("quantization_config", key, text)


DEEP_TEXT = "[" * DEEP + "]" * DEEP
NEVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
ENDLESS = NEVER + "{% endfor %}{% endfor %}{% endfor %}"
ENDLESS_PATTERNS = '["(a+)+$","(.*)*(.*)*x"]'
NO_DIGEST = '{"shard":"model.safetensors","dtype":"F32","shape":[128]}'
OTHER_SHARD = '"model-00001-of-00002.safetensors"'
PLANTED = '"../../outside/planted"'
WORDS = '"{\\"texts\\":[],\\"finish_rgason\\":1}"'
# Target to what was wrong to the change that showed it; special files are all tried beside these.
FOUND: dict[str, dict[str, Edit]] = {
    "small_header": {
        "offsets are decimals": in_header(put("a", "data_offsets", "[40.0,64.0]")),
        "a size is true": in_header(put("b", "shape", "[5,true]")),
        "no array is as wide": in_header(put("c", "shape", f"[0,{2**63}]")),
        "a header is a list": in_header(text("[]")),
        "a header is deep": in_header(text(DEEP_TEXT)),
        "metadata holds a number": in_header(put("__metadata__", '{"a":1}')),
    },
    "header": {
        "one offset": in_header(put(NORM, "data_offsets", "[1]")),
        "three offsets": in_header(put(NORM, "data_offsets", "[1,2,3]")),
    },
    "config": {
        "a config is deep": text(DEEP_TEXT),
        "a model type is a list": put("model_type", "[[]]"),
        "quantization is a number": put("quantization_config", "1"),
        "quantization is false": put("quantization_config", "false"),
        "a block size is infinite": quantization("weight_block_size", "[1e999,128]"),
        "attention types are a number": put("attn_type_list", "1"),
        "theta is infinite": put("rope_theta", "1e999"),
        "theta has 400 digits": put("rope_theta", str(10**400)),
        "a billion layers": put("num_hidden_layers", "1000000000"),
        "a pattern that never ends": quantization("modules_to_not_convert", ENDLESS_PATTERNS),
        "half a pair in a module": quantization("modules_to_not_convert", '["\\ud800"]'),
        "escapes in a module": quantization("modules_to_not_convert", f"[{ESCAPES}]"),
        "a beginning is false": put("bos_token_id", "false"),
        "an end is infinite": put("eos_token_id", "1e999"),
    },
    "index": {
        "an index is deep": text(DEEP_TEXT),
        "half a pair in the index": put("weight_map", "x", '"\\ud800"'),
        "300,000 more entries": _long_index,
        "escapes name a shard": put("weight_map", NORM, ESCAPES),
        "the index says another shard": put("weight_map", NORM, OTHER_SHARD),
    },
    "source_data": {
        "a byte that no sample holds": flip(100_000),
    },
    "converted_data": {
        "one byte of the conversion": flip(-1),
    },
    "cache_data": {
        "one byte of the cache": flip(-1),
    },
    "cache_manifest": {
        "the cache is elsewhere": put("tensors", NORM, "shard", PLANTED),
        "a record lacks its digest": put("tensors", NORM, NO_DIGEST),
        "records are a list": put("tensors", "[]"),
        "there are no records": put("tensors", "{}"),
    },
    "conversion": {
        "a conversion records no tensors": put("tensors", "{}"),
        "a record is null": put("tensors", '{"a":null}'),
        "rounded codes are text": put("rounded_codes", '"a"'),
        "rounded codes of a record": put("tensors", "norm.weight", "rounded_codes", "5"),
    },
    "manifest": {
        "a manifest is a number": text("5.0"),
        "a manifest is deep": text(DEEP_TEXT),
        "versions are a list": put("versions", "[]"),
        "weights are a list": put("weights", "[]"),
        "slots are text": put("options", "slots", '"2"'),
        "slots are null": put("options", "slots", "null"),
        "a backend is a list": put("backend", "[1]"),
    },
    "generation_config": {
        "a generation config is deep": text(DEEP_TEXT),
        "sampling is text": put("do_sample", '"True"'),
    },
    "tokenizer": {
        "a token has a number of 2^30": put("model", "vocab", "a", str(2**30)),
        "two tokens have one number": put("model", "vocab", "city", "355"),
    },
    "tokenizer_config": {
        "a length is text": put("model_max_length", '"4096"'),
    },
    "trace": {
        "an expert that is not there": _wrong_expert,
        "an unknown word in a trace": in_header(put("__metadata__", "words", WORDS)),
    },
    "rows": {
        "no UTF-8 in the first row": lambda data: b"\xff" + data,
        "a message is a text": text('{"messages":["user"]}'),
        "messages are a number": text('{"messages":1}'),
        "there are no messages": text('{"messages":[]}'),
        "a row is deep": text('{"text":"a","b":' + DEEP_TEXT + "}"),
    },
    "state": {
        "one byte of the weights": _flipped_weight,
    },
    "placement": {
        "a version is true": put("format_version", "true"),
        "an order is huge": put("expert_order", 0, 0, str(2**63)),
        "an order has decimals": put("expert_order", 0, "[0.5,1,2,3]"),
    },
    "request_chat": {
        "a request is deep": text(DEEP_TEXT),
        "a temperature is infinite in a request": put("temperature", "Infinity"),
    },
}
# What takes as long as its limit allows.
SLOW: dict[str, dict[str, Edit]] = {
    "template": {
        "a template never ends": text(ENDLESS),
        "a template fills the memory": text("{{ 'x' * 3000000000 }}"),
    },
}
