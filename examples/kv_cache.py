"""The key/value cache of a Qwen2 model: what it saves, and what it takes.

    python examples/kv_cache.py                # a small model of random weights, made on the spot
    python examples/kv_cache.py CHECKPOINT     # a directory, or a Hugging Face hub id

Tokens are chosen greedily in float32. docs/cache.md describes the interface.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

import neuron_minimax as nm


def write_small_qwen2(directory: str) -> None:
    """Write a Qwen2 checkpoint of seven million random weights, as transformers saves it."""
    disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)


def without_cache(model: nm.Decoder, prompt: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the next tokens [B,steps]; each runs everything before it again."""
    ids = prompt
    for _ in range(steps):
        logits, _ = model(ids)
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids[:, prompt.shape[1] :]


def with_cache(
    model: nm.Decoder, prompt: torch.Tensor, steps: int, cache: nm.KVCache
) -> torch.Tensor:
    """Return the same tokens; each runs alone, after the keys and values of those before it."""
    ids = prompt
    tokens = []
    for _ in range(steps):
        logits, cache = model(ids, past_key_values=cache, use_cache=True)
        ids = logits[:, -1:].argmax(-1)
        tokens.append(ids)
    return torch.cat(tokens, dim=1)


def timed(generate: Callable[..., torch.Tensor], *arguments: object) -> tuple[torch.Tensor, float]:
    """Return what a function returns, and its seconds."""
    started = time.perf_counter()
    tokens = generate(*arguments)
    return tokens, time.perf_counter() - started


@torch.inference_mode()
def compare(model: nm.Decoder, prompt_tokens: int, steps: int) -> bool:
    """Print the speed with and without a cache and what the cache takes; return whether the tokens
    and the bytes are the same.
    """
    config = model.config
    prompt = torch.randint(config.vocab_size, (1, prompt_tokens))
    positions = prompt_tokens + steps - 1  # the last token is not run
    cache = nm.FullCache.allocate(config, 1, positions, model.compute)
    model(prompt)  # what the first pass of a process does once
    slow, slow_seconds = timed(without_cache, model, prompt, steps)
    fast, fast_seconds = timed(with_cache, model, prompt, steps, cache)
    layers = config.num_hidden_layers
    heads = config.num_key_value_heads
    size = model.compute.itemsize
    formula = 2 * layers * heads * config.head_dim * positions * size
    print(f"{config.family.title}, a prompt of {prompt_tokens} tokens, {steps} steps")
    print(f"without a cache: {slow_seconds:.2f} s, {steps / slow_seconds:.1f} tokens/s")
    print(f"with a cache:    {fast_seconds:.2f} s, {steps / fast_seconds:.1f} tokens/s")
    print(f"                 {slow_seconds / fast_seconds:.1f} times as fast")
    print(f"the same tokens: {int((slow == fast).sum())} of {steps}")
    print(f"the cache takes: {cache.nbytes:,} bytes")
    print(
        f"the formula:     {formula:,} bytes = 2 (keys, values) x {layers} layers x {heads} "
        f"heads x {config.head_dim} x {positions} positions x {size} bytes"
    )
    return torch.equal(slow, fast) and cache.nbytes == formula


def count(text: str) -> int:
    """Return a number of at least one. Raises ValueError, which argparse reports."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(argv: list[str] | None = None) -> int:
    """Return 0 when both ways give the same tokens."""
    parser = argparse.ArgumentParser(description="Speed and size of the key/value cache.")
    parser.add_argument("checkpoint", nargs="?", help="default: a small Qwen2, made on the spot")
    parser.add_argument("--prompt-tokens", type=count, default=128)
    parser.add_argument("--steps", type=count, default=50)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        try:
            if options.checkpoint is None:
                write_small_qwen2(directory)
            checkpoint = nm.Checkpoint.open(options.checkpoint or directory)
            model = nm.Decoder.from_checkpoint(checkpoint)
            return 0 if compare(model, options.prompt_tokens, options.steps) else 1
        except nm.NeuronMiniMaxError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
