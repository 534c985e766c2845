"""Run prompts through a MiniMax-M2 checkpoint on the CPU and analyse which experts fire."""

import argparse
from datetime import datetime
from pathlib import Path

import neuron_minimax as nm
from neuron_minimax.cli.ending import exit_code, show
from neuron_minimax.cli.progress import Shown


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=nm.DEMO,
        help="checkpoint directory (default: the demo model)",
    )
    parser.add_argument("--prompt", nargs="+", default=["Who are you?"], metavar="TEXT_OR_FILE")
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--no_sample", action="store_true", help="greedy")
    parser.add_argument(
        "--cache_dir", type=Path, help="dequantized cache; used when it is there and good"
    )
    parser.add_argument("--dump_cache", action="store_true", help="build the cache first")
    parser.add_argument("--dump_only", action="store_true", help="build the cache and exit")
    parser.add_argument("--output_dir", type=Path, help="default: a new folder, named by the time")
    parser.add_argument(
        "--disable_structured_output", action="store_true", help="plots and report only"
    )
    parser.add_argument("--output_format", choices=("json", "jsonl", "parquet"), default="json")
    parser.add_argument(
        "--enable_expert_similarity", action="store_true", help="compare expert weights"
    )
    parser.add_argument("--n_jobs", type=int, help="threads for the similarity")
    arguments = parser.parse_args(argv)
    if (arguments.dump_cache or arguments.dump_only) and arguments.cache_dir is None:
        parser.error("--dump_cache and --dump_only need --cache_dir")
    return arguments


def request_of(arguments: argparse.Namespace) -> "nm.ExpertsRequest":
    return nm.ExpertsRequest(
        output=arguments.output_dir or Path(f"experts_{datetime.now():%Y%m%d_%H%M%S_%f}"),
        prompts=arguments.prompt,
        max_new_tokens=arguments.max_tokens,
        sampling={
            "temperature": 0.0 if arguments.no_sample else arguments.temperature,
            "top_p": arguments.top_p,
        },
        options=nm.ReportOptions(
            structured=not arguments.disable_structured_output,
            record_format=arguments.output_format,
            expert_similarity=arguments.enable_expert_similarity,
            jobs=arguments.n_jobs,
        ),
    )


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)

    def run() -> int:
        lines = nm.analyse_checkpoint(
            request_of(arguments),
            arguments.checkpoint,
            Shown(),
            cache_dir=arguments.cache_dir,
            dump_cache=arguments.dump_cache,
            dump_only=arguments.dump_only,
        )
        show("\n".join(lines))
        return 0

    return exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
