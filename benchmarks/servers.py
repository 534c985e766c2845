"""Servers under load: how each is started over one model, and ended."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks import llama
from benchmarks.machine import ROOT
from benchmarks.processes import run_apart
from benchmarks.shared import checkpoint, compiled
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.cache import build_cache
from neuron_minimax.demo import DEMO

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
VLLM = ROOT / ".venv-vllm-0.29"
CORES = sorted(os.sched_getaffinity(0))
SEQ_LEN = 512
BUCKETS = (64, 256)
OURS = "ours"
# Our servers, and what each computes in.
COMPUTE = {OURS: "float32", "ours, compute bf16": "bf16"}
TRANSFORMERS = "transformers serve"
LLAMA = "llama-server Q8_0"
VLLM_CPU = "vLLM CPU BF16"


@dataclass(frozen=True)
class Model:
    """A seeded checkpoint with the demo's tokenizer, in the directory of all benchmarks."""

    directory: Path
    name: str
    config_json: dict

    def source(self) -> Path:
        return self._with_tokenizer(checkpoint(self.directory, self.name, self.config_json))

    def cache(self, dtype: str) -> Path:
        """Return the dequantized checkpoint."""
        cache = self.directory / "caches" / f"{self.name}-{dtype}"
        build_cache(Checkpoint.open(self.source()), cache, dtype)
        return self._with_tokenizer(cache)

    def compiled(self, slots: int, engine: str, compute: str) -> Path:
        self.source()  # its tokenizer is compiled with it
        return compiled(
            self.directory,
            self.name,
            self.config_json,
            f"{slots}-slots-{engine}-{compute}",
            slots=slots,
            seq_len=SEQ_LEN,
            buckets=BUCKETS,
            engine=engine,
            compute=compute,
        )

    def _with_tokenizer(self, directory: Path) -> Path:
        for name in TOKENIZER_FILES:
            shutil.copyfile(DEMO / name, directory / name)
        return directory


@dataclass(frozen=True)
class Server:
    """How a server is started: it is up once `pattern`, whose group is the URL, is in its log."""

    name: str
    command: list[str]
    pattern: str
    model: str = "model"  # what requests call it

    @contextmanager
    def running(self, log: Path) -> Iterator[tuple[str, int]]:
        """Run it, and all that it starts, on the first core until the block ends; yield its URL and
        process id. Several share that core: ask one at a time.
        """
        environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("w") as file:
            child = subprocess.Popen(
                self.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        try:
            os.sched_setaffinity(child.pid, CORES[:1])
            while not (url := self._url(log)):
                if child.poll() is not None:
                    said = log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{' '.join(self.command)} ended:\n{said}")
                time.sleep(0.1)
            yield url, child.pid
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)  # its children, too: the session is its own
                child.wait()

    def _url(self, log: Path) -> str:
        """Return where the server answers, or nothing yet."""
        found = re.search(self.pattern, log.read_text(errors="replace"))
        return found.group(1) if found and is_healthy(found.group(1)) else ""


@contextmanager
def clients_apart() -> Iterator[None]:
    """Leave the servers' core to them, where there is another one for this thread."""
    os.sched_setaffinity(0, CORES[1:] or CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ours(traced: Path, name: str = OURS) -> Server:
    command = [sys.executable, "-m", "neuron_minimax", "serve", str(traced), "--port", "0"]
    return Server(name, [*command, "--served-model-name", "model"], r"listening on (http://\S+)")


def transformers(model: Model, continuous_batching: bool) -> Server:
    cache = str(model.cache("float32"))
    command = [str(Path(sys.executable).with_name("transformers")), "serve", cache]
    command += ["--device", "cpu", "--dtype", "float32", "--port", str(free_port())]
    command += ["--continuous-batching"] * continuous_batching
    return Server(TRANSFORMERS, command, r"running on (http://\S+)", cache)


def llama_server(model: Model, slots: int, clients: int) -> Server:
    """A connection has a thread of the server's to itself, else it may be closed while it waits."""
    gguf = run_apart(llama.gguf_of, model.directory, model.name, model.source())
    command = [str(llama.SERVER), "--model", str(gguf), "--port", str(free_port())]
    command += ["--parallel", str(slots), "--ctx-size", str(slots * SEQ_LEN)]
    command += ["--threads-http", str(clients + 4), "--alias", "model"]
    command += ["--threads", "1", "--threads-batch", "1"]
    return Server(LLAMA, command, r"listening on (http://\S+)")


def vllm(model: Model, slots: int) -> Server:
    python = str(VLLM / "bin" / "python")
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model.cache("bf16")), "--dtype", "bfloat16"]
    command += ["--host", "127.0.0.1", "--port", str(free_port())]
    command += ["--max-num-seqs", str(slots), "--max-model-len", str(SEQ_LEN)]
    command += ["--served-model-name", "model"]
    return Server(VLLM_CPU, command, r"Starting vLLM server on (http://\S+)")


def missing_vllm() -> str:
    """Return why there is no vLLM to compare with, or nothing: without its own operators it would
    be another one.
    """
    stamp = VLLM / "stamp"
    if not stamp.exists():
        return f"vLLM is not installed: make {stamp.relative_to(ROOT)}"
    python = str(VLLM / "bin" / "python")
    loaded = "import torch, vllm._C; torch.ops._C.rms_norm"
    done = subprocess.run([python, "-c", loaded], capture_output=True, cwd=ROOT, check=False)
    return "" if done.returncode == 0 else "vLLM's operators cannot be loaded with this torch"
