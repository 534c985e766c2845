"""Commands about compiled models: plan, compile, generate, serve, check-device."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import neuron_minimax as nm
from neuron_minimax.cli.app import CheckpointDir, ConvertedDir, TracedDir, app
from neuron_minimax.errors import GenerationError


def parse_integers(option: str, text: str) -> list[int]:
    """A comma-separated list of integers given to an option. Raises GenerationError naming the
    option.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise GenerationError(
            f"{option} is {text!r}; expected integers separated by commas, such as 1,2,3"
        ) from None


def given_options(buckets: list[str] | None, **options: Any) -> dict[str, Any]:
    """A backend's options as it takes them: those that were given, with context-encoding lengths as
    numbers.
    """
    lengths = parse_integers("--buckets", ",".join(buckets)) if buckets else None
    return {
        name: value for name, value in {**options, "buckets": lengths}.items() if value is not None
    }


# Options that several commands take.
BatchSize = Annotated[int, typer.Option(min=1, help="sequences alive at the same time")]
Buckets = Annotated[list[str] | None, typer.Option(metavar="A,B", help="context-encoding lengths")]
BlockwiseMatmul = Annotated[
    str | None,
    typer.Option(
        help="neuron: experts in context encoding: torch, shard_on_intermediate or shard_on_block"
    ),
]


@app.command()
def plan(
    checkpoint: CheckpointDir,
    instance: Annotated[
        str, typer.Option(help="such as trn2.48xlarge, trn1.32xlarge, inf2.48xlarge")
    ],
    tp_degree: Annotated[int, typer.Option(min=1, help="ranks")],
    moe_tp_degree: Annotated[
        int, typer.Option(min=1, help="ranks that share an expert's channels")
    ] = 1,
    moe_ep_degree: Annotated[
        int | None, typer.Option(min=1, help="groups that share out the experts")
    ] = None,
    batch_size: BatchSize = 1,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="positions per sequence; default 1024")
    ] = None,
    buckets: Buckets = None,
    blockwise_matmul: BlockwiseMatmul = "torch",
    expert_kernel: Annotated[
        str, typer.Option(help="of token generation: torch, or nki")
    ] = "torch",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say whether a deployment fits an instance, and why, before anything is compiled; exit 1 when
    it is refused.
    """
    report = nm.plan_deployment(
        checkpoint,
        instance=instance,
        tp_degree=tp_degree,
        moe_tp_degree=moe_tp_degree,
        moe_ep_degree=moe_ep_degree,
        batch_size=batch_size,
        seq_len=seq_len,
        context_lengths=parse_integers("--buckets", ",".join(buckets)) if buckets else (),
        blockwise_matmul=blockwise_matmul,
        expert_kernel=expert_kernel,
    )
    print(json.dumps(report.to_json(), indent=2) if as_json else report.render())
    raise typer.Exit(1 if report.refused else 0)


@app.command("compile")
def compile_(
    out: ConvertedDir,
    traced: TracedDir,
    backend: Annotated[str, typer.Option(help="cpu or neuron")] = "cpu",
    batch_size: BatchSize = 1,
    seq_len: Annotated[int | None, typer.Option(help="positions per sequence")] = None,
    buckets: Buckets = None,
    compute: Annotated[str | None, typer.Option(help="cpu: float32 or bf16")] = None,
    engine: Annotated[str | None, typer.Option(help="cpu: compiled, exported or eager")] = None,
    instance: Annotated[str | None, typer.Option(help="neuron: such as trn2.48xlarge")] = None,
    tp_degree: Annotated[int | None, typer.Option(help="neuron: ranks")] = None,
    moe_tp_degree: Annotated[
        int | None, typer.Option(help="neuron: ranks that share an expert's channels")
    ] = None,
    moe_ep_degree: Annotated[
        int | None, typer.Option(help="neuron: groups that share out the experts")
    ] = None,
    blockwise_matmul: BlockwiseMatmul = None,
    expert_kernel: Annotated[
        str | None, typer.Option(help="neuron: torch, or nki (trn2; not yet run on one)")
    ] = None,
    expert_placement: Annotated[
        Path | None, typer.Option(help="neuron: file of `experts --placement`")
    ] = None,
    allow_untested_versions: Annotated[
        bool,
        typer.Option(
            "--allow-untested-versions", help="neuron: go on with packages of another SDK"
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="compile even if up to date, or advised against")
    ] = False,
) -> None:
    """Compile a converted directory once; up to date: says so and stops."""
    options = given_options(
        buckets,
        slots=batch_size,
        seq_len=seq_len,
        compute=compute,
        engine=engine,
        instance=instance,
        tp_degree=tp_degree,
        moe_tp_degree=moe_tp_degree,
        moe_ep_degree=moe_ep_degree,
        blockwise_matmul=blockwise_matmul,
        expert_kernel=expert_kernel,
        expert_placement=str(expert_placement.resolve()) if expert_placement else None,
        allow_untested_versions=allow_untested_versions or None,
    )
    report = nm.compile(
        out,
        traced,
        backend=backend,
        force=force,
        progress=lambda line: print(line, file=sys.stderr),
        **options,
    )
    print(report.render())


@app.command()
def generate(
    traced: TracedDir,
    prompt: Annotated[
        str | None, typer.Option(help="a user's message, put through the chat template")
    ] = None,
    token_ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="prompt tokens, taken as they are")
    ] = None,
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
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if greedy and given:
        raise GenerationError(
            f"--greedy excludes --{min(given).replace('_', '-')}; give one or the other"
        )
    prompt_ids = parse_integers("--token-ids", token_ids) if token_ids is not None else []
    llm = nm.LLM(traced)
    if prompt is not None:
        rendered = llm.tokenizer.render_chat([{"role": "user", "content": prompt}])
        prompt_ids = llm.tokenizer.encode(rendered)
    params = replace(nm.SamplingParams(temperature=0.0) if greedy else llm.sampling, **given)
    answer = llm.generate(
        prompt_ids,
        params if seed is None else replace(params, seed=seed),
        max_new_tokens=max_new_tokens,
        on_text=lambda text: None if as_json else print(text, end="", flush=True),
        dump_logits=dump_logits,
    )
    print(json.dumps({"token_ids": answer.token_ids, "text": answer.text}) if as_json else "")


@app.command()
def serve(
    traced: Annotated[
        Path | None,
        typer.Argument(
            metavar="[TRACED]", help="compiled directory; default: the embedded demo model"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="address to bind")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="one API key per line")
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="no key although not on loopback")
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Host header to accept; may be repeated")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="default: the directory's name")
    ] = None,
    reasoning_format: Annotated[
        str, typer.Option(help="separate: reasoning_content; none: in the text")
    ] = "separate",
    max_waiting: Annotated[
        int, typer.Option(min=0, help="requests in the queue; more get 429")
    ] = 256,
    request_timeout: Annotated[float, typer.Option(min=0, help="seconds per request")] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="seconds for running requests on SIGTERM")
    ] = 120.0,
    max_body_mib: Annotated[int, typer.Option(min=1, help="largest request")] = 8,
    enable_log_requests: Annotated[
        bool, typer.Option("--enable-log-requests", help="put the text of requests into the log")
    ] = False,
) -> None:
    """Serve OpenAI's API and a chat page until SIGTERM, which lets running requests finish."""
    if reasoning_format not in ("separate", "none"):
        raise typer.BadParameter(
            f"--reasoning-format is {reasoning_format!r}; expected separate or none"
        )

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    options = nm.ServerOptions(
        model_name=served_model_name or "",
        host=host,
        port=port,
        api_key_file=api_key_file,
        allow_anonymous=allow_anonymous,
        allowed_hosts=tuple(allowed_host or ()),
        split_reasoning=reasoning_format == "separate",
        max_waiting=max_waiting,
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
        max_body=max_body_mib << 20,
        log_requests=enable_log_requests,
    )
    directory = traced or nm.demo_model(progress=say)
    nm.serve(directory, options, lambda url: say(f"listening on {url}"))


@app.command()
def check_device(
    out: ConvertedDir,
    work_dir: Annotated[
        Path, typer.Argument(metavar="WORK_DIR", help="for probes, their compiles and answers")
    ],
    instance: Annotated[str | None, typer.Option(help="such as trn2.48xlarge")] = None,
    tp_degree: Annotated[int | None, typer.Option(help="ranks")] = None,
    moe_tp_degree: Annotated[
        int | None, typer.Option(help="ranks that share an expert's channels")
    ] = None,
    moe_ep_degree: Annotated[
        int | None, typer.Option(help="groups that share out the experts")
    ] = None,
    batch_size: BatchSize = 1,
    seq_len: Annotated[int | None, typer.Option(help="positions per sequence")] = None,
    buckets: Buckets = None,
    blockwise_matmul: BlockwiseMatmul = None,
    expert_kernel: Annotated[str | None, typer.Option(help="torch or nki")] = None,
    layer: Annotated[int, typer.Option(min=0, help="the layer whose weights are tried")] = 0,
    traced: Annotated[
        Path | None, typer.Option(metavar="DIR", help="compiled full model: first tokens too")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="neuron, or cpu to rehearse without a device")
    ] = "neuron",
    engine: Annotated[str | None, typer.Option(help="cpu: compiled, exported or eager")] = None,
    allow_untested_versions: Annotated[
        bool, typer.Option("--allow-untested-versions", help="go on with packages of another SDK")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Try one layer on this machine's device against the CPU, part by part; exit 1 when a check
    fails.
    """
    options = given_options(
        buckets,
        slots=batch_size,
        seq_len=seq_len,
        instance=instance,
        tp_degree=tp_degree,
        moe_tp_degree=moe_tp_degree,
        moe_ep_degree=moe_ep_degree,
        blockwise_matmul=blockwise_matmul,
        expert_kernel=expert_kernel,
        allow_untested_versions=allow_untested_versions or None,
        engine=engine,
        compute="bf16" if backend == "cpu" else None,
    )
    report = nm.check_device(
        out,
        work_dir,
        options,
        backend=backend,
        layer=layer,
        traced=traced,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(report.to_json(), indent=2) if as_json else report.render())
    raise typer.Exit(0 if report.passed else 1)
