"""Plays the part of vLLM-Neuron's scheduler and runner, as their documentation and source have it:
blocks from a pool; per step a chunk of one prompt, or a token of each sequence; padding to buckets,
prefixes shared, a sequence preempted and computed again elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

BLOCK_SIZE = 4
MAX_BLOCKS = 8  # of a sequence
POOL = 24
PROMPT_BUCKETS = (4, 8)
SEQUENCE_BUCKETS = (1, 2, 4)
NO_BLOCK = -1  # the runner writes it in place of vLLM's null block, 0
STALE = 1e4  # what lies in blocks before they are written


class Pool(Protocol):
    """Blocks that belong to no sequence."""

    def take(self, count: int) -> list[int]: ...

    def give_back(self, blocks: Sequence[int]) -> None: ...


class MixedPool:
    """Blocks in no order; what comes back goes out last. Block 0 is never given."""

    def __init__(self) -> None:
        order = torch.randperm(POOL - 1, generator=torch.Generator().manual_seed(3)) + 1
        self.free = order.tolist()

    def take(self, count: int) -> list[int]:
        taken = self.free[:count]
        self.free = self.free[count:]
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        self.free += blocks


@dataclass
class Request:
    """A prompt, and its tokens with what was generated."""

    prompt: list[int]
    tokens: list[int] = field(init=False)
    blocks: list[int] = field(default_factory=list)
    shared: int = 0  # blocks at the beginning that are another's
    computed: int = 0
    rows: dict[int, torch.Tensor] = field(default_factory=dict)  # logits by position

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


@dataclass
class Runner:
    """Calls a model. `sampling` makes the sampling parameters of so many sequences; with it the
    model is expected to sample, else it gives logits.
    """

    model: Any
    forward: Callable[..., Any]
    pool: Pool
    sampling: Callable[[int], torch.Tensor] | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        spec = self.model.get_kv_spec()
        shapes = {
            layer.name: (POOL, layer.num_kv_heads, BLOCK_SIZE, layer.head_size)
            for layer in spec.layers
        }
        dtypes = {layer.name: layer.dtype for layer in spec.layers}
        self.model.bind_kv_cache(
            {
                name: [torch.full(shape, STALE, dtype=dtypes[name]) for _ in range(2)]
                for name, shape in shapes.items()
            }
        )
        self.names = list(shapes)

    def prefill(self, request: Request, limit: int | None = None) -> None:
        """Compute at most a bucket of what is pending, and keep the token that follows a whole
        prompt.
        """
        count = min(request.pending, limit or PROMPT_BUCKETS[-1])
        padded = next(bucket for bucket in PROMPT_BUCKETS if bucket >= count)
        self._run([request], [count], padded)

    def decode(self, requests: Sequence[Request]) -> None:
        """One token of each; all have one pending."""
        assert all(request.pending == 1 for request in requests)
        self._run(requests, [1] * len(requests), 1)

    def preempt(self, request: Request) -> None:
        self.pool.give_back(request.blocks[request.shared :])
        request.blocks = []
        request.shared = 0
        request.computed = 0

    def share(self, source: Request, request: Request, blocks: int) -> None:
        """Let a request begin with full blocks of another."""
        assert source.tokens[: blocks * BLOCK_SIZE] == request.tokens[: blocks * BLOCK_SIZE]
        request.blocks = source.blocks[:blocks]
        request.shared = blocks
        request.computed = blocks * BLOCK_SIZE

    def _run(self, requests: Sequence[Request], counts: Sequence[int], padded: int) -> None:
        """A step of so many tokens of each request, padded to `padded` tokens, and for tokens of
        one to a bucket of sequences.
        """
        decoding = padded == 1
        sequences = len(requests)
        if decoding:
            sequences = next(bucket for bucket in SEQUENCE_BUCKETS if bucket >= len(requests))
        ids, positions, slots = (torch.zeros(sequences, padded, dtype=torch.int64) for _ in "abc")
        slots.fill_(-1)
        # Rows of no request hold what was there before.
        table = torch.full((sequences, MAX_BLOCKS), NO_BLOCK, dtype=torch.int32)
        table[len(requests) :, 0] = POOL - 1
        sampled = torch.zeros(sequences, dtype=torch.int64)
        for row, (request, count) in enumerate(zip(requests, counts, strict=True)):
            needed = -(-(request.computed + count) // BLOCK_SIZE) - len(request.blocks)
            request.blocks += self.pool.take(needed)
            assert len(request.blocks) <= MAX_BLOCKS
            table[row, : len(request.blocks)] = torch.tensor(request.blocks)
            places = torch.arange(request.computed, request.computed + count)
            ids[row, :count] = torch.tensor(request.tokens)[places]
            positions[row] = places[-1]  # that of the last token where there is padding
            positions[row, :count] = places
            blocks = table[row, places // BLOCK_SIZE].long()
            slots[row, :count] = blocks * BLOCK_SIZE + places % BLOCK_SIZE
            sampled[row:] = row * padded + count - 1
        result = self._call(ids, positions, slots, table, sampled)
        logits, tokens = self._read(result)
        for row, (request, count) in enumerate(zip(requests, counts, strict=True)):
            request.computed += count
            request.rows[request.computed - 1] = logits[row]
            if request.pending == 0:
                request.tokens.append(int(tokens[row]))

    def _call(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        table: torch.Tensor,
        sampled: torch.Tensor,
    ) -> Any:
        step = {
            "block_table_tensor": table,
            "full_block_table_tensor": table.clone(),
            "slot_mapping": slots.flatten(),
            "max_query_len": ids.shape[1],
            "block_size": BLOCK_SIZE,
            "max_blocks_per_seq": MAX_BLOCKS,
            "decode_token_threshold": 1,
            "cached_seq_len": positions[:1, :1].to(torch.int32),
            "kv_segment_size": 0,
        }
        return self.forward(
            input_ids=ids.flatten().to(torch.int32),
            positions=positions.flatten(),
            attn_metadata=dict.fromkeys(self.names, step),
            sampling_positions=sampled,
            sampling_params=self.sampling(len(ids)) if self.sampling else None,
            spec_decode_metadata=None,
            logit_mask=None,
            rank=torch.tensor(self.rank, dtype=torch.int32),
            inputs_embeds=None,
            is_token_ids=None,
        )

    def _read(self, result: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.sampling is None:
            return result, result.argmax(-1)
        tokens, logits = result
        assert tokens.dtype == torch.int32
        return logits, tokens


def prompts(vocabulary: int = 160) -> list[list[int]]:
    """Three; the second begins as the first, for two blocks."""
    generator = torch.Generator().manual_seed(11)
    drawn = torch.randint(0, vocabulary, (3, 13), generator=generator).tolist()
    first, second, third = drawn
    return [first, first[: 2 * BLOCK_SIZE] + second[:3], third[:6]]


def serve(runner: Runner) -> list[Request]:
    """Requests that come while others run, share blocks, and lose theirs."""
    first, second, third = map(Request, prompts())
    runner.prefill(first)
    runner.prefill(first)  # 8 of 13 tokens, then 5, padded to 8
    runner.decode([first])
    runner.prefill(third)
    runner.decode([first, third])
    runner.share(first, second, 2)
    runner.prefill(second)  # 3 tokens, padded to 4
    runner.decode([first, second, third])  # padded to 4
    runner.preempt(third)
    runner.decode([first, second])
    runner.prefill(third, limit=3)
    runner.decode([second, first])  # the batch in another order
    while third.pending > 1:
        runner.prefill(third)
    for _ in range(3):
        runner.decode([third, first, second])
    return [first, second, third]
