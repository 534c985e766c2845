"""The whole way, from a checkpoint to words: inspect, convert, verify, compile, load, generate.

Without arguments it runs on the embedded demo checkpoint and the CPU. On a Neuron instance:

    python generation_demo.py --checkpoint MiniMax-M2 --traced-model-dir traced_model/m2 \\
        --backend neuron --instance trn2.48xlarge --tp-degree 64 --moe-tp-degree 1 \\
        --moe-ep-degree 64 --batch-size 32 --seq-len 1024
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import neuron_minimax as nm
from neuron_minimax.cli.chat import talk, template_arguments
from neuron_minimax.cli.ending import exit_code, show
from neuron_minimax.cli.models import parse_integers
from neuron_minimax.cli.run import Stages
from neuron_minimax.cli.turns import TurnPrinter, say_if_cut, show_note
from neuron_minimax.errors import GenerationError, counted

PROMPTS = ("What is the capital of Canada?", "What is 45 + 36?", "Sort: 9 2 4 7")
SMOKE_TOKENS = 50
# Fewer distinct tokens than this among 50 means that the model repeats itself.
SMOKE_RATIO = 0.2
# What only a compile, and the conversion before it, take.
OF_COMPILE = (
    "force",
    "copy_weights",
    "attention",
    "backend",
    "engine",
    "instance",
    "tp_degree",
    "moe_tp_degree",
    "moe_ep_degree",
    "blockwise_matmul",
    "expert_kernel",
    "expert_scales",
    "allow_untested_versions",
    "batch_size",
    "seq_len",
    "buckets",
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=nm.DEMO, help="default: the embedded demo"
    )
    parser.add_argument("--traced-model-dir", type=Path, default=Path("traced_model/demo"))
    parser.add_argument(
        "--converted-dir",
        type=Path,
        help="default: beside the traced model, with -converted appended",
    )
    parser.add_argument("--attention", choices=("fp8", "bf16"), help="default: fp8")
    parser.add_argument("--backend", choices=("cpu", "neuron"), help="default: cpu")
    parser.add_argument(
        "--engine", choices=("compiled", "exported", "eager"), help="cpu; default: compiled"
    )
    parser.add_argument(
        "--instance", help="neuron: trn2.48xlarge, trn1.32xlarge, inf2.48xlarge, ..."
    )
    for name in ("tp", "moe-tp", "moe-ep"):
        parser.add_argument(f"--{name}-degree", type=int, help="neuron")
    parser.add_argument(
        "--blockwise-matmul", help="neuron: torch, shard_on_intermediate or shard_on_block"
    )
    parser.add_argument("--expert-kernel", choices=("torch", "nki"), help="neuron")
    parser.add_argument(
        "--expert-scales", choices=("block", "expanded", "auto"), help="neuron; default: auto"
    )
    parser.add_argument(
        "--allow-untested-versions", action="store_true", help="neuron: packages of another SDK"
    )
    parser.add_argument("--batch-size", type=int, help="sequences alive at the same time")
    parser.add_argument(
        "--seq-len", type=int, help="positions per sequence, prompt and answer together"
    )
    parser.add_argument("--buckets", help="context-encoding lengths, such as 128,512")
    parser.add_argument(
        "--force", action="store_true", help="compile although the planner advises against it"
    )
    parser.add_argument(
        "--skip-compile", action="store_true", help="use the compiled model that is there"
    )
    parser.add_argument(
        "--copy-weights", action="store_true", help="the compiled model then needs nothing else"
    )
    parser.add_argument(
        "--prompt", action="append", help="instead of the three built-in prompts; may be repeated"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--sample", action="store_true", help="sample with the checkpoint's settings, not greedily"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--chat", action="store_true", help="talk to the model; /help says what there is"
    )
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="whether to reason; where the chat template can say so",
    )
    parser.add_argument(
        "--tools", type=Path, help="chat: JSON file with a list of tools in OpenAI's form"
    )
    return parser.parse_args(argv)


def backend_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, under the backend's names."""
    options = {
        "slots": arguments.batch_size,
        "seq_len": arguments.seq_len,
        "buckets": parse_integers("--buckets", arguments.buckets) if arguments.buckets else None,
        "engine": arguments.engine,
        "instance": arguments.instance,
        "tp_degree": arguments.tp_degree,
        "moe_tp_degree": arguments.moe_tp_degree,
        "moe_ep_degree": arguments.moe_ep_degree,
        "blockwise_matmul": arguments.blockwise_matmul,
        "expert_kernel": arguments.expert_kernel,
        "expert_scales": arguments.expert_scales,
        "allow_untested_versions": arguments.allow_untested_versions or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def check_options(arguments: argparse.Namespace) -> None:
    """Raise GenerationError for options that would do nothing, and for what cannot be."""
    if arguments.max_new_tokens < 1:
        raise GenerationError(
            f"--max-new-tokens is {arguments.max_new_tokens}; expected at least 1", usage=True
        )
    if arguments.chat and arguments.prompt:
        raise GenerationError(
            "--prompt and --chat exclude each other; give one of them", usage=True
        )
    of_compile = [name for name in OF_COMPILE if getattr(arguments, name) not in (None, False)]
    if arguments.skip_compile and of_compile:
        raise GenerationError(
            f"--{of_compile[0].replace('_', '-')} is of compiling, which --skip-compile leaves "
            "out; leave one of them out",
            usage=True,
        )


def answer_prompts(chat: "nm.Chat", prompts: Sequence[str], max_new_tokens: int) -> None:
    for prompt in prompts:
        chat.reset()
        show(f"\nyou> {prompt}")
        start = time.perf_counter()
        with TurnPrinter() as printer:
            for event in chat.say(prompt, max_new_tokens):
                printer.add(event)
        seconds = time.perf_counter() - start
        count = len(chat.last.token_ids)
        show_note(f"({counted(count, 'token')}, {count / seconds:.1f} tokens/s)")
        say_if_cut(chat.last, max_new_tokens)


def smoke_test(llm: "nm.LLM", seed: int | None) -> None:
    """50 sampled tokens that do not collapse into repetition, whatever the model would like to stop
    at.
    """
    prompt = llm.tokenizer.encode(
        llm.tokenizer.render_chat([{"role": "user", "content": "Tell me about numbers."}])
    )
    params = nm.SamplingParams(temperature=1.0, top_p=0.95, top_k=40, seed=seed or 0)
    steps = nm.generate(llm.backend, prompt, params, max_new_tokens=SMOKE_TOKENS)
    ratio = nm.distinct_ratio([step.token for step in steps], SMOKE_TOKENS)
    show(
        f"   {ratio:.0%} of {SMOKE_TOKENS} tokens are distinct (at least {SMOKE_RATIO:.0%} "
        "expected)"
    )
    if ratio < SMOKE_RATIO:
        raise nm.NeuronMiniMaxError(
            "the generated text collapses into repetition: the model is computed wrongly; do not "
            "use it"
        )


def run(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    watcher = Stages(show)
    # What cannot be is refused before anything is made.
    check_options(arguments)
    sampling = nm.SamplingParams(temperature=0.0, seed=arguments.seed)
    tools = nm.read_tools(arguments.tools) if arguments.tools else None
    template = template_arguments(arguments.thinking)
    if not arguments.skip_compile:
        nm.prepare(
            arguments.checkpoint,
            nm.Places.beside(arguments.traced_model_dir, arguments.converted_dir),
            layout=nm.Layout(attention=nm.AttentionPrecision(arguments.attention or "fp8")),
            chat_template_kwargs=template or {},
            watcher=watcher,
            backend=arguments.backend or "cpu",
            mode=nm.CompileMode(force=arguments.force, copy_weights=arguments.copy_weights),
            options=backend_options(arguments),
        )
    with watcher.stage(f"load {arguments.traced_model_dir}"):
        llm = nm.LLM(arguments.traced_model_dir, progress=watcher.progress)
    chat = nm.Chat(llm, tools=tools, chat_template_kwargs=template)
    if arguments.sample:
        sampling = replace(chat.next_turn().sampling, seed=arguments.seed)
    chat.params = sampling
    if arguments.chat:
        return talk(chat, arguments.traced_model_dir.resolve().name, arguments.max_new_tokens)
    with watcher.stage("generate"):
        answer_prompts(chat, arguments.prompt or PROMPTS, arguments.max_new_tokens)
    with watcher.stage("smoke test"):
        smoke_test(llm, arguments.seed)
    show(f"all done in {time.perf_counter() - start:.1f} s")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
