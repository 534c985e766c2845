"""The dequantized cache against transformers' own dequantization, and everything that may go wrong
with one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert import cache as cache_module
from neuron_minimax.convert.cache import open_cache
from neuron_minimax.convert.state_dict import convert_hf_to_neuron_state_dict, mapped_state_dict
from neuron_minimax.errors import CheckpointError, ConversionError
from neuron_minimax.fp8 import ScaleConvention
from tests.opened import build_cache, contents, convert
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = write_tiny(tmp_path_factory.mktemp("cache") / "source", shards=2)
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    return directory


@pytest.fixture(scope="module")
def cache(source) -> Path:
    build_cache(source, source.parent / "cache")
    return source.parent / "cache"


def slow_weight(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """torch's own cast, and one block at a time."""
    weight = checkpoint.tensor(name).float()
    if checkpoint.is_fp8(name):
        scale = checkpoint.tensor(schema.scale_name(name))
        rows, columns = checkpoint.config.weight_block_size
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] *= scale[i, j]
    return weight


def test_every_weight_equals_its_dequantized_source_bit_for_bit(source, cache):
    original = Checkpoint(source)
    cached = Checkpoint(cache)
    cached.require_usable()
    assert not any(cached.is_fp8(name) for name in cached.entries)
    for name in cached.entries:
        assert cached.entry(name).dtype == "F32"
        assert torch.equal(cached.tensor(name), slow_weight(original, name)), name


def test_all_codes_times_scales_of_any_size_are_exact():
    codes = np.array([[code for code in range(256) if code & 0x7F != 0x7F]], dtype=np.uint8)
    for scale in (1e-38, 3e-7, 2e-4, 0.99, 127.9, 128.0, 300.0, 7e35):
        out = np.empty(codes.shape, dtype=np.float32)
        fp8.decode_scaled(codes, np.full(codes.shape[1], scale, dtype=np.float32), out)
        wanted = torch.from_numpy(codes).view(torch.float8_e4m3fn).float() * torch.tensor(
            scale, dtype=torch.float32
        )
        assert np.array_equal(out, wanted.numpy()), scale


def test_ragged_blocks_and_dense_sources_are_cached_exactly(tmp_path):
    ragged = write_tiny(tmp_path / "ragged", hidden_size=192, intermediate_size=320)
    twin = write_tiny(tmp_path / "twin", hidden_size=192, intermediate_size=320, dense=True)
    build_cache(ragged, tmp_path / "cache")
    build_cache(twin, tmp_path / "cache of the twin")
    wanted = Checkpoint(twin)
    for directory in ("cache", "cache of the twin"):
        found = Checkpoint(tmp_path / directory)
        assert all(np.array_equal(found.array(name), wanted.array(name)) for name in wanted.entries)


def test_transformers_loads_the_cache_without_a_warning_and_gives_the_same_logits(
    source, cache, capfd
):
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 160, (1, 12), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        model, report = AutoModelForCausalLM.from_pretrained(
            cache, dtype=torch.float32, output_loading_info=True
        )
        found = model(tokens).logits
    assert not any(report.values()), report
    said = [line.strip() for line in re.split(r"[\r\n]+", capfd.readouterr().err)]
    assert not [line for line in said if line and not line.startswith("Loading weights")]
    with torch.inference_mode():
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).float()
        assert torch.allclose(found, original(tokens).logits, atol=1e-5)


def test_this_project_converts_and_runs_the_cache(source, cache, tmp_path):
    from neuron_minimax.model.decoder import Decoder

    tokens = torch.arange(9)[None]
    convert(source, tmp_path / "from source", fp32_cache_layout())
    convert(cache, tmp_path / "from cache", fp32_cache_layout())
    with torch.inference_mode():
        wanted, found = (
            Decoder.from_converted(tmp_path / name)(tokens)[0]
            for name in ("from source", "from cache")
        )
    assert torch.allclose(wanted, found, atol=1e-4)


def fp32_cache_layout():
    from neuron_minimax.convert.layout import FP8Range, Layout

    return Layout(fp8_range=FP8Range.OCP)


def test_a_bfloat16_cache_rounds_once_and_keeps_routing_in_float32(source, tmp_path):
    build_cache(source, tmp_path / "cache", "bf16")
    original = Checkpoint(source)
    cached = Checkpoint(tmp_path / "cache")
    assert json.loads((tmp_path / "cache/config.json").read_text())["dtype"] == "bfloat16"
    for name in cached.entries:
        routing = name.endswith(("gate.weight", "e_score_correction_bias"))
        assert cached.entry(name).dtype == ("F32" if routing else "BF16")
        wanted = slow_weight(original, name)
        assert torch.equal(cached.tensor(name), wanted if routing else wanted.bfloat16()), name


def test_the_cache_is_a_whole_checkpoint_directory(source, cache):
    config = json.loads((cache / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert (cache / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()
    assert sorted(path.name for path in cache.glob("*.safetensors*")) == ["model.safetensors"]


def test_shards_stay_within_their_limit_and_the_index_names_every_tensor(
    source, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 2_000_000)
    build_cache(source, tmp_path / "cache")
    sizes = [path.stat().st_size for path in (tmp_path / "cache").glob("model-*-of-*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 2_000_000 + 100_000
    Checkpoint(tmp_path / "cache").require_usable()


def test_the_real_model_needs_915_gb_in_shards_of_at_most_one_stack_of_experts(full_size):
    checkpoint = Checkpoint(full_size, ScaleConvention.MULTIPLIER)
    shards = cache_module.plan_shards(checkpoint, "float32")
    assert round(sum(shard.nbytes for shard in shards) / 1e9) == 915
    assert max(shard.nbytes for shard in shards) == 4 * 256 * 2 * 1536 * 3072


def test_an_interrupted_build_resumes_to_identical_bytes(source, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 2_000_000)
    build_cache(source, tmp_path / "whole")

    def interrupt(nbytes, seen=[0]):  # noqa: B006
        seen[0] += nbytes
        if seen[0] > 5_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(source, tmp_path / "resumed", advance=interrupt)
    with pytest.raises(CheckpointError, match="is not finished"):
        open_cache(tmp_path / "resumed", Checkpoint(source))
    result = build_cache(source, tmp_path / "resumed")
    assert result.reused_shards >= 1
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert build_cache(source, tmp_path / "resumed").was_finished


def test_a_damaged_file_is_named_and_only_its_shard_is_rebuilt(source, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 2_000_000)
    directory = tmp_path / "cache"
    build_cache(source, directory)
    whole = contents(directory)
    victim = Checkpoint(directory).entry("model.layers.1.block_sparse_moe.experts.3.w2.weight")
    before = (directory / victim.shard).stat()
    with (directory / victim.shard).open("r+b") as file:
        file.seek(victim.start + 5)
        file.write(b"\x55")
    # As a disk damages a file: nobody has modified it.
    os.utime(directory / victim.shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    untouched = {
        path: path.stat().st_mtime_ns
        for path in directory.glob("*.safetensors")
        if path.name != victim.shard
    }
    assert build_cache(source, directory).was_finished, "without --check nothing is read"
    result = build_cache(source, directory, check=True)
    assert result.damaged == (victim.name,)
    assert victim.name in result.render()
    assert contents(directory) == whole
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert build_cache(source, directory, check=True).was_finished


def test_a_good_cache_opens_and_is_mapped_not_copied(source, cache):
    opened = open_cache(cache, Checkpoint(source))
    array = opened.array("lm_head.weight")
    while isinstance(array.base, np.ndarray):
        array = array.base
    assert isinstance(array, np.memmap)


@pytest.mark.parametrize(
    ("spoil", "message"),
    {
        "absent": (
            shutil.rmtree,
            "does not exist; run `neuron-minimax cache .* --dtype float32`",
        ),
        "unfinished": (lambda cache: (cache / "cache.json").unlink(), "is not finished; run"),
        "unreadable": (
            lambda cache: (cache / "cache.json").write_text("{"),
            r"cache\.json cannot be used",
        ),
        "other source": (
            lambda cache: edit(cache, source_fingerprint="x"),
            "was made of another checkpoint; run",
        ),
        "other dtype": (
            lambda cache: edit(cache, dtype="bfloat16"),
            "holds bfloat16; run .* --overwrite",
        ),
        "lost shard": (
            lambda cache: (cache / "model.safetensors").unlink(),
            r"model\.safetensors is missing; run",
        ),
    }.values(),
    ids=["absent", "unfinished", "unreadable", "other source", "other dtype", "lost shard"],
)
def test_a_cache_that_does_not_fit_says_why_and_what_to_run(
    source, cache, tmp_path, spoil, message
):
    copy = shutil.copytree(cache, tmp_path / "copy")
    spoil(copy)
    with pytest.raises(CheckpointError, match=message):
        open_cache(copy, Checkpoint(source))


def edit(cache: Path, **fields) -> None:
    manifest = json.loads((cache / "cache.json").read_text())
    manifest["identity"] |= fields
    (cache / "cache.json").write_text(json.dumps(manifest))


def test_bad_requests_are_refused_before_the_first_byte(source, cache, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="dtype 'float16' is not supported"):
        build_cache(source, tmp_path / "a", "float16")
    with pytest.raises(CheckpointError, match="dtype 'float16' is not supported"):
        open_cache(cache, Checkpoint(source), "float16")
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        build_cache(source, source)
    with pytest.raises(ConversionError, match="differs in dtype"):
        build_cache(source, cache, "bf16")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(ConversionError, match="nothing was written"):
        build_cache(source, tmp_path / "small")
    assert not list((tmp_path / "small").glob("*.safetensors*"))


def test_nan_codes_and_bad_scales_stop_the_build_with_their_name(tmp_path):
    for number, suffix in enumerate(
        ("self_attn.k_proj.weight", "self_attn.k_proj.weight_scale_inv")
    ):
        directory = write_tiny(tmp_path / str(number))
        entry = Checkpoint(directory).entry(f"model.layers.0.{suffix}")
        with (directory / entry.shard).open("r+b") as file:
            file.seek(entry.start)
            file.write(b"\x7f" * 4 if number == 0 else b"\0" * 4)
        with pytest.raises(CheckpointError, match=f"layers.0.{suffix} has"):
            build_cache(directory, tmp_path / f"cache {number}")


def test_the_command_builds_checks_and_says_so(source, tmp_path):
    command = [
        sys.executable,
        "-m",
        "neuron_minimax",
        "cache",
        str(source),
        str(tmp_path / "cache"),
    ]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    again = subprocess.run([*command, "--check"], capture_output=True, text=True, check=True)
    assert ": 9.79 MB written" in first.stdout
    assert "is up to date" in again.stdout


@pytest.mark.parametrize("family", ["minimax_m2", "qwen3_moe", "minimind2_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_cache_is_mapped_into_the_models_layout_without_a_copy(tmp_path, family, dtype):
    """The oracle is the conversion of the cache, which arranges it in memory."""
    source = Checkpoint.open(write_tiny(tmp_path / "source", family=family))
    build_cache(source.directory, tmp_path / "cache", dtype)
    cache = open_cache(tmp_path / "cache", source, dtype)
    tensors = {name: cache.tensor(name) for name in cache.entries}
    wanted = convert_hf_to_neuron_state_dict(tensors, cache.config)
    state = mapped_state_dict(cache)
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name]), name
        assert file_at(tensor.data_ptr()) == str(tmp_path / "cache" / "model.safetensors"), name


def file_at(address):
    """The file that is mapped at an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        (first, last) = (int(end, 16) for end in fields[0].split("-"))
        if first <= address < last:
            return fields[5] if len(fields) == 6 else ""
    return ""


def test_a_cache_in_another_order_is_arranged_in_memory(tmp_path):
    source = Checkpoint.open(write_tiny(tmp_path / "source"))
    build_cache(source.directory, tmp_path / "cache")
    path = tmp_path / "cache" / "model.safetensors"
    wanted = {
        name: tensor.clone() for name, tensor in mapped_state_dict(Checkpoint(path.parent)).items()
    }
    save_file(load_file(path), path)  # by dtype and name
    state = mapped_state_dict(Checkpoint(path.parent))
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
