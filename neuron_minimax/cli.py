"""The `neuron-minimax` command: parse, call one function of the library, print. Exit 0 good, 1 bad input, 2 usage."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from neuron_minimax.errors import GenerationError, NeuronMiniMaxError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="MiniMax-M2 from its Hugging Face FP8 checkpoint to served tokens on AWS Neuron, proven on a CPU first.",
)

CheckpointDir = Annotated[Path, typer.Argument(metavar="CKPT", help="Hugging Face checkpoint directory")]
ConvertedDir = Annotated[Path, typer.Argument(metavar="OUT", help="converted directory")]
TracedDir = Annotated[Path, typer.Argument(metavar="TRACED", help="compiled directory")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        app(args=None if argv is None else list(argv), prog_name="neuron-minimax")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except NeuronMiniMaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone; nothing is wrong
        return 0
    except OSError as error:
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar in bytes with rate and time left on standard error; gives the function to advance it by."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda nbytes: progress.advance(task, nbytes)


def _split(names: str | None) -> list[str] | None:
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


@app.command()
def inspect(
    checkpoint: CheckpointDir,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    output: Annotated[Path | None, typer.Option(help="write the report to this file as well")] = None,
    html: Annotated[Path | None, typer.Option(help="write the report as one self-contained page")] = None,
    check_values: Annotated[bool, typer.Option("--check-values", help="also read every weight and scale")] = False,
    against: Annotated[Path | None, typer.Option(metavar="CKPT2", help="compare with this checkpoint")] = None,
    modules_to_not_convert: Annotated[str | None, typer.Option(metavar="A,B", help="judge this list")] = None,
) -> None:
    """Report the precision of every kind of weight, from headers alone; exit 1 when the checkpoint cannot be used."""
    from neuron_minimax.explain.inspection import run_inspection, write_text

    found = run_inspection(checkpoint, _split(modules_to_not_convert), check_values, against, progress_bar)
    text = json.dumps(found.to_json(), indent=2) if as_json else found.render()
    if output is not None:
        write_text(output, text.rstrip() + "\n")
    if html is not None:
        write_text(html, found.render_page())
    print(text.rstrip())
    raise typer.Exit(0 if found.usable else 1)


@app.command()
def convert(
    checkpoint: CheckpointDir,
    out: ConvertedDir,
    attention: Annotated[str, typer.Option(help="fp8 (exact) or bf16")] = "fp8",
    fp8_range: Annotated[str, typer.Option(help="neuron (codes to 240) or ocp (to 448, trn3)")] = "neuron",
    scale_convention: Annotated[str, typer.Option(help="auto, multiplier or reciprocal")] = "auto",
    keep_in_bf16: Annotated[list[str] | None, typer.Option(metavar="MODULE", help="may be repeated")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and the space it needs")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace another output in OUT")] = False,
) -> None:
    """Convert to Neuron's names, layout and FP8 range; streams, and resumes by itself."""
    from neuron_minimax.checkpoint.reader import Checkpoint
    from neuron_minimax.convert.plan import Layout
    from neuron_minimax.convert.run import convert as run_conversion
    from neuron_minimax.convert.run import plan_conversion

    layout = Layout(
        attention=attention,  # type: ignore[arg-type]
        fp8_range=fp8_range,  # type: ignore[arg-type]
        scale_convention=scale_convention,  # type: ignore[arg-type]
        keep_in_bf16=tuple(keep_in_bf16 or ()),
    )
    plan, _ = plan_conversion(Checkpoint(checkpoint), layout)
    if dry_run:
        print(plan.render())
        print(f"space needed: {plan.nbytes / 1e9:.3f} GB")
        return
    with progress_bar("converting", plan.nbytes) as advance:
        result = run_conversion(checkpoint, out, layout, overwrite=overwrite, progress=advance)
        if result.was_finished:
            advance(plan.nbytes)
    print(result.render(out))


@app.command()
def verify(
    checkpoint: CheckpointDir,
    out: ConvertedDir,
    logits: Annotated[bool, typer.Option("--logits", help="also run both through the eager model")] = False,
) -> None:
    """Prove that a converted directory equals its checkpoint; exit 1 when it does not."""
    from neuron_minimax.checkpoint.reader import TensorDirectory
    from neuron_minimax.convert.verify import verify as verify_conversion

    total = sum(entry.nbytes for entry in TensorDirectory(out).entries.values())
    with progress_bar("verifying", 2 * total) as advance:
        verification = verify_conversion(checkpoint, out, advance)
    print(verification.render())
    good = verification.equal
    if logits and good:
        from neuron_minimax.model.comparison import compare_logits

        comparison = compare_logits(checkpoint, out)
        print(comparison.render())
        good = comparison.agrees
    raise typer.Exit(0 if good else 1)


@app.command()
def plan(
    checkpoint: CheckpointDir,
    instance: Annotated[str, typer.Option(help="such as trn2.48xlarge, trn1.32xlarge, inf2.48xlarge")],
    tp_degree: Annotated[int, typer.Option(min=1, help="ranks")],
    moe_tp_degree: Annotated[int, typer.Option(min=1, help="ranks that share an expert's channels")] = 1,
    moe_ep_degree: Annotated[int | None, typer.Option(min=1, help="groups that share out the experts")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="sequences alive at the same time")] = 1,
    seq_len: Annotated[int, typer.Option(min=1, help="positions per sequence")] = 1024,
    buckets: Annotated[list[str] | None, typer.Option(metavar="A,B", help="context-encoding lengths")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say whether a deployment fits an instance, and why, before anything is compiled; exit 1 when it is refused."""
    from neuron_minimax.planner.report import plan as plan_deployment

    report = plan_deployment(
        checkpoint,
        instance=instance,
        tp_degree=tp_degree,
        moe_tp_degree=moe_tp_degree,
        moe_ep_degree=moe_ep_degree,
        batch_size=batch_size,
        seq_len=seq_len,
        context_lengths=parse_integers("--buckets", ",".join(buckets)) if buckets else (),
    )
    print(json.dumps(report.to_json(), indent=2) if as_json else report.render())
    raise typer.Exit(1 if report.refused else 0)


@app.command("compile")
def compile_(
    out: ConvertedDir,
    traced: TracedDir,
    backend: Annotated[str, typer.Option(help="cpu or neuron")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="sequences alive at the same time")] = 1,
    seq_len: Annotated[int | None, typer.Option(help="positions per sequence")] = None,
    buckets: Annotated[list[str] | None, typer.Option(metavar="A,B", help="context-encoding lengths")] = None,
    compute: Annotated[str | None, typer.Option(help="cpu: float32 or bf16")] = None,
    engine: Annotated[str | None, typer.Option(help="cpu: compiled or eager")] = None,
    instance: Annotated[str | None, typer.Option(help="neuron: such as trn2.48xlarge")] = None,
    tp_degree: Annotated[int | None, typer.Option(help="neuron: ranks")] = None,
    moe_tp_degree: Annotated[int | None, typer.Option(help="neuron: ranks that share an expert's channels")] = None,
    moe_ep_degree: Annotated[int | None, typer.Option(help="neuron: groups that share out the experts")] = None,
    force: Annotated[bool, typer.Option("--force", help="compile even if up to date, or advised against")] = False,
) -> None:
    """Compile a converted directory once; up to date: says so and stops."""
    from neuron_minimax.backends import compile_model

    options: dict[str, Any] = {
        "slots": batch_size,
        "seq_len": seq_len,
        "buckets": parse_integers("--buckets", ",".join(buckets)) if buckets else None,
        "compute": compute,
        "engine": engine,
        "instance": instance,
        "tp_degree": tp_degree,
        "moe_tp_degree": moe_tp_degree,
        "moe_ep_degree": moe_ep_degree,
    }
    report = compile_model(
        out,
        traced,
        backend=backend,
        options={name: value for name, value in options.items() if value is not None},
        force=force,
        progress=lambda line: print(line, file=sys.stderr),
    )
    print(report.render())


def parse_integers(option: str, text: str) -> list[int]:
    """A comma-separated list of integers given to an option. Raises GenerationError naming the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise GenerationError(f"{option} is {text!r}; expected integers separated by commas, such as 1,2,3") from None


@app.command()
def generate(
    traced: TracedDir,
    prompt: Annotated[str | None, typer.Option(help="a user's message, put through the chat template")] = None,
    token_ids: Annotated[str | None, typer.Option(metavar="1,2,3", help="prompt tokens, taken as they are")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    greedy: Annotated[bool, typer.Option("--greedy")] = False,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print {token_ids, text}")] = False,
    dump_logits: Annotated[Path | None, typer.Option(metavar="FILE.safetensors")] = None,
) -> None:
    """Generate from a compiled directory; sampling defaults are the checkpoint's own."""
    if (prompt is None) == (token_ids is None):
        raise typer.BadParameter("give either --prompt or --token-ids")
    from neuron_minimax.generation.command import GenerateRequest, run_generate

    request = GenerateRequest(
        prompt=prompt,
        token_ids=None if token_ids is None else parse_integers("--token-ids", token_ids),
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed},
        dump_logits=dump_logits,
    )
    answer = run_generate(traced, request, on_text=None if as_json else lambda text: print(text, end="", flush=True))
    print(json.dumps({"token_ids": answer.token_ids, "text": answer.text}) if as_json else "")


@app.command()
def serve(
    traced: Annotated[
        Path | None, typer.Argument(metavar="[TRACED]", help="compiled directory; default: the embedded demo model")
    ] = None,
    host: Annotated[str, typer.Option(help="address to bind")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="one API key per line")] = None,
    allow_anonymous: Annotated[bool, typer.Option("--allow-anonymous", help="no key although not on loopback")] = False,
    allowed_host: Annotated[list[str] | None, typer.Option(help="Host header to accept; may be repeated")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="default: the directory's name")] = None,
    reasoning_format: Annotated[str, typer.Option(help="separate: reasoning_content; none: in the text")] = "separate",
    max_waiting: Annotated[int, typer.Option(min=0, help="requests in the queue; more get 429")] = 256,
    request_timeout: Annotated[float, typer.Option(min=0, help="seconds per request")] = 600.0,
    drain_timeout: Annotated[float, typer.Option(min=0, help="seconds for running requests on SIGTERM")] = 120.0,
    max_body_mib: Annotated[int, typer.Option(min=1, help="largest request")] = 8,
    enable_log_requests: Annotated[
        bool, typer.Option("--enable-log-requests", help="put the text of requests into the log")
    ] = False,
) -> None:
    """Serve OpenAI's API and a chat page until SIGTERM, which lets running requests finish."""
    if reasoning_format not in ("separate", "none"):
        raise typer.BadParameter(f"--reasoning-format is {reasoning_format!r}; expected separate or none")
    from neuron_minimax.serving.demo import demo_model
    from neuron_minimax.serving.server import serve as run_server

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    run_server(
        traced or demo_model(progress=say),
        host=host,
        port=port,
        api_key_file=api_key_file,
        allow_anonymous=allow_anonymous,
        allowed_hosts=tuple(allowed_host or ()),
        model_name=served_model_name,
        on_listening=lambda url: say(f"listening on {url}"),
        split_reasoning=reasoning_format == "separate",
        max_waiting=max_waiting,
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
        max_body=max_body_mib << 20,
        log_requests=enable_log_requests,
    )


@app.command()
def train(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="directory for the checkpoint and the training state")],
    data: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="texts or chats; default: the demo's")] = None,
    config: Annotated[Path | None, typer.Option(metavar="DIR", help="directory of config.json")] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="tokenizer directory")] = None,
    precision: Annotated[str, typer.Option(help="fp8, bf16 or float32")] = "fp8",
    focus: Annotated[list[str] | None, typer.Option(metavar="KIND", help="demo: more of this kind; repeatable")] = None,
    initial: Annotated[Path | None, typer.Option(metavar="CKPT", help="float32 or bf16 weights to start from")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    until: Annotated[int | None, typer.Option(min=1, metavar="STEP", help="stop the schedule here")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows per step, over all processes")] = 16,
    micro_batch_tokens: Annotated[int, typer.Option(min=1, help="tokens through the model at once")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=2, help="longer rows are cut")] = 512,
    learning_rate: Annotated[float, typer.Option()] = 1.5e-3,
    warmup_steps: Annotated[int, typer.Option(min=0)] = 100,
    router_bias_start: Annotated[float, typer.Option(help="every expert's first bias")] = 0.0,
    autocast: Annotated[bool, typer.Option("--autocast", help="matrix products in BF16")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    save_every: Annotated[int, typer.Option(min=1, help="steps between saved states")] = 200,
) -> None:
    """Train a model of this architecture; resumes by itself. In parallel: torchrun -m neuron_minimax.cli train."""
    from neuron_minimax.training import command

    request = command.TrainingRequest(
        output=out,
        data=data,
        config=config or command.DEMO,
        tokenizer=tokenizer or command.DEMO,
        precision=command.parse_precision(precision),
        focus=tuple(focus or ()),
        initial=initial,
        options=command.TrainingOptions(
            steps=steps,
            batch_size=batch_size,
            micro_batch_tokens=micro_batch_tokens,
            max_tokens=max_tokens,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            router_bias_start=router_bias_start,
            autocast=autocast,
            seed=seed,
        ),
        device=device,
        threads=threads,
        save_every=save_every,
        until=until,
        command=("neuron-minimax", *sys.argv[1:]),
    )
    result = command.train(request, progress=lambda line: print(line, file=sys.stderr, flush=True))
    if result is not None:
        print(result.render())


@app.command()
def cache(
    checkpoint: CheckpointDir,
    cache_dir: Annotated[Path, typer.Argument(metavar="CACHE_DIR", help="directory of the cache")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    check: Annotated[
        bool, typer.Option("--check", help="re-read a finished cache and rebuild what is damaged")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace another cache in CACHE_DIR")] = False,
) -> None:
    """Dequantize once into a Hugging Face checkpoint that loads without arithmetic; streams, and resumes by itself."""
    from neuron_minimax.checkpoint.fp32_cache import build_cache, cache_bytes

    with progress_bar("dequantizing", cache_bytes(checkpoint, dtype)) as advance:
        result = build_cache(checkpoint, cache_dir, dtype, check=check, overwrite=overwrite, progress=advance)
        if result.was_finished:
            advance(result.nbytes)
    print(result.render(cache_dir))


@app.command()
def quality(
    checkpoint: Annotated[Path | None, typer.Argument(metavar="CKPT", help="default: the embedded demo")] = None,
    questions: Annotated[int, typer.Option(min=1, help="held-out questions")] = 500,
    lengths: Annotated[bool, typer.Option("--lengths", help="also perplexity by length, with RoPE scaling")] = False,
) -> None:
    """Ask the demo's held-out questions: exact answers by kind, and what each storage and compute choice changes."""
    from neuron_minimax.training.lengths import measure_lengths
    from neuron_minimax.training.quality import measure_quality
    from neuron_minimax.training.tokenizer import DEMO

    print(measure_quality(checkpoint or DEMO, questions).render())
    if lengths:
        print("\n" + measure_lengths(checkpoint or DEMO).render())


@app.command()
def experts(
    model: Annotated[Path | None, typer.Argument(metavar="TRACED", help="compiled or converted directory")] = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT_OR_FILE", help="may be repeated")] = None,
    trace: Annotated[list[Path] | None, typer.Option(help="analyse this saved trace instead; may be repeated")] = None,
    output: Annotated[Path, typer.Option(help="a folder per prompt goes here")] = Path("experts"),
    max_new_tokens: Annotated[int, typer.Option(min=0)] = 64,
    greedy: Annotated[bool, typer.Option("--greedy")] = False,
    seed: Annotated[int | None, typer.Option()] = None,
    output_format: Annotated[str, typer.Option(help="of the routing: json, jsonl or parquet")] = "json",
    placement: Annotated[int | None, typer.Option(metavar="RANKS", help="write an expert placement")] = None,
    held_out: Annotated[list[Path] | None, typer.Option(help="traces to judge the placement on")] = None,
) -> None:
    """Record and analyse which experts a model chooses; or turn saved traces into an expert-to-rank placement."""
    from neuron_minimax.experts.batch import Outputs
    from neuron_minimax.experts.command import ExpertsRequest, run_experts

    request = ExpertsRequest(
        model=model,
        prompts=prompt or [],
        traces=trace or [],
        held_out=held_out or [],
        output=output,
        max_new_tokens=max_new_tokens,
        sampling={"seed": seed} | ({"temperature": 0.0} if greedy else {}),
        placement=placement,
        outputs=Outputs(record_format=output_format),
    )
    with token_bar() as advance:
        print(run_experts(request, advance))


@contextmanager
def token_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar in tokens with rate and time left on standard error; gives progress(prompt's name, tokens, all tokens)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.1f} tokens/s")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("experts", total=None, rate=0.0)

        def advance(name: str, tokens: int, total: int) -> None:
            progress.update(task, description=name, advance=tokens, total=total)
            progress.update(task, rate=progress.tasks[task].speed or 0.0)

        yield advance


if __name__ == "__main__":
    sys.exit(main())
