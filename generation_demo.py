"""The whole way, from a checkpoint to words: inspect, convert, verify, compile, load, generate.

Without arguments it runs on the embedded demo checkpoint and the CPU. On a Neuron instance:

    python generation_demo.py --checkpoint MiniMax-M2 --traced-model-dir traced_model/m2 \\
        --backend neuron --instance trn2.48xlarge --tp-degree 64 --moe-tp-degree 1 \\
        --moe-ep-degree 64 --batch-size 32 --seq-len 1024
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import neuron_minimax as nm
from neuron_minimax.cli.app import progress_bar
from neuron_minimax.cli.models import parse_integers

PROMPTS = ("What is the capital of Canada?", "What is 45 + 36?", "Sort: 9 2 4 7")
SMOKE_TOKENS = 50
# Fewer distinct tokens than this among 50 means that the model repeats itself.
SMOKE_RATIO = 0.2
DIM, PLAIN = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")


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
    parser.add_argument("--attention", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument("--backend", choices=("cpu", "neuron"), default="cpu")
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
        "--prompt", action="append", help="instead of the three built-in prompts; may be repeated"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--sample", action="store_true", help="sample with the checkpoint's settings, not greedily"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--chat", action="store_true", help="talk to the model; /reset starts anew, /quit ends"
    )
    parser.add_argument(
        "--tools", type=Path, help="chat: JSON file with a list of tools in OpenAI's form"
    )
    return parser.parse_args(argv)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Print a title, and the seconds when it is done."""
    print(f"== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.2f} s", flush=True)


def prepare(arguments: argparse.Namespace) -> None:
    """Inspect, convert, verify and compile; each recognizes what an earlier run has left."""
    out = arguments.converted_dir or arguments.traced_model_dir.with_name(
        arguments.traced_model_dir.name + "-converted"
    )
    with stage(f"inspect {arguments.checkpoint}"):
        source = nm.Checkpoint.open(arguments.checkpoint)
        report = source.inspect()
        print("   " + report.summary().replace("\n", "\n   "))
        if not report.usable:
            raise nm.NeuronMiniMaxError(
                f"{report.render()}\n{arguments.checkpoint} cannot be used as it is"
            )
    layout = nm.Layout(attention=nm.AttentionPrecision(arguments.attention))
    with stage(f"convert into {out}"), progress_bar("  ", report.bytes) as advance:
        converted = nm.plan_conversion(source, layout).write(out, progress=advance)
    print("   " + converted.render().replace("\n", "\n   "))
    if converted.was_finished:
        print("== verify: done when it was converted")
    else:
        with stage("verify"), progress_bar("  ", 2 * converted.nbytes) as advance:
            verification = nm.verify(source, converted, advance)
        print("   " + verification.render().replace("\n", "\n   "))
        if not verification.equal:
            raise nm.NeuronMiniMaxError(
                f"{out} does not equal its source; convert again with --overwrite"
            )
    with stage(f"compile for {arguments.backend} into {arguments.traced_model_dir}"):
        compiled = nm.compile(
            converted,
            arguments.traced_model_dir,
            backend=arguments.backend,
            force=arguments.force,
            progress=lambda line: print(f"   {line}", flush=True),
            **backend_options(arguments),
        )
        print("   " + compiled.render().replace("\n", "\n   "))


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
        "allow_untested_versions": arguments.allow_untested_versions or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def show(events: Iterator[object]) -> None:
    """Stream one turn: reasoning dimmed and apart, then the answer."""
    section = ""
    for event in events:
        match event:
            case nm.Reasoning(text):
                kind = "think"
                shown = text
            case nm.Content(text):
                kind = "answer"
                shown = text
            case nm.CallBegin(_, name):
                kind = f"call {name}"
                shown = ""
            case nm.CallArguments(_, text):
                kind = section
                shown = text
            case nm.CallEnd():
                kind = ""
                shown = ""
            case _:
                continue
        if kind != section:
            text = shown.lstrip("\n")
            print(f"{PLAIN if section else ''}\n   {kind:>6} | " if kind else "", end="")
            section = kind
            shown = text
        style = DIM if section == "think" else PLAIN
        print(style + shown.replace("\n", "\n          | "), end=PLAIN, flush=True)
    print(PLAIN)


def answer_prompts(chat: "nm.Chat", prompts: Sequence[str], max_new_tokens: int) -> None:
    room = min(max_new_tokens, chat.backend.capabilities.seq_len // 2)
    for prompt in prompts:
        chat.reset()
        print(f"\n     user | {prompt}", end="")
        start = time.perf_counter()
        show(chat.say(prompt, room))
        seconds = time.perf_counter() - start
        print(f"   {len(chat.token_ids)} tokens, {len(chat.token_ids) / seconds:.1f} tokens/s")


def smoke_test(backend: Any, tokenizer: "nm.TextTokenizer", seed: int | None) -> None:
    """50 sampled tokens that do not collapse into repetition, whatever the model would like to stop
    at.
    """
    prompt = tokenizer.encode(
        tokenizer.render_chat([{"role": "user", "content": "Tell me about numbers."}])
    )
    params = nm.SamplingParams(temperature=1.0, top_p=0.95, top_k=40, seed=seed or 0)
    steps = nm.generate(backend, prompt, params, max_new_tokens=SMOKE_TOKENS)
    ratio = nm.distinct_ratio([step.token for step in steps], SMOKE_TOKENS)
    print(
        f"   {ratio:.0%} of {SMOKE_TOKENS} tokens are distinct (at least {SMOKE_RATIO:.0%} "
        "expected)"
    )
    if ratio < SMOKE_RATIO:
        raise nm.NeuronMiniMaxError(
            "the generated text collapses into repetition: the model is computed wrongly; do not "
            "use it"
        )


def talk(chat: "nm.Chat", max_new_tokens: int) -> None:
    """Read messages from standard input until it ends; tool results are typed in by hand."""
    while True:
        try:
            text = input("\nyou> ").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/reset":
            chat.reset()
            print("(a new conversation)")
        elif text:
            try:
                show(chat.say(text, max_new_tokens))
                while chat.last.tool_calls:
                    results = [
                        input(f"result of {call.name}({call.arguments})> ")
                        for call in chat.last.tool_calls
                    ]
                    show(chat.give_results(results, max_new_tokens))
            except nm.NeuronMiniMaxError as error:
                print(f"error: {error}")


def run(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    if not arguments.skip_compile:
        prepare(arguments)
    with stage(f"load {arguments.traced_model_dir}"):
        backend = nm.load(arguments.traced_model_dir)
        tokenizer = nm.TextTokenizer.from_dir(backend.model_directory)
    sampling = tokenizer.sampling if arguments.sample else nm.SamplingParams(temperature=0.0)
    params = nm.SamplingParams(**{**vars(sampling), "seed": arguments.seed})
    tools = json.loads(arguments.tools.read_text(encoding="utf-8")) if arguments.tools else None
    chat = nm.Chat(backend, tokenizer, params=params, tools=tools)
    if arguments.chat:
        talk(chat, arguments.max_new_tokens)
        return
    with stage("generate"):
        answer_prompts(chat, arguments.prompt or PROMPTS, arguments.max_new_tokens)
    with stage("smoke test"):
        smoke_test(backend, tokenizer, arguments.seed)
    print(f"all done in {time.perf_counter() - start:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parse_arguments(argv))
    except nm.NeuronMiniMaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
