"""Run prompts through a MiniMax-M2 checkpoint on the CPU and analyse which experts fire."""

import argparse
import sys
from pathlib import Path

from neuron_minimax.checkpoint.fp32_cache import build_cache
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.cli import token_bar
from neuron_minimax.errors import NeuronMiniMaxError
from neuron_minimax.experts.batch import Outputs
from neuron_minimax.experts.command import DEMO, ExpertsRequest, find_cache, run_experts


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEMO, help="checkpoint directory (default: the demo model)")
    parser.add_argument("--prompt", nargs="+", default=["Who are you?"], metavar="TEXT_OR_FILE")
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--no_sample", action="store_true", help="greedy")
    parser.add_argument("--cache_dir", type=Path, help="dequantized cache; used when it is there and good")
    parser.add_argument("--dump_cache", action="store_true", help="build the cache first")
    parser.add_argument("--dump_only", action="store_true", help="build the cache and exit")
    parser.add_argument("--output_dir", type=Path, default=Path("experts"))
    parser.add_argument("--disable_structured_output", action="store_true", help="plots and report only")
    parser.add_argument("--output_format", choices=("json", "jsonl", "parquet"), default="json")
    parser.add_argument("--enable_expert_similarity", action="store_true", help="compare expert weights")
    parser.add_argument("--n_jobs", type=int, help="threads for the similarity")
    arguments = parser.parse_args(argv)
    if (arguments.dump_cache or arguments.dump_only) and arguments.cache_dir is None:
        parser.error("--dump_cache and --dump_only need --cache_dir")
    return arguments


def run(given: argparse.Namespace) -> None:
    if given.dump_cache or given.dump_only:
        print(build_cache(given.checkpoint, given.cache_dir).render(given.cache_dir))
    if given.dump_only:
        return
    cache = find_cache(given.cache_dir, given.checkpoint)
    if cache:
        print(f"Loading from cache {cache}")
    outputs = Outputs(
        structured=not given.disable_structured_output,
        record_format=given.output_format,
        similarity_of=Checkpoint(given.checkpoint) if given.enable_expert_similarity else None,
        jobs=given.n_jobs,
    )
    request = ExpertsRequest(
        output=given.output_dir,
        model=given.checkpoint,
        prompts=given.prompt,
        max_new_tokens=given.max_tokens,
        sampling={"temperature": 0.0 if given.no_sample else given.temperature, "top_p": given.top_p},
        cache_dir=cache,
        outputs=outputs,
    )
    with token_bar() as advance:
        text = run_experts(request, advance)
    print(text)


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except NeuronMiniMaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
