"""The compiled CPU backend against transformers and the machine's limits: decoding and encoding.

python -m benchmarks.decoding [--directory DIR] [--steps N] [--rounds N] [--batch-size N]

Every side loads once in a process of its own and then takes its turn in each round. Needs 20 GB of
memory.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import Side
from benchmarks.shared import REAL, checkpoint, compiled, parser_of
from benchmarks.sides import ours, transformers
from benchmarks.table import Goal, Row, render, row
from neuron_minimax.config import ModelConfig

PROMPT = 512
SEQ_LEN = 1024
BUCKETS = (64, PROMPT)
Rounds = dict[str, dict[str, list[float]]]


def compile_single(directory: Path) -> Path:
    return compiled(directory, *REAL, "1-slots", slots=1, seq_len=SEQ_LEN, buckets=BUCKETS)


def prepare(directory: Path, batch_size: int) -> dict[str, Path]:
    return {
        "float32": compile_single(directory),
        "bfloat16": compiled(
            directory, *REAL, "bf16", slots=1, seq_len=SEQ_LEN, buckets=(PROMPT,), compute="bf16"
        ),
        "batch": compiled(
            directory,
            *REAL,
            f"{batch_size}-slots",
            slots=batch_size,
            seq_len=SEQ_LEN,
            buckets=(64,),
        ),
    }


def take_turns(
    directory: Path, steps: int, rounds: int, batch_size: int
) -> tuple[Rounds, dict[str, Any]]:
    """Return the figures by side, one value per round, and the logits by side."""
    traced = prepare(directory, batch_size)
    source = checkpoint(directory, *REAL)
    with ExitStack() as stack:
        # The widest first: while it dequantizes it takes half as much memory again.
        sides = {
            "transformers float32": stack.enter_context(
                Side(transformers, source, "float32", steps, PROMPT)
            ),
            "transformers bfloat16": stack.enter_context(
                Side(transformers, source, "bfloat16", steps, PROMPT)
            ),
            "float32": stack.enter_context(Side(ours, traced["float32"], steps, PROMPT, "float32")),
            "bfloat16": stack.enter_context(
                Side(ours, traced["bfloat16"], steps, PROMPT, "bfloat16")
            ),
            "batch": stack.enter_context(Side(ours, traced["batch"], steps)),
        }
        logits = {name: side.ready["logits"] for name, side in sides.items()}
        turns = [{name: side.measure() for name, side in sides.items()} for _ in range(rounds)]
    found = {
        name: {key: [turn[name][key] for turn in turns] for key in turns[0][name]} for name in sides
    }
    return found, logits


def distinct_experts(config: ModelConfig, batch: int) -> float:
    """Return how many experts of a layer `batch` tokens choose when all are as likely."""
    experts = config.num_local_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** batch)


def bytes_per_step(
    config: ModelConfig, experts: float, of_weight: float = 1, of_head: float = 2
) -> float:
    """Return the stored bytes of a step: attention, so many experts per layer, and the head; a
    weight has one byte in FP8, and two in the head's BF16.
    """
    attention = 2 * config.hidden_size * (config.query_size + config.key_value_size)
    mlp = 3 * config.hidden_size * config.intermediate_size * experts
    layers = config.num_hidden_layers * (attention + mlp)
    return of_weight * layers + of_head * config.vocab_size * config.hidden_size


def flops_of_prompt(config: ModelConfig, tokens: int) -> float:
    """Count two per weight and token of projections and chosen experts, and the head once."""
    attention = 2 * config.hidden_size * (config.query_size + config.key_value_size)
    mlp = 3 * config.hidden_size * config.intermediate_size * config.num_experts_per_tok
    return 2 * (
        tokens * config.num_hidden_layers * (attention + mlp)
        + config.vocab_size * config.hidden_size
    )


def decode_rows(found: Rounds, config: ModelConfig, batch_size: int) -> list[Row]:
    def rates(name: str, tokens: int = 1) -> list[float]:
        return [tokens / seconds for seconds in found[name]["step"]]

    reads = found["float32"]["read"]
    single = rates("float32")
    peers = ("transformers bfloat16", "transformers float32")
    goals = (Goal(figure="ratio", value=1.4), Goal(figure="ratio", value=3))
    touched, in_batch = (
        bytes_per_step(config, distinct_experts(config, batch)) for batch in (1, batch_size)
    )
    weights = [touched * rate / 1e9 for rate in single]
    return [
        *(
            row("decode, batch 1", single, "tokens/s", peer=(peer, rates(peer)), goal=goal)
            for peer, goal in zip(peers, goals, strict=True)
        ),
        row(
            "decode, batch 1, compute bf16",
            rates("bfloat16"),
            "tokens/s",
            peer=(peers[0], rates(peers[0])),
        ),
        row(
            "decode, batch 1, weights read",
            weights,
            "GB/s",
            limit=("reading memory", [rate / 1e9 for rate in reads]),
            goal=Goal(figure="share", value=0.8),
        ),
        row(
            f"decode, batch {batch_size}",
            rates("batch", batch_size),
            "tokens/s",
            peer=("batch 1", single),
            limit=(
                "reading the distinct experts",
                [batch_size * rate / in_batch for rate in reads],
            ),
            goal=Goal(figure="ratio", value=2),
        ),
    ]


def encode_rows(found: Rounds, logits: dict[str, Any], config: ModelConfig) -> list[Row]:
    rows = []
    per_token = flops_of_prompt(config, PROMPT) / PROMPT
    for name, goal in (("float32", 1.2), ("bfloat16", 1.0)):
        peer = f"transformers {name}"
        rates = {
            side: [PROMPT / seconds for seconds in found[side]["encode"]] for side in (name, peer)
        }
        limit = (f"GEMM {name}", [rate / per_token for rate in found[name]["flops"]])
        what = f"encode {PROMPT} tokens, {name}"
        aim = Goal(figure="ratio", value=goal)
        rows.append(
            row(what, rates[name], "tokens/s", peer=(peer, rates[peer]), limit=limit, goal=aim)
        )
        rows.append(logits_row(name, logits))
    return rows


def logits_row(name: str, logits: dict[str, Any]) -> Row:
    """Return how far the last position's logits are from transformers' in float32.

    The peer of our bf16 is transformers' bfloat16.
    """
    oracle = logits["transformers float32"]
    off = [float(np.abs(logits[side] - oracle).max()) for side in (name, "transformers bfloat16")]
    what = f"encode {PROMPT} tokens, {name}, logits off by"
    if name == "float32":
        return row(
            what,
            off[:1],
            "",
            less_is_better=True,
            goal=Goal(figure="ours", value=1e-4, at_most=True),
        )
    return row(what, off[:1], "", less_is_better=True, peer=("transformers bfloat16", off[1:]))


def rows(directory: Path, steps: int = 24, rounds: int = 5, batch_size: int = 8) -> list[Row]:
    found, logits = take_turns(directory, steps, rounds, batch_size)
    config = ModelConfig.from_dict(REAL[1])
    return decode_rows(found, config, batch_size) + encode_rows(found, logits, config)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    print(
        render(rows(arguments.directory, arguments.steps, arguments.rounds, arguments.batch_size))
    )


if __name__ == "__main__":
    main()
