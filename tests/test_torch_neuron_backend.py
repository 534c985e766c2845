"""`--backend torch-neuron` with ranks on the CPU: the tokens of transformers and of the CPU
backend, and how ranks start, fail and end. Most run eager, as compilers take long.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from neuron_minimax.backends import compile_model, load, verify_compiled
from neuron_minimax.backends.directory import read_manifest
from neuron_minimax.backends.torch_neuron.options import check_options
from neuron_minimax.cli import main
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.errors import BackendError, ConfigError
from neuron_minimax.generation.tokenizer import TextTokenizer
from tests.damaged import flip
from tests.family_oracles import Case, Pair
from tests.served import web
from tests.tiny_tokenizer import write_tokenizer
from tests.tiny_traced import VOCAB, answer_alone
from tests.waiting import WAIT, wait_until

TOLERANCE = 2e-5  # Measured: at most 6e-6, for logits of up to 4.4.
SEQ_LEN = 96
OPTIONS = {"slots": 2, "seq_len": SEQ_LEN, "buckets": [8, 80]}
FAMILIES = ("minimax_m2", "qwen3_moe")
GROUPS = [("minimax_m2", 1, 1), ("minimax_m2", 4, 2), ("qwen3_moe", 2, 2)]


@dataclass
class Model:
    directory: Path
    pair: Pair

    def compiled(self, name: str, **options) -> Path:
        traced = self.directory / name
        given = OPTIONS | {"device": "cpu", "engine": "eager"} | options
        compile_model(self.directory / "converted", traced, backend="torch-neuron", options=given)
        return traced


def made(directory: Path, family: str, **overrides) -> Model:
    if family == "minimax_m2":
        write_tokenizer(directory / "published", VOCAB)
    pair = Pair(Case(family, {"vocab_size": VOCAB, **overrides}), directory)
    plan_conversion(pair.checkpoint).write(directory / "converted")
    compile_model(directory / "converted", directory / "cpu", options=OPTIONS | {"engine": "eager"})
    return Model(directory, pair)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    return {family: made(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def two(models):
    """MiniMax-M2 on two ranks, which share the channels of every expert."""
    return load(models["minimax_m2"].compiled("two", tp_degree=2, moe_tp_degree=2))


def some_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def step(backend, slot: int, token: int, position: int) -> torch.Tensor:
    tokens, positions = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    tokens[slot], positions[slot] = token, position
    return backend.step(tokens, positions, torch.arange(2) == slot)[slot]


@pytest.mark.parametrize(("family", "tp_degree", "ep_degree"), GROUPS)
def test_greedy_tokens_are_those_of_the_cpu_backend_and_of_transformers(
    models, family, tp_degree, ep_degree
):
    model = models[family]
    traced = model.compiled(f"{tp_degree}", tp_degree=tp_degree, moe_ep_degree=ep_degree)
    prompt = some_ids(11)
    found = answer_alone(load(traced), prompt, max_new_tokens=8).token_ids
    assert found == answer_alone(load(model.directory / "cpu"), prompt, max_new_tokens=8).token_ids
    assert found == model.pair.greedy(prompt, 8)


def test_every_position_of_a_prompt_in_pieces_has_the_logits_of_transformers(models, two):
    ids = some_ids(SEQ_LEN, seed=1)
    wanted = models["minimax_m2"].pair.logits(torch.tensor([ids]))[0]
    assert wanted.std() > 0.3, "logits that are all alike show nothing"
    assert (two.encode(0, ids, all_positions=True) - wanted).abs().max() < TOLERANCE
    rows = list(two.encode_rows(0, ids[3:90], start=3))
    assert [len(each) for each in rows] == [64, 16, 7]
    assert (torch.cat(rows) - wanted[3:90]).abs().max() < TOLERANCE
    last = two.encode(0, ids[90:95], start=90)
    assert (last - wanted[94]).abs().max() < TOLERANCE
    assert (step(two, 0, ids[95], 95) - wanted[95]).abs().max() < TOLERANCE


def test_a_copied_prefix_goes_on_as_where_it_was_computed_and_leaves_the_rest(models, two):
    ids = some_ids(20, seed=2)
    others = some_ids(40, seed=3)
    two.encode(0, ids)
    two.encode(1, others)
    two.copy(0, 1, 0, 9)
    two.copy(0, 1, 9, 15)
    assert torch.equal(two.encode(1, ids[15:], start=15), two.encode(0, ids[15:], start=15))
    two.encode(1, others)
    two.encode(0, some_ids(80, seed=7))
    two.copy(0, 1, 39, 80)
    two.encode(1, others[39:], start=39)
    wanted = models["minimax_m2"].pair.logits(torch.tensor([[*others, 5]]))[0, -1]
    assert (step(two, 1, 5, 40) - wanted).abs().max() < TOLERANCE


def pids(backend) -> list[int]:
    return [each.process.pid for each in backend.group._ranks]


def is_there(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupted_call_leaves_the_next_one_its_own_answer(two):
    ids = some_ids(9, seed=4)
    wanted = two.encode(0, ids)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        os.kill(pids(two)[1], signal.SIGSTOP)  # or the call might be over before
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            two.encode(1, some_ids(30, seed=5))
    finally:
        signal.signal(signal.SIGALRM, before)
        os.kill(pids(two)[1], signal.SIGCONT)
    assert torch.equal(two.encode(0, ids), wanted)


def test_a_rank_that_dies_amid_a_call_ends_the_others_with_one_message(two):
    """The last test of these ranks."""
    first, second = pids(two)
    os.kill(second, signal.SIGSTOP)  # the first one waits for it
    errors = []

    def call() -> None:
        try:
            two.encode(0, some_ids(9))
        except BackendError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    os.kill(second, signal.SIGKILL)
    thread.join(WAIT)
    [message] = errors
    assert message.startswith("rank 1 of 2 was ended by SIGKILL; all ranks were ended: start the")
    assert not is_there(first)
    assert not is_there(second)
    with pytest.raises(BackendError, match="rank 1 of 2 was ended by SIGKILL"):
        two.encode(0, some_ids(9))
    assert str(two.failure) == message


SERVE = [sys.executable, "-m", "neuron_minimax", "serve"]


def children(pid: int) -> list[int]:
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (thread / "children").read_text().split()]
    return sorted(found)


def test_a_server_answers_by_its_ranks_and_ends_with_one_that_nothing_is_asked_of(models):
    traced = models["minimax_m2"].compiled("served", tp_degree=2)
    process = subprocess.Popen([*SERVE, traced, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        process.stderr.readline()
        url = re.fullmatch(r"listening on (http://\S+)\n", process.stderr.readline()).group(1)
        prompt = some_ids(7, seed=6)
        body = {"prompt": prompt, "max_tokens": 5, "temperature": 0}
        answer = web.post(f"{url}/v1/completions", json=body).json()["choices"][0]
        cpu = load(models["minimax_m2"].directory / "cpu")
        tokenizer = TextTokenizer.from_dir(cpu.model_directory)
        wanted = answer_alone(cpu, prompt, tokenizer, max_new_tokens=5)
        assert answer["text"] == wanted.text
        assert len(wanted.text) > 3
        ranks = [pid for pid in children(process.pid) if b"rank import main" in cmdline(pid)]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        said = process.stderr.read()
        assert process.wait(WAIT) == 1
    finally:
        process.kill()
    lines = said.splitlines()
    assert "request failed" not in said, "none was under way"
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert lines[-1].startswith("error: rank 1 of 2 was ended by SIGKILL")
    assert not any(is_there(pid) for pid in ranks)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


HOLD = """
import sys
from neuron_minimax.backends import load
backend = load(sys.argv[1])
print(*(each.process.pid for each in backend.group._ranks), backend.group._tasks[0].scratch)
sys.stdout.flush()
sys.stdin.read()
"""


def test_ranks_end_with_a_process_that_is_killed(models):
    traced = models["qwen3_moe"].compiled("held", tp_degree=1)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, traced],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        pid, scratch = process.stdout.readline().split()
        rank = int(pid)
        assert is_there(rank)
        assert Path(scratch).is_dir()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    wait_until(lambda: not is_there(rank))
    assert not Path(scratch).exists()


COMPILER = """#!/bin/sh
echo "$@" >> {log}
exec g++ "$@" -O0
"""


def test_what_was_compiled_is_not_compiled_again(tmp_path, monkeypatch):
    """By a compiler that keeps a list, and is in a hurry: as many slots as a bucket has tokens make
    the same kernels, without vectors.
    """
    log = tmp_path / "log"
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(log=log))
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    model = made(tmp_path, "qwen2", num_hidden_layers=1)
    traced = model.compiled("compiled", engine="compiled", buckets=[2], seq_len=32)
    manifest = read_manifest(traced)
    assert list(manifest.graphs) == ["rank_0.tar"]
    assert {path.name for path in (traced / "graphs").iterdir()} == {"rank_0.tar"}
    verify_compiled(traced)
    compiled = log.read_text().count(".cpp ")
    assert compiled > 3
    prompt = some_ids(5)
    backend = load(traced)
    assert log.read_text().count(".cpp ") == compiled
    assert answer_alone(backend, prompt, max_new_tokens=6).token_ids == model.pair.greedy(prompt, 6)
    flip(traced / "graphs/rank_0.tar")
    with pytest.raises(BackendError, match=r"graph rank_0\.tar is not the file that was compiled"):
        load(traced)


def test_without_the_device_a_message_says_what_to_install(models, tmp_path, capsys):
    converted = models["minimax_m2"].directory / "converted"
    command = ["compile", str(converted), str(tmp_path / "traced"), "--backend", "torch-neuron"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in ("torch-neuronx 2.13.3.0 or 2.14.3.0", "trn2", "trn3", "https://", "--device cpu"):
        assert word in said
    assert main([*command, "--device", "cpu", "--engine", "eager", "--batch-size", "3"]) == 0
    options = read_manifest(tmp_path / "traced").options
    assert options["slots"] == 3
    assert options["compute"] == "float32"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"instance": "trn2.48xlarge"}, "does not take --instance"),
        ({"device": "gpu"}, "device is 'gpu'; expected neuron or cpu"),
        ({"engine": "eager"}, "engine is 'eager'; expected compiled"),
        ({"engine": "exported"}, "expected compiled or eager"),
        ({"engine": "exported", "device": "cpu"}, "expected compiled or eager"),
        ({"tp_degree": 4, "moe_tp_degree": 3}, "moe_tp_degree 3 times moe_ep_degree 1 is not"),
        ({"seq_len": 10**6}, "beyond max_position_embeddings"),
        ({"seq_len": 32, "buckets": [64]}, "expected ascending lengths from 1 to seq_len 32"),
        ({"tp_degree": 0}, "tp_degree is 0; expected at least 1"),
        ({"slots": "two"}, "slots"),
    ],
)
def test_options_that_cannot_be_are_refused(models, given, message):
    config = ModelConfig.from_dir(models["minimax_m2"].directory / "converted")
    with pytest.raises((BackendError, ConfigError), match=message):
        check_options(config, given)


def test_a_group_that_cannot_hold_the_model_is_refused_before_a_rank_starts(models):
    with pytest.raises(ConfigError, match=r"intermediate_size \d+ cannot be divided over 3 ranks"):
        models["minimax_m2"].compiled("large", tp_degree=3, moe_tp_degree=3)


def test_a_command_that_torchrun_has_started_is_refused(models, monkeypatch):
    traced = models["minimax_m2"].compiled("one", tp_degree=1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(BackendError, match=r"itself .* run it without torchrun"):
        load(traced)


def test_the_command_line_says_whose_an_option_is(models, tmp_path, capsys):
    converted = models["minimax_m2"].directory / "converted"
    command = ["compile", str(converted), str(tmp_path), "--tp-degree", "2"]
    assert main(command) == 2
    assert "--backend neuron or torch-neuron, not cpu" in " ".join(capsys.readouterr().err.split())
