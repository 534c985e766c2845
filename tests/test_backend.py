"""The CPU backend: eager and compiled alike against transformers, the compiled directory, and what
is refused.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from neuron_minimax.backends import CompileReport, compile_model, load
from neuron_minimax.backends.base import Backend, Capabilities
from neuron_minimax.backends.cpu import backend as cpu_backend
from neuron_minimax.backends.cpu import graphs
from neuron_minimax.backends.cpu.options import CPUOptions, check_options
from neuron_minimax.backends.directory import read_manifest
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import BackendError
from neuron_minimax.kernels.reference import as_cached
from tests.opened import convert
from tests.tiny import tiny_config, write_tiny
from tests.tiny_traced import edit_manifest, write_traced

TOLERANCE = 3e-5
SEQ_LEN = 48
BUCKETS = (8, 32)
RAGGED = {"hidden_size": 192, "intermediate_size": 320, "num_key_value_heads": 1}
# Where all experts are chosen 8 tokens each are streamed, and 32 expanded for the library.
ALL_CHOSEN = {"num_local_experts": 4, "num_experts_per_tok": 4}
# The eager case costs nothing, the exported one seconds; a compiled one the compile of two graphs,
# so this is of several slots, and that of test_family_pipeline of one.
CASES = {
    "eager": ({}, 3, "eager", BUCKETS),
    "exported, ragged sizes": (RAGGED | ALL_CHOSEN, 3, "exported", BUCKETS),
    "compiled, ragged sizes": (RAGGED, 3, "compiled", BUCKETS[1:]),
}


def options(slots: int = 2, engine: str = "eager", buckets: tuple[int, ...] = BUCKETS) -> dict:
    return {"slots": slots, "seq_len": SEQ_LEN, "buckets": buckets, "engine": engine}


def make(
    directory: Path, overrides: dict, slots: int, engine: str, buckets: tuple[int, ...] = BUCKETS
) -> Path:
    one_layer = {
        "num_hidden_layers": 1 if engine == "compiled" else 2,
        "use_mtp": False,
        **overrides,
    }
    convert(write_tiny(directory / "fp8", **one_layer), directory / "converted")
    write_tiny(directory / "dense", dense=True, **one_layer)
    compile_model(
        directory / "converted", directory / "traced", options=options(slots, engine, buckets)
    )
    return directory


class Case:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.backend = load(directory / "traced")
        dense = directory / "dense"
        self.oracle = AutoModelForCausalLM.from_pretrained(
            dense, dtype=torch.float32, experts_implementation="eager"
        )

    @torch.no_grad()
    def reference(self, ids: list[int]) -> torch.Tensor:
        return self.oracle(torch.tensor([ids])).logits[0]


@contextmanager
def two_threads():
    """Give torch two threads, here and in the processes that compile for as many as they find."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "2")
            yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return make(tmp_path_factory.mktemp("exported"), *CASES["exported, ragged sizes"])


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    if request.param == "exported, ragged sizes":
        yield Case(request.getfixturevalue("exported"))
        return
    compiled = request.param.startswith("compiled")
    with two_threads() if compiled else nullcontext():
        yield Case(make(tmp_path_factory.mktemp("backend"), *CASES[request.param]))


FIRST_TOKENS = """
import os
import sys

os.environ["CXX"] = "false"  # nothing may be compiled

import torch

from neuron_minimax.backends import load
from neuron_minimax.kernels.cpu import operators

backend = load(sys.argv[1])
assert hasattr(torch.ops.neuron_minimax, "has_pairs"), "there are no kernels"
ids = list(range(int(sys.argv[2])))
print(backend.encode(0, ids, all_positions=True).double().sum().item())
every = torch.ones(backend.capabilities.slots, dtype=torch.int64)
backend.step(every, len(ids) * every, every.bool())
"""


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    return make(tmp_path_factory.mktemp("eager"), {}, 2, "eager")


def some_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 160, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def step(backend: Backend, tokens: dict[int, tuple[int, int]]) -> torch.Tensor:
    """One step from slot to (token, position); the other slots are inactive, with values that mean
    nothing.
    """
    slots = backend.capabilities.slots
    inputs = [tokens.get(slot, (10**9, -7)) for slot in range(slots)]
    ids, positions = (torch.tensor(values) for values in zip(*inputs, strict=True))
    return backend.step(ids, positions, torch.tensor([slot in tokens for slot in range(slots)]))


@pytest.mark.parametrize("length", [1, 2, 8, 9, 32, 33, SEQ_LEN])
def test_prompts_around_every_bucket_equal_transformers(case, length, monkeypatch):
    monkeypatch.setattr(cpu_backend, "LOGIT_ROWS", 3)
    ids = some_ids(length)
    rows = list(case.backend.encode_rows(0, ids))
    assert max(map(len, rows)) <= 3
    logits = case.backend.encode(0, ids, all_positions=True)
    assert (torch.cat(rows) - logits).abs().max() < TOLERANCE
    assert logits.dtype == torch.float32
    assert logits.shape == (length, 160)
    assert (logits - case.reference(ids)).abs().max() < TOLERANCE
    assert (case.backend.encode(0, ids) - logits[-1]).abs().max() < TOLERANCE


def test_a_prompt_is_computed_at_its_own_length(case, monkeypatch):
    encoded = [case.backend.capabilities.encoded_length(length) for length in (1, 9, 32)]
    assert encoded == [1, 9, 32]
    if not hasattr(case.backend, "context_encoding"):  # the eager engine has no graph
        return
    seen = []
    graph = case.backend.context_encoding

    def watched(ids, *place):
        seen.append(len(ids))
        return graph(ids, *place)

    monkeypatch.setattr(case.backend, "context_encoding", watched)
    for length in (9, 33, 1):
        case.backend.encode(0, some_ids(length))
    assert seen == [9, 32, 2, 2]  # a graph's size that may vary is never 1


def test_steps_from_a_prompt_to_a_full_cache_equal_transformers(case):
    ids = some_ids(5)
    logits = case.backend.encode(0, ids)
    while len(ids) < SEQ_LEN:
        assert (logits - case.reference(ids)[-1]).abs().max() < TOLERANCE
        ids.append(int(logits.argmax()))
        logits = step(case.backend, {0: (ids[-1], len(ids) - 1)})[0]
    prompt = torch.tensor([ids[:5]])
    mask = torch.ones_like(prompt)
    wanted = case.oracle.generate(
        prompt, attention_mask=mask, max_new_tokens=SEQ_LEN - 5, do_sample=False, eos_token_id=None
    )
    assert ids == wanted[0].tolist()
    with pytest.raises(
        BackendError, match=f"slot 0 has position {SEQ_LEN}; expected 0 to {SEQ_LEN - 1}"
    ):
        step(case.backend, {0: (1, SEQ_LEN)})


def test_a_prompt_in_chunks_equals_the_prompt_at_once(case):
    ids = some_ids(30, seed=1)
    case.backend.encode(0, ids[:3])
    case.backend.encode(0, ids[3:24], start=3)
    logits = case.backend.encode(0, ids[24:], start=24)
    assert (logits - case.reference(ids)[-1]).abs().max() < TOLERANCE


def test_a_load_leaves_nothing_in_the_temporary_folder(case, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loaded = load(case.directory / "traced")
    assert not list(tmp_path.iterdir())
    ids = some_ids(9)
    assert torch.equal(loaded.encode(0, ids), case.backend.encode(0, ids))


def test_slots_do_not_see_each_other(case):
    slots = case.backend.capabilities.slots
    sequences = {slot: some_ids(4 + 9 * slot, seed=slot) for slot in range(slots)}
    for slot, ids in sequences.items():
        case.backend.encode(
            slot, some_ids(SEQ_LEN, seed=99)
        )  # what an earlier request leaves behind
        case.backend.reset(slot)
        case.backend.encode(slot, ids)
    for turn in range(6):
        active = [slot for slot in range(slots) if slots == 1 or (turn + slot) % 3]
        for slot in active:
            sequences[slot].append(7 * turn + slot)
        logits = step(
            case.backend, {slot: (sequences[slot][-1], len(sequences[slot]) - 1) for slot in active}
        )
        for slot in active:
            assert (logits[slot] - case.reference(sequences[slot])[-1]).abs().max() < TOLERANCE


def test_a_copied_prefix_goes_on_bit_for_bit_as_where_it_was_computed(case):
    backend = case.backend
    ids = some_ids(33, seed=3)
    whole = some_ids(SEQ_LEN, seed=4)
    # Prompt and steps, behind what another sequence has left.
    first = backend.encode(0, ids[:20])
    for place in range(20, 24):
        step(backend, {0: (ids[place], place)})
    backend.encode(2, whole)
    backend.copy(0, 2, 0, 9)
    backend.copy(0, 2, 9, 24)
    wanted = backend.encode(0, ids[24:32], start=24), step(backend, {0: (ids[32], 32)})[0]
    backend.encode(0, whole)  # the source is overwritten
    found = backend.encode(2, ids[24:32], start=24), step(backend, {2: (ids[32], 32)})[2]
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert (found[1] - case.reference(ids)[-1]).abs().max() < TOLERANCE
    # A prefix that ends inside the other's tokens; the copy leaves other slots and positions alone.
    backend.encode(1, ids[:20])
    backend.copy(2, 1, 0, 12)
    assert torch.equal(backend.encode(1, ids[12:20], start=12), backend.encode(2, ids[12:20], 12))
    assert (backend.encode(1, ids[12:20], 12) - first).abs().max() < TOLERANCE


def test_bf16_compute_is_close_to_float32(eager, tmp_path):
    compile_model(eager / "converted", tmp_path / "low", options=options() | {"compute": "bf16"})
    ids = some_ids(12)
    low, full = (
        load(path).encode(0, ids, all_positions=True)
        for path in (tmp_path / "low", eager / "traced")
    )
    assert low.dtype == torch.float32
    # Of logits of size 1; single tokens may meet another expert.
    assert 1e-4 < (low - full).abs().median() < 0.02


# Of logits up to 5, the median: twice what is found here, where FP8 has a token meet other experts.
CACHE_ERROR = {"bfloat16": 4e-3, "fp8": 0.1}


@pytest.mark.parametrize("engine", ["eager", "exported"])
@pytest.mark.parametrize("kv_cache_dtype", CACHE_ERROR)
def test_a_cache_in_fewer_bits_holds_what_float32_would_rounded(
    eager, kv_cache_dtype, engine, tmp_path
):
    low = options(2, engine, BUCKETS[1:]) | {"kv_cache_dtype": kv_cache_dtype}
    compile_model(eager / "converted", tmp_path / "low", options=low)
    compile_model(eager / "converted", tmp_path / "full", options=options(2, engine, BUCKETS[1:]))
    rounded, full = (load(tmp_path / name) for name in ("low", "full"))
    ids = some_ids(40)
    found = []
    for backend in (rounded, full):
        # In chunks and steps; the first layer's keys and values do not depend on what was cached.
        first = backend.encode(0, ids[:36], all_positions=True)
        found.append(
            torch.cat([first, *(step(backend, {0: (ids[at], at)})[:1] for at in (36, 37))])
        )
    of_layer = rounded.cache.keys[0], rounded.cache.values[0]
    for kept, wide in zip(of_layer, (full.cache.keys[0], full.cache.values[0]), strict=True):
        assert torch.equal(kept[0, :, :38], as_cached(wide[0, :, :38], kept.dtype))
    off = (found[0] - found[1]).abs().median()
    assert CACHE_ERROR[kv_cache_dtype] / 20 < off < CACHE_ERROR[kv_cache_dtype]
    rounded.copy(0, 1, 0, 38)
    assert torch.equal(rounded.encode(1, ids[38:], 38), rounded.encode(0, ids[38:], 38))
    stored = rounded.cache.nbytes // 2 // (SEQ_LEN + (engine != "eager"))
    parsed = CPUOptions.parse(read_manifest(tmp_path / "low").options)
    assert parsed.cache_bytes_per_token(rounded.config) == stored


BAD_REQUESTS = {
    "no such slot": (lambda backend: backend.encode(2, [1]), "slot 2 does not exist; .* 2 slots"),
    "empty prompt": (lambda backend: backend.encode(0, []), "prompt is empty"),
    "too long": (
        lambda backend: backend.encode(0, [1] * 49),
        "ends at position 49, .* seq_len 48; shorten",
    ),
    "too long by its start": (
        lambda backend: backend.encode(0, [1] * 9, start=40),
        "ends at position 49",
    ),
    "token below": (lambda backend: backend.encode(0, [3, -1]), "token -1 is outside"),
    "token above": (lambda backend: backend.encode(0, [160]), "token 160 is outside .* 0 to 159"),
    "step token": (
        lambda backend: step(backend, {1: (160, 0)}),
        "slot 1 has token 160; expected 0 to 159",
    ),
    "step shape": (
        lambda backend: backend.step(*[torch.zeros(3, dtype=torch.int64)] * 3),
        r"\[3\]; expected \[2\]",
    ),
    "copy from no slot": (lambda backend: backend.copy(2, 0, 0, 1), "slot 2 does not exist"),
    "copy to no slot": (lambda backend: backend.copy(0, -1, 0, 1), "slot -1 does not exist"),
    "copy backwards": (
        lambda backend: backend.copy(0, 1, 2, 1),
        "positions 2 to 1: expected an ascending range within seq_len 48",
    ),
    "copy too long": (
        lambda backend: backend.copy(0, 1, 0, 49),
        "positions 0 to 49: .* seq_len 48",
    ),
    "reset": (lambda backend: backend.reset(-1), "slot -1 does not exist"),
}


@pytest.mark.parametrize(("request_", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_request_that_cannot_be_served_says_why(eager, request_, message):
    with pytest.raises(BackendError, match=message):
        request_(load(eager / "traced"))


class LastPositionOnly(Backend):
    """A backend without chunks or all-position logits, as NxDI's is; nothing reaches it in the
    test.
    """

    capabilities = Capabilities(
        slots=1,
        seq_len=32,
        buckets=(8, 16),
        vocab_size=9,
        chunked_encoding=False,
        all_position_logits=False,
    )

    def reset(self, slot):
        raise AssertionError

    _encode = _step = reset


def test_prompts_beyond_the_last_bucket_are_refused_where_chunks_are_not_possible():
    backend = LastPositionOnly()
    with pytest.raises(BackendError, match="17 tokens, but the largest bucket is 16"):
        backend.encode(0, [1] * 17)
    with pytest.raises(BackendError, match="starts at position 4"):
        backend.encode(0, [1], start=4)
    with pytest.raises(BackendError, match="last position only"):
        backend.encode(0, [1], all_positions=True)
    with pytest.raises(BackendError, match="cannot copy between slots"):
        backend.copy(0, 0, 0, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slots": 0}, "batch size 0"),
        ({"buckets": (16, 8)}, r"buckets \[16, 8\]: expected ascending"),
        ({"seq_len": 64, "buckets": (8, 128)}, r"buckets \[8, 128\]"),
        ({"seq_len": 1024}, "1024 is beyond max_position_embeddings 512"),
        ({"compute": "float16"}, "compute is 'float16'; expected float32 or bf16"),
        (
            {"kv_cache_dtype": "int8"},
            "kv_cache_dtype is 'int8'; expected auto or float32 or bfloat16 or fp8",
        ),
        ({"tp_degree": 4}, "does not take --tp-degree"),
    ],
)
def test_options_that_cannot_be_compiled_are_named(given, message):
    with pytest.raises(BackendError, match=message):
        check_options(ModelConfig.from_dict(tiny_config()), given)


def test_default_options_fit_the_model():
    chosen = check_options(ModelConfig.from_dict(tiny_config(max_position_embeddings=100)), {})
    assert (chosen["slots"], chosen["seq_len"], chosen["buckets"]) == (1, 100, [64])


def copy_of(directory: Path, destination: Path) -> Path:
    shutil.copytree(directory, destination, copy_function=os.link)
    return destination


def compile_again(directory: Path, **changed) -> CompileReport:
    return compile_model(directory / "converted", directory / "traced", options=options() | changed)


def recompile(directory: Path, **changed) -> str:
    """Why compiling again made graphs; empty when the directory was up to date."""
    return compile_again(directory, **changed).reason


def rewrite_manifest(directory: Path, change) -> None:
    edit_manifest(directory / "traced", change)


def test_the_weights_are_hard_links_not_a_second_copy(eager):
    for shard in (eager / "converted").glob("*.safetensors"):
        assert (eager / "traced" / "model" / shard.name).samefile(shard)


def test_where_links_are_impossible_the_directory_refers_to_the_weights(
    eager, tmp_path, monkeypatch
):
    def refuse(source, destination):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    compile_model(eager / "converted", tmp_path / "traced", options=options())
    assert not list((tmp_path / "traced").rglob("*.safetensors"))
    ids = some_ids(6)
    assert torch.equal(
        load(tmp_path / "traced").encode(0, ids), load(eager / "traced").encode(0, ids)
    )


def test_an_unchanged_compile_is_recognized_and_a_changed_one_is_not(eager, tmp_path):
    work = copy_of(eager, tmp_path / "work")
    assert recompile(work) == ""
    assert recompile(work, slots=3) == "option slots was 2 and is 3"
    assert recompile(work, slots=3) == ""
    shutil.rmtree(work / "converted")
    convert(write_tiny(tmp_path / "other", seed=1), work / "converted")
    assert recompile(work, slots=3) == "the converted checkpoint is another one"


def test_recognizing_an_unchanged_compile_does_not_import_torch(eager):
    program = (
        "import sys; from neuron_minimax.backends import compile_model\n"
        f"report = compile_model({str(eager / 'converted')!r}, {str(eager / 'traced')!r}, "
        f"options={options()!r})\n"
        "assert not report.reason, report.reason; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("part", "key", "message"),
    [
        ("versions", "torch", "version torch was 'other' and is"),
        ("versions", "code", "version code was 'other'"),
        ("machine", "architecture", "machine architecture was 'other'"),
    ],
)
def test_a_compile_from_another_version_or_machine_is_refused_and_rebuilt(
    eager, tmp_path, part, key, message
):
    work = copy_of(eager, tmp_path / "work")
    rewrite_manifest(work, lambda fields: fields[part].update({key: "other"}))
    with pytest.raises(BackendError, match=f"cannot be used: {message}.*compile"):
        load(work / "traced")
    assert message in recompile(work)
    load(work / "traced")


def test_another_version_is_named_before_a_fingerprint_that_it_took_another_way(eager, tmp_path):
    work = copy_of(eager, tmp_path / "work")

    def make_older(fields):
        fields["versions"]["code"] = "older"
        fields["checkpoint"] = "taken another way"

    rewrite_manifest(work, make_older)
    with pytest.raises(BackendError, match="cannot be used: version code was 'older' and is"):
        load(work / "traced")
    assert "version code was 'older'" in recompile(work)


def test_a_compile_by_another_version_of_this_package_is_used_when_its_code_is_equal(
    eager, tmp_path, monkeypatch
):
    work = copy_of(eager, tmp_path / "work")
    installed = metadata.version
    manifest = json.loads((work / "traced" / "manifest.json").read_text())
    assert manifest["made_by"] == f"neuron-minimax {installed('neuron-minimax')}"
    monkeypatch.setattr(
        metadata, "version", lambda name: "99.0" if name == "neuron-minimax" else installed(name)
    )
    assert recompile(work) == ""
    load(work / "traced")


def test_a_half_written_directory_is_refused_and_rebuilt(eager, tmp_path):
    work = copy_of(eager, tmp_path / "work")
    (work / "traced" / ".unfinished").touch()
    (work / "traced" / "manifest.json").unlink()
    with pytest.raises(BackendError, match="that is not finished"):
        load(work / "traced")
    assert recompile(work) == "an earlier compile did not finish"


def test_a_broken_manifest_is_refused_and_rebuilt(eager, tmp_path):
    work = copy_of(eager, tmp_path / "work")
    rewrite_manifest(work, lambda fields: fields.update(format=99))
    with pytest.raises(BackendError, match=r"manifest\.json cannot be used \(format: "):
        load(work / "traced")
    assert "cannot be used (format: " in recompile(work)


def test_weights_that_changed_since_the_compile_are_noticed_at_load(eager, tmp_path):
    work = copy_of(eager, tmp_path / "work")
    shard = next((work / "traced" / "model").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    with pytest.raises(BackendError, match=f"{shard.name} has other bytes .*; run .*compile"):
        load(work / "traced")
    again = compile_again(work)
    assert not again.reason
    assert f"{shard.name} has other bytes" in again.refreshed
    load(work / "traced")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("*.safetensors", lambda data: data[:-100], r"has \d+ bytes, not"),
        ("*.safetensors", lambda data: b"", "has 0 bytes, not"),
        ("*.safetensors", None, "is missing"),
        ("*.index.json", lambda data: data[:-9], r"has \d+ bytes, not"),
        ("tokenizer.json", lambda data: data[:-9] + b" " * 9, "has other bytes"),
        ("conversion.json", lambda data: data[:-9], "cannot be used"),
        ("conversion.json", None, r"has no conversion\.json"),
    ],
)
def test_a_compile_with_a_damaged_model_is_refused_until_it_is_compiled_again(
    tmp_path, name, content, problem
):
    traced = write_traced(tmp_path)
    damaged = min((traced / "model").glob(name))
    data = damaged.read_bytes()
    damaged.unlink()  # a hard link: the converted directory stays as it is
    if content is not None:
        damaged.write_bytes(content(data))
    with pytest.raises(BackendError) as raised:
        load(traced)
    message = str(raised.value)
    assert re.fullmatch(
        rf"{traced} cannot be used: [^;]*{problem}[^;]*; "
        rf"run `neuron-minimax compile CONVERTED {traced}` again",
        message,
    ), message
    again = compile_model(
        traced.parent / "converted", traced, options=read_manifest(traced).options
    )
    assert not again.reason
    assert again.refreshed == message.rpartition("; run ")[0]
    load(traced)


def test_a_directory_that_holds_something_else_is_left_alone(eager, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(BackendError, match=r"holds thesis\.tex and no manifest\.json"):
        compile_model(eager / "converted", tmp_path, options=options())
    assert (tmp_path / "thesis.tex").exists()


def test_a_second_compile_into_the_same_directory_is_refused(eager, tmp_path):
    (tmp_path / "traced").mkdir()
    held = os.open(tmp_path / "traced", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BackendError, match="another compile is writing"):
            compile_model(eager / "converted", tmp_path / "traced", options=options())
    finally:
        os.close(held)


def test_an_unknown_backend_is_refused(eager, tmp_path):
    with pytest.raises(BackendError, match="backend 'tpu' does not exist; expected cpu or neuron"):
        compile_model(eager / "converted", tmp_path / "traced", backend="tpu")


def test_without_a_compiler_the_exported_graphs_run_and_say_so(eager, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    asked = options(engine="compiled", buckets=(8,))
    report = compile_model(eager / "converted", tmp_path / "traced", options=asked)
    assert "no C++ compiler" in report.render()
    kinds = {name.partition(".")[2] for name in report.manifest.graphs}
    assert kinds == {"exported.pt2"}
    ids = some_ids(6)
    assert torch.allclose(
        load(tmp_path / "traced").encode(0, ids), load(eager / "traced").encode(0, ids), atol=1e-5
    )
    monkeypatch.undo()
    wanted = check_options(ModelConfig.from_dir(eager / "converted"), asked)
    assert (report.manifest.options["engine"], wanted["engine"]) == ("exported", "compiled")


@pytest.fixture(scope="module")
def failure(eager, tmp_path_factory) -> BackendError:
    """What a compile raises whose compiler fails."""
    traced = tmp_path_factory.mktemp("failing") / "traced"
    asked = options(engine="compiled", buckets=(8,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "false")
        with pytest.raises(BackendError) as raised:
            compile_model(eager / "converted", traced, options=asked)
    return raised.value


def test_where_the_tested_torch_cannot_compile_the_compile_fails(failure):
    said = r"compiling for the CPU failed \(BackendError: .* could not compile the kernels .*\); "
    assert re.fullmatch(said + ".* or use --engine eager", str(failure))


def test_where_an_older_torch_cannot_compile_the_exported_graphs_run_and_say_so(
    eager, tmp_path, monkeypatch, failure
):
    build = graphs.build_graphs

    def fail_as_before(model, directory, options, progress):
        if options.engine == "compiled":
            raise failure.__cause__
        return build(model, directory, options, progress)

    monkeypatch.setattr(graphs, "build_graphs", fail_as_before)
    monkeypatch.setattr(cpu_backend, "TESTED_TORCH", (99, 0))
    report = compile_model(
        eager / "converted", tmp_path / "traced", options=options(engine="compiled", buckets=(8,))
    )
    assert "could not compile this model" in report.render()
    assert "the exported graphs run instead" in report.render()
    ids = some_ids(6)
    assert torch.allclose(
        load(tmp_path / "traced").encode(0, ids), load(eager / "traced").encode(0, ids), atol=1e-5
    )


def test_exported_graphs_hold_no_weights(exported):
    weights = sum(path.stat().st_size for path in (exported / "converted").glob("*.safetensors"))
    sizes = [path.stat().st_size for path in (exported / "traced" / "graphs").glob("*.pt2")]
    assert max(sizes) < weights / 2


@pytest.fixture(scope="module")
def dense_bf16(tmp_path_factory):
    """A compiled directory for the other kernels: of weights that are not FP8, in BF16."""
    directory = tmp_path_factory.mktemp("dense_bf16")
    source = write_tiny(directory / "source", dense=True, num_hidden_layers=1, use_mtp=False)
    convert(source, directory / "converted")
    asked = options(1, "exported", BUCKETS[1:]) | {"compute": "bf16"}
    compile_model(directory / "converted", directory / "traced", options=asked)
    return directory


@pytest.mark.parametrize("name", ["exported", "dense_bf16"])
def test_a_compiled_directory_has_its_kernels_wherever_it_is_loaded(name, tmp_path, request):
    traced = request.getfixturevalue(name) / "traced"
    elsewhere = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "nothing")}
    command = [sys.executable, "-c", FIRST_TOKENS, traced, str(SEQ_LEN - 1)]
    said = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=elsewhere
    ).stdout
    here = load(traced).encode(0, list(range(SEQ_LEN - 1)), all_positions=True)
    assert float(said) == here.double().sum().item()
