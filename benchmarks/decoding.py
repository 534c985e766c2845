"""Decoding with the compiled CPU backend against transformers and the machine's read bandwidth, in one run.

python -m benchmarks.decoding [--directory DIR] [--steps N] [--rounds N] [--batch-size N]

Each row is measured in a process of its own, rounds alternate between them, and the median is reported. Needs 14 GB for
transformers in float32.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.shared import checkpoint, compiled, converted, parser_of
from benchmarks.synthetic import real_layers
from neuron_minimax.config import ModelConfig

OURS = """
import json, sys, time, torch
from neuron_minimax.backends import load
started = time.perf_counter()
backend, steps = load(sys.argv[1]), int(sys.argv[2])
loaded = time.perf_counter() - started
slots, vocabulary = backend.capabilities.slots, backend.capabilities.vocab_size
generator = torch.Generator().manual_seed(0)
ids = torch.randint(0, vocabulary, (steps + 64, slots), generator=generator)
active = torch.ones(slots, dtype=torch.bool)
for position in range(64):
    backend.step(ids[position], torch.full((slots,), position), active)
times = []
for position in range(64, 64 + steps):
    start = time.perf_counter()
    backend.step(ids[position], torch.full((slots,), position), active)
    times.append(time.perf_counter() - start)
status = [line.split() for line in open("/proc/self/status") if line.startswith("Rss")]
memory = {fields[0].rstrip(":"): 1024 * int(fields[1]) for fields in status}
data = torch.ones(1 << 27, dtype=torch.int64)
reads = []
for _ in range(5):
    start = time.perf_counter()
    data.sum()
    reads.append(time.perf_counter() - start)
print(json.dumps({"seconds": sorted(times)[steps // 2], "load": loaded, "read": data.nbytes / min(reads), **memory}))
"""
PEER = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
dtype, steps = getattr(torch, sys.argv[2]), int(sys.argv[3])
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).to(dtype)
loaded = time.perf_counter() - started
ids = torch.randint(0, model.config.vocab_size, (steps + 8, 1), generator=torch.Generator().manual_seed(0))
times = []
with torch.inference_mode():
    cache = model(ids[:4].T, use_cache=True).past_key_values
    for position in range(4, steps + 8):
        start = time.perf_counter()
        model(ids[position : position + 1], past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - start)
print(json.dumps({"seconds": sorted(times[4:])[steps // 2], "load": loaded}))
"""


def run(program: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(finished.stderr)
    return json.loads(finished.stdout.splitlines()[-1])


def bytes_per_token(config: ModelConfig) -> int:
    """Stored bytes that one token has to touch: FP8 attention and chosen experts, the BF16 head."""
    attention = 2 * config.hidden_size * (config.query_size + config.key_value_size)
    experts = 3 * config.hidden_size * config.intermediate_size * config.num_experts_per_tok
    return config.num_hidden_layers * (attention + experts) + 2 * config.vocab_size * config.hidden_size


def prepare(directory: Path, batch_size: int) -> tuple[Path, dict[int, Path]]:
    model = "2-layers-64-experts", real_layers()
    traced = {
        slots: compiled(directory, *model, f"{slots}-slots", slots=slots, seq_len=1024, buckets=(512,))
        for slots in (1, batch_size)
    }
    return checkpoint(directory, *model), traced


def measure(directory: Path, steps: int, rounds: int, batch_size: int) -> None:
    source, traced = prepare(directory, batch_size)
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name, arguments in (
            ("ours, batch 1", (OURS, traced[1], steps)),
            ("transformers bfloat16", (PEER, source, "bfloat16", steps)),
            (f"ours, batch {batch_size}", (OURS, traced[batch_size], steps)),
            ("transformers float32", (PEER, source, "float32", steps)),
        ):
            results.setdefault(name, []).append(run(*arguments))
    medians = {
        name: {key: statistics.median(each[key] for each in rows) for key in rows[0]} for name, rows in results.items()
    }
    print_table(
        medians,
        ModelConfig.from_dir(source),
        batch_size,
        stored_bytes(converted(directory, "2-layers-64-experts", real_layers())),
    )


def stored_bytes(converted: Path) -> int:
    return sum(path.stat().st_size for path in converted.glob("*.safetensors"))


def print_table(medians: dict[str, dict[str, float]], config: ModelConfig, batch_size: int, stored: int) -> None:
    single = medians["ours, batch 1"]
    print(f"{'':24} tokens/s  ms/step  load s")
    for name, row in medians.items():
        tokens = batch_size if name == f"ours, batch {batch_size}" else 1
        print(f"{name:24} {tokens / row['seconds']:8.1f} {1000 * row['seconds']:8.1f} {row['load']:7.1f}")
    rate = bytes_per_token(config) / single["seconds"]
    ratios = {
        "over transformers bfloat16 (at least 1.4)": medians["transformers bfloat16"]["seconds"] / single["seconds"],
        "over transformers float32 (at least 3)": medians["transformers float32"]["seconds"] / single["seconds"],
        f"batch {batch_size} over batch 1 (at least 2)": batch_size
        * single["seconds"]
        / medians[f"ours, batch {batch_size}"]["seconds"],
        "share of read bandwidth (at least 0.8)": rate / single["read"],
        "resident over stored bytes (under 1.15)": (single["RssAnon"] + single["RssFile"]) / stored,
    }
    print(f"{rate / 1e9:.1f} GB/s of stored bytes; reading runs at {single['read'] / 1e9:.1f} GB/s")
    for name, ratio in ratios.items():
        print(f"{name:44} {ratio:6.2f}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    measure(arguments.directory, arguments.steps, arguments.rounds, arguments.batch_size)


if __name__ == "__main__":
    main()
