"""Independent readings: what a success on a mutated input is compared with.

Each function returns why a success is wrong, or None. Files are read by the json and the
safetensors library alone.
"""

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

LARGEST_SHARD = 64 << 20
INDEX = "model.safetensors.index.json"
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


class Refused(Exception):
    """The independent reading refuses a file."""


def json_of(path: Path, lenient: bool = False) -> Any:
    """Parse a regular file as `json_from` does."""
    if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
        raise Refused(f"{path.name} is no regular file")
    return json_from(path.read_bytes(), lenient)


def json_from(data: bytes, lenient: bool = False) -> Any:
    """Parse JSON: no NaN, and no number that is infinite, unless `lenient` (of files that may hold
    anything in fields that nobody reads). Of a key that stands twice the last value counts.
    """

    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"json: {str(error)[:100]}") from None
    left = [] if lenient else [value]
    while left:
        item = left.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise Refused(f"{item} is no JSON")
        if isinstance(item, dict):
            left += item.values()
        elif isinstance(item, list):
            left += item
    return value


def repeats(data: bytes) -> bool:
    """Say whether an object in JSON has a key twice."""
    found = False

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        unique = dict(pairs)
        found = found or len(unique) < len(pairs)
        return unique

    json.loads(data, object_pairs_hook=look)
    return found


def tensors_of(path: Path) -> Tensors:
    """Every tensor of a safetensors file, as that library reads it."""
    if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
        raise Refused(f"{path.name} is no regular file")
    try:
        with safe_open(str(path), framework="pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(name)
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), tuple(tensor.shape), data)
            return found
    except Exception as error:  # the library raises its own, which is no ValueError
        raise Refused(f"safetensors: {str(error)[:100]}") from None


def checkpoint_of(directory: Path) -> Tensors:
    """Every tensor of a checkpoint, whose index has to be exact."""
    if not (directory / INDEX).exists() and not (directory / INDEX).is_symlink():
        files = sorted(directory.glob("*.safetensors"))
        if len(files) != 1:
            raise Refused(f"{len(files)} safetensors files and no index")
        return tensors_of(files[0])
    index = json_of(directory / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused("weight_map is no object with entries")
    found: Tensors = {}
    listed: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or shard in ("", ".", ".."):
            raise Refused(f"the shard {shard!r} is no file name")
        listed.setdefault(shard, set()).add(name)
    for shard, names in listed.items():
        inside = tensors_of(directory / shard)
        if inside.keys() != names:
            raise Refused(f"{shard} holds other tensors than the index lists")
        found |= inside
    return found


def config_problem(raw: Any, tensors: Tensors) -> str | None:
    """Why a config.json cannot be the one of these tensors."""
    if not isinstance(raw, dict):
        return "config.json is no object"
    wanted = {
        "model_type": "minimax_m2",
        "vocab_size": tensors["model.embed_tokens.weight"][1][0],
        "hidden_size": tensors["model.embed_tokens.weight"][1][1],
        "num_hidden_layers": 1 + max(int(n.split(".")[2]) for n in tensors if ".layers." in n),
        "num_local_experts": tensors["model.layers.0.block_sparse_moe.gate.weight"][1][0],
        "intermediate_size": tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"][1][0],
    }
    for name, value in wanted.items():
        if type(raw.get(name)) is not type(value) or raw[name] != value:
            return f"config.json: {name} is {raw.get(name)!r:.60}; the tensors have {value!r}"
    queries = tensors["model.layers.0.self_attn.q_proj.weight"][1][0]
    keys = tensors["model.layers.0.self_attn.k_proj.weight"][1][0]
    heads = raw.get("num_attention_heads")
    head_dim = raw.get("head_dim") or (
        isinstance(heads, int) and heads and raw["hidden_size"] // heads
    )
    for name in (
        "num_attention_heads",
        "num_key_value_heads",
        "num_experts_per_tok",
        "max_position_embeddings",
    ):
        if not _is_integer(raw.get(name), 1):
            return f"config.json: {name} is {raw.get(name)!r:.60}"
    if not _is_integer(head_dim, 1) or heads * head_dim != queries:
        return f"config.json: {heads} heads of {head_dim!r:.60}; q_proj has {queries} rows"
    if raw["num_key_value_heads"] * head_dim != keys:
        return f"config.json: {raw['num_key_value_heads']} key heads; k_proj has {keys} rows"
    for name in ("rope_theta", "rms_norm_eps"):
        value = raw.get(name)
        if value is None:  # as absent: the family's own
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            return f"config.json: {name} is {value!r:.60}"
    for name in ("bos_token_id", "rotary_dim"):
        if raw.get(name) is not None and not _is_integer(raw[name], 0):
            return f"config.json: {name} is {raw[name]!r:.60}"
    stops = raw.get("eos_token_id")
    for stop in stops if isinstance(stops, list) else [stops]:
        if stop is not None and not _is_integer(stop, -(2**31)):  # a negative one ends nothing
            return f"config.json: eos_token_id has {stop!r:.60}"
    return _quantization_problem(raw.get("quantization_config"))


def _quantization_problem(section: Any) -> str | None:
    if section is None:
        return None
    if not isinstance(section, dict):
        return f"config.json: quantization_config is {section!r:.60}"
    block = section.get("weight_block_size")
    sizes = block if isinstance(block, list) else []
    if block is not None and not (len(sizes) == 2 and all(_is_integer(n, 1) for n in sizes)):
        return f"config.json: weight_block_size is {block!r:.60}"
    listed = section.get("modules_to_not_convert")
    if listed is not None and not (
        isinstance(listed, list) and all(isinstance(name, str) for name in listed)
    ):
        return f"config.json: modules_to_not_convert is {listed!r:.60}"
    return None


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first key that two mappings do not share, or whose values differ."""
    for key in [*mine, *theirs]:
        if key not in mine or key not in theirs or not same(mine[key], theirs[key]):
            return key
    return None


def same(mine: Any, theirs: Any) -> bool:
    """Equality that tells 1 from 1.0 and True."""
    if type(mine) is not type(theirs):
        return False
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[k], theirs[k]) for k in mine)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return mine == theirs or mine is theirs or (mine != mine and theirs != theirs)


def shards_of(directory: Path) -> dict[str, bytes]:
    """The content of every safetensors file that is one; those made here are small."""
    return {
        path.name: path.read_bytes()
        for path in directory.glob("*.safetensors")
        if path.is_file() and path.stat().st_size < LARGEST_SHARD
    }
