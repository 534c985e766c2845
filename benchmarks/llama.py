"""The compiled CPU backend against llama.cpp with Q8_0 weights: decoding, prompts, first token.

python -m benchmarks.llama [--directory DIR] [--steps N] [--rounds N]

Needs the environment that `make .venv-llama/stamp` builds; without it the rows say so.
"""

import os
import site
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decoding import (
    BUCKETS,
    PROMPT,
    SEQ_LEN,
    bytes_per_step,
    compile_single,
    flops_of_prompt,
)
from benchmarks.gguf_file import write_gguf
from benchmarks.loading import PROMPT as FIRST_PROMPT
from benchmarks.loading import start_process
from benchmarks.machine import ROOT
from benchmarks.processes import Side, run_apart
from benchmarks.shared import REAL, checkpoint, compiled, parser_of
from benchmarks.sides import FILLED, limits, median_seconds, ours, prompt_ids, random_ids
from benchmarks.table import Goal, Row, render, row
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.demo import DEMO

ENVIRONMENT = ROOT / ".venv-llama"
SERVER = ENVIRONMENT / "build" / "bin" / "llama-server"
PEER = "llama.cpp Q8_0"
BATCHES = (1, 8, 32)
# Of a weight, the head's too: in Q8_0 32 numbers have a scale of two bytes.
PEER_BYTES = 34 / 32
VOCABULARY = REAL[1]["vocab_size"]


def missing() -> str:
    """Return why there is no llama.cpp to compare with, or nothing."""
    stamp = ENVIRONMENT / "stamp"
    return "" if stamp.exists() else f"llama.cpp is not built: make {stamp.relative_to(ROOT)}"


def import_packages() -> None:
    """Make `gguf` and `llama_cpp` importable: they follow this environment's own packages."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(SERVER.parent)
    (packages,) = ENVIRONMENT.glob("lib/python3*/site-packages")
    if str(packages) not in sys.path:
        site.addsitedir(str(packages))


def gguf_of(directory: Path, name: str, source: Path, kind: str = "Q8_0") -> Path:
    """Return the checkpoint as a GGUF file, which is written once."""
    import_packages()
    return write_gguf(Checkpoint.open(source), directory / "gguf" / f"{name}-{kind}.gguf", kind)


Found = list[dict[str, float]]  # of each round


class Llama:
    """A model in llama.cpp: `sequences` of up to `seq_len` positions each. `exact` attends in
    float32, else it is llama.cpp's default, flash attention over float16.
    """

    def __init__(self, path: Path, sequences: int, seq_len: int, exact: bool = False) -> None:
        import_packages()
        import llama_cpp

        self.api = llama_cpp
        self.silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silent, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * seq_len
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
        if exact:
            settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(PROMPT, 0, 1)

    def run(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> None:
        """Decode these tokens; of each sequence's last one there are logits."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        last = {sequence: n for n, sequence in enumerate(sequences)}
        for n, (token, position, sequence) in enumerate(
            zip(tokens, positions, sequences, strict=True)
        ):
            batch.token[n] = token
            batch.pos[n] = position
            batch.n_seq_id[n] = 1
            batch.seq_id[n][0] = sequence
            batch.logits[n] = last[sequence] == n
        if code := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        self.api.llama_synchronize(self.context)

    def prompt(self, ids: Sequence[int], sequence: int) -> np.ndarray:
        """Return the logits [V] of the last position."""
        self.run(ids, range(len(ids)), [sequence] * len(ids))
        logits = self.api.llama_get_logits_ith(self.context, -1)
        size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        return np.ctypeslib.as_array(logits, (size,)).copy()

    def forget(self, sequence: int, start: int = 0) -> None:
        self.api.llama_memory_seq_rm(self.memory, sequence, start, -1)


def llama(path: Path, steps: int, prompt: int, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Measure seconds per step of so many sequences ("step 8") and per prompt ("encode").

    The first value has the "logits" of the prompt's last position. Behind the sequences that decode
    there is one for prompts.
    """
    slots = max(batches)
    model = Llama(path, slots + 1, SEQ_LEN)
    ids = random_ids(VOCABULARY, FILLED + steps, slots).tolist()
    for slot in range(slots):
        filled = [row[slot] for row in ids[:FILLED]]
        model.run(filled, range(FILLED), [slot] * FILLED)

    def encode(_: int = 0) -> np.ndarray:
        model.forget(slots)
        return model.prompt(prompt_ids(VOCABULARY, prompt), slots)

    def steps_of(batch: int) -> float:
        seconds = median_seconds(
            lambda at: model.run(ids[at][:batch], [at] * batch, range(batch)),
            range(FILLED, FILLED + steps),
        )
        for slot in range(batch):
            model.forget(slot, FILLED)
        return seconds

    yield {"logits": encode()}
    while True:
        yield {f"step {batch}": steps_of(batch) for batch in batches} | {
            "encode": median_seconds(encode, range(3))
        }


def first_token(path: Path) -> float:
    """Return the seconds from a started process with its imports to the first token."""
    import_packages()
    import llama_cpp  # noqa: F401

    start = time.perf_counter()
    Llama(path, 1, SEQ_LEN).prompt(prompt_ids(VOCABULARY, FIRST_PROMPT), 0).argmax()
    return time.perf_counter() - start


def take_turns(directory: Path, path: Path, steps: int, rounds: int) -> list[Row]:
    compute = {
        "float32": compile_single(directory),
        "bfloat16": compiled(
            directory, *REAL, "bf16", slots=1, seq_len=SEQ_LEN, buckets=(PROMPT,), compute="bf16"
        ),
    }
    batched = {
        batch: compiled(
            directory, *REAL, f"{batch}-slots", slots=batch, seq_len=SEQ_LEN, buckets=BUCKETS[:1]
        )
        for batch in BATCHES[1:]
    }
    with ExitStack() as stack:
        peer = stack.enter_context(Side(llama, path, steps, PROMPT, BATCHES))
        sides = {
            name: stack.enter_context(Side(ours, traced, steps, PROMPT))
            for name, traced in compute.items()
        } | {
            str(batch): stack.enter_context(Side(ours, traced, steps))
            for batch, traced in batched.items()
        }
        logits = {name: side.ready["logits"] for name, side in sides.items()}
        theirs = []
        found: dict[str, Found] = {name: [] for name in sides}
        bounds: list[dict[str, float]] = []
        machine = stack.enter_context(Side(limits))
        for _ in range(rounds):
            for name, side in sides.items():
                found[name].append(side.measure())
            theirs.append(peer.measure())
            bounds.append(machine.measure())
    return [
        *decode_rows(found, theirs, bounds),
        *prompt_rows(found, theirs, bounds),
        logits_row(logits, peer.ready["logits"]),
    ]


def decode_rows(found: dict[str, Found], theirs: Found, bounds: Found) -> list[Row]:
    def against(what: str, name: str, batch: int, goal: float) -> Row:
        return row(
            what,
            [batch / each["step"] for each in found[name]],
            "tokens/s",
            peer=(PEER, [batch / each[f"step {batch}"] for each in theirs]),
            goal=Goal(figure="ratio", value=goal),
        )

    config = ModelConfig.from_dict(REAL[1])
    experts = config.num_experts_per_tok
    read = bytes_per_step(config, experts) / 1e9
    their_read = bytes_per_step(config, experts, PEER_BYTES, PEER_BYTES) / 1e9
    return [
        against("decode, batch 1", "float32", 1, 1.2),
        against("decode, batch 1, compute bf16", "bfloat16", 1, 1.4),
        *(
            row(
                f"decode, batch 1, compute {name}, weights read",
                [read / each["step"] for each in found[name]],
                "GB/s",
                peer=(PEER, [their_read / each["step 1"] for each in theirs]),
                limit=("reading memory", [each["read"] / 1e9 for each in bounds]),
            )
            for name in ("float32", "bfloat16")
        ),
        *(against(f"decode, batch {batch}", str(batch), batch, 1.5) for batch in BATCHES[1:]),
    ]


def prompt_rows(found: dict[str, Found], theirs: Found, bounds: Found) -> list[Row]:
    per_token = flops_of_prompt(ModelConfig.from_dict(REAL[1]), PROMPT) / PROMPT
    return [
        row(
            f"encode {PROMPT} tokens, {name}",
            [PROMPT / each["encode"] for each in found[name]],
            "tokens/s",
            peer=(PEER, [PROMPT / each["encode"] for each in theirs]),
            limit=(f"GEMM {name}", [each[name] / per_token for each in bounds]),
            goal=Goal(figure="ratio", value=goal),
        )
        for name, goal in (("float32", 1.3), ("bfloat16", 2.0))
    ]


def logits_row(logits: dict[str, np.ndarray], their_logits: np.ndarray) -> Row:
    """The oracle is our float32, which `decoding` holds against transformers."""
    off = [
        float(np.abs(each - logits["float32"]).max()) for each in (logits["bfloat16"], their_logits)
    ]
    return row(
        f"encode {PROMPT} tokens, bfloat16, logits off by",
        off[:1],
        "",
        less_is_better=True,
        peer=(PEER, off[1:]),
        goal=Goal(figure="ratio", value=1),
    )


def first_token_row(directory: Path, path: Path, rounds: int) -> Row:
    traced = compile_single(directory)
    mine = []
    peer = []
    for _ in range(rounds + 1):
        found = start_process(traced)
        mine.append(found["first"] - found["imported"])
        peer.append(run_apart(first_token, path))
    return row(
        f"load and first token behind {FIRST_PROMPT}",
        mine[1:],  # the first ones warm up
        "s",
        less_is_better=True,
        peer=(PEER, peer[1:]),
        goal=Goal(figure="ratio", value=1),
    )


def demo_logits_off(directory: Path) -> float:
    """Return how far llama.cpp's logits of the demo model in float32 are from our decoder's, which
    shows that the file says what the checkpoint does.
    """
    import torch

    from neuron_minimax.model.decoder import Decoder

    ids = prompt_ids(1280, 200)
    model = Decoder.from_checkpoint(Checkpoint.open(DEMO))
    with torch.inference_mode():
        expected = model(torch.tensor([ids]))[0][0, -1].numpy()
    peer = Llama(gguf_of(directory, "demo", DEMO, "F32"), 1, PROMPT, exact=True)
    return float(np.abs(peer.prompt(ids, 0) - expected).max())


def rows(directory: Path, steps: int = 24, rounds: int = 5) -> list[Row]:
    if reason := missing():
        return [Row(what="llama.cpp", skipped=reason)]
    path = run_apart(gguf_of, directory, REAL[0], checkpoint(directory, *REAL))
    return [
        *take_turns(directory, path, steps, rounds),
        first_token_row(directory, path, rounds),
        row(
            "llama.cpp's logits of the demo model's float32 GGUF, off by",
            [run_apart(demo_logits_off, directory)],
            "",
            less_is_better=True,
            goal=Goal(figure="ours", value=1e-4, at_most=True),
        ),
    ]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(render(rows(arguments.directory, arguments.steps, arguments.rounds)))


if __name__ == "__main__":
    main()
