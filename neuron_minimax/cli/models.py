"""Commands about compiled models: plan, compile, serve, check-device."""

import json
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import neuron_minimax as nm
from neuron_minimax.cli.app import CheckpointDir, ConvertedDir, TracedDir, app
from neuron_minimax.cli.ending import say, show
from neuron_minimax.cli.progress import Shown
from neuron_minimax.errors import GenerationError


def parse_integers(option: str, text: str) -> list[int]:
    """A comma-separated list of integers given to an option. Raises GenerationError naming the
    option.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise GenerationError(
            f"{option} is {text!r}; expected integers separated by commas, such as 1,2,3",
            usage=True,
        ) from None


def parse_buckets(given: list[str] | None) -> list[int] | None:
    """The lengths of --buckets, which may be given several times; None where it is not."""
    return parse_integers("--buckets", ",".join(given)) if given else None


def given_options(
    backend: "BackendName", buckets: list[str] | None, **options: Any
) -> dict[str, Any]:
    """A backend's options as it takes them: those that were given, with context-encoding lengths as
    numbers. Raises BadParameter for one of another backend.
    """
    named = {**options, "buckets": parse_buckets(buckets)}
    given = {name: value for name, value in named.items() if value is not None}
    for name in given:
        owners = [other for other, own in OWN_OPTIONS.items() if name in own]
        if owners and backend not in owners:
            raise typer.BadParameter(
                f"--{name.replace('_', '-')} is an option of --backend {' or '.join(owners)}, not "
                f"{backend}"
            )
    return given


# Options that several commands take.
BatchSize = Annotated[int, typer.Option(min=1, help="sequences alive at the same time")]
Buckets = Annotated[
    list[str] | None,
    typer.Option(metavar="A,B", help="context-encoding lengths; cpu: the largest counts"),
]
BlockwiseMatmul = Annotated[
    Literal["torch", "shard_on_intermediate", "shard_on_block"] | None,
    typer.Option(help="neuron: experts in context encoding; default: torch"),
]
ExpertKernel = Annotated[
    Literal["torch", "nki"] | None,
    typer.Option(help="neuron: experts in token generation; nki: trn2, not yet run on one"),
]
ExpertScales = Annotated[
    Literal["block", "expanded", "auto"] | None,
    typer.Option(help="neuron: scales of FP8 experts on a rank; auto: expanded where needed"),
]
BackendName = Literal["cpu", "neuron", "torch-neuron"]
CPUEngine = Annotated[
    Literal["compiled", "exported", "eager"] | None,
    typer.Option(
        help="cpu; default: compiled, or exported without a C++ compiler; torch-neuron on a CPU: "
        "compiled or eager"
    ),
]
KVCacheDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "fp8"] | None,
    typer.Option(help="cpu: of keys and values; default: auto, that of activations"),
]
# Whose options of `compile` and `check-device` are whose; the others are of all.
OWN_OPTIONS: Mapping[BackendName, Container[str]] = {
    "cpu": ("compute", "kv_cache_dtype", "engine"),
    "neuron": (
        "instance",
        "tp_degree",
        "moe_tp_degree",
        "moe_ep_degree",
        "blockwise_matmul",
        "expert_kernel",
        "expert_scales",
        "expert_placement",
        "allow_untested_versions",
    ),
    "torch-neuron": (
        "device",
        "tp_degree",
        "moe_tp_degree",
        "moe_ep_degree",
        "compute",
        "engine",
    ),
}


@app.command()
def plan(
    checkpoint: CheckpointDir,
    instance: Annotated[
        str | None, typer.Option(help="such as trn2.48xlarge; default: all are searched")
    ] = None,
    tp_degree: Annotated[
        int | None, typer.Option(min=1, help="ranks; default: all degrees are searched")
    ] = None,
    moe_tp_degree: Annotated[
        int | None, typer.Option(min=1, help="ranks that share an expert's channels")
    ] = None,
    moe_ep_degree: Annotated[
        int | None, typer.Option(min=1, help="groups that share out the experts")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="sequences at once; default: 1, or what the goal wants of a search"
        ),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="positions per sequence; default 1024")
    ] = None,
    buckets: Buckets = None,
    blockwise_matmul: BlockwiseMatmul = "torch",
    expert_kernel: ExpertKernel = "torch",
    expert_scales: ExpertScales = "auto",
    goal: Annotated[
        Literal["latency", "throughput"], typer.Option(help="what a search is for")
    ] = "latency",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say whether a deployment fits, why not, and what does, before anything is compiled; without
    instance or degrees, search for the best. Exit 1 when it is refused.
    """
    report = nm.plan_deployment(
        checkpoint,
        Shown(),
        instance=instance,
        tp_degree=tp_degree,
        moe_tp_degree=moe_tp_degree,
        moe_ep_degree=moe_ep_degree,
        batch_size=batch_size,
        seq_len=seq_len,
        context_lengths=parse_buckets(buckets) or (),
        blockwise_matmul=blockwise_matmul,
        expert_kernel=expert_kernel,
        expert_scales=expert_scales,
        goal=goal,
    )
    show(json.dumps(report.to_json(), indent=2) if as_json else report.render())
    raise typer.Exit(1 if report.refused else 0)


@app.command("compile")
def compile_(
    out: ConvertedDir,
    traced: TracedDir,
    backend: Annotated[BackendName, typer.Option(help="what it is compiled for")] = "cpu",
    batch_size: BatchSize = 1,
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="positions per sequence; default: cpu 2048, others 1024"),
    ] = None,
    buckets: Buckets = None,
    compute: Annotated[
        Literal["float32", "bf16"] | None,
        typer.Option(help="cpu, torch-neuron: dtype of activations; default on a CPU: float32"),
    ] = None,
    kv_cache_dtype: KVCacheDtype = None,
    engine: CPUEngine = None,
    device: Annotated[
        Literal["neuron", "cpu"] | None,
        typer.Option(help="torch-neuron; default: neuron; cpu: the same ranks without the chip"),
    ] = None,
    instance: Annotated[str | None, typer.Option(help="neuron: such as trn2.48xlarge")] = None,
    tp_degree: Annotated[
        int | None, typer.Option(min=1, help="neuron, torch-neuron: ranks")
    ] = None,
    moe_tp_degree: Annotated[
        int | None,
        typer.Option(min=1, help="neuron, torch-neuron: ranks that share an expert's channels"),
    ] = None,
    moe_ep_degree: Annotated[
        int | None,
        typer.Option(min=1, help="neuron, torch-neuron: groups that share out the experts"),
    ] = None,
    blockwise_matmul: BlockwiseMatmul = None,
    expert_kernel: ExpertKernel = None,
    expert_scales: ExpertScales = None,
    expert_placement: Annotated[
        Path | None, typer.Option(metavar="FILE", help="neuron: file of `experts --placement`")
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
    check: Annotated[
        bool, typer.Option("--check", help="read all that is there, and make again what is damaged")
    ] = False,
    copy_weights: Annotated[
        bool,
        typer.Option("--copy-weights", help="copies, not links: TRACED then needs nothing else"),
    ] = False,
) -> None:
    """Compile a converted directory once; up to date: says so and stops."""
    options = given_options(
        backend,
        buckets,
        slots=batch_size,
        seq_len=seq_len,
        compute=compute,
        kv_cache_dtype=kv_cache_dtype,
        engine=engine,
        device=device,
        instance=instance,
        tp_degree=tp_degree,
        moe_tp_degree=moe_tp_degree,
        moe_ep_degree=moe_ep_degree,
        blockwise_matmul=blockwise_matmul,
        expert_kernel=expert_kernel,
        expert_scales=expert_scales,
        expert_placement=os.path.realpath(expert_placement) if expert_placement else None,
        allow_untested_versions=allow_untested_versions or None,
    )
    report = nm.compile(
        out,
        traced,
        backend=backend,
        force=force,
        check=check,
        copy_weights=copy_weights,
        progress=Shown(),
        **options,
    )
    show(report.render())


@app.command()
def serve(
    traced: Annotated[
        Path | None,
        typer.Argument(
            metavar="[TRACED]", help="compiled directory; default: the embedded demo model"
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="compare every byte with its digest first")
    ] = False,
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
        Literal["separate", "none"],
        typer.Option(help="separate: reasoning_content; none: in the text"),
    ] = "separate",
    strict: Annotated[
        bool, typer.Option("--strict", help="refuse fields that nobody knows, not pass them over")
    ] = False,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="requests in the queue beside those that run; more get 429")
    ] = 256,
    request_timeout: Annotated[float, typer.Option(min=0, help="seconds per request")] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="seconds for running requests on SIGTERM")
    ] = 120.0,
    exit_timeout: Annotated[
        float,
        typer.Option(
            min=0, help="seconds from there to the end; half of them for clients to read errors"
        ),
    ] = 10.0,
    max_body_mib: Annotated[int, typer.Option(min=1, help="largest request")] = 8,
    max_connections: Annotated[
        int, typer.Option(min=1, help="fewer where the limit of open files asks for it")
    ] = 1024,
    client_timeout: Annotated[
        float, typer.Option(min=1, help="seconds to send a request, and to go on reading an answer")
    ] = 60.0,
    keep_alive: Annotated[
        float, typer.Option(min=0, help="seconds an idle connection stays open")
    ] = 75.0,
    enable_log_requests: Annotated[
        bool, typer.Option("--enable-log-requests", help="put the text of requests into the log")
    ] = False,
) -> None:
    """Serve OpenAI's API and a chat page until SIGTERM, which lets running requests finish."""
    options = nm.ServerOptions(
        model_name=served_model_name or "",
        host=host,
        port=port,
        api_key_file=api_key_file,
        allow_anonymous=allow_anonymous,
        allowed_hosts=tuple(allowed_host or ()),
        verify=verify,
        split_reasoning=reasoning_format == "separate",
        strict=strict,
        max_waiting=max_waiting,
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
        exit_timeout=exit_timeout,
        max_body=max_body_mib << 20,
        max_connections=max_connections,
        client_timeout=client_timeout,
        keep_alive=keep_alive,
        log_requests=enable_log_requests,
    )
    if options.refusal:
        raise typer.BadParameter(options.refusal)
    nm.serve(traced, options, lambda url: say(f"listening on {url}"), Shown())


@app.command()
def check_device(
    out: ConvertedDir,
    work_dir: Annotated[
        Path, typer.Argument(metavar="WORK_DIR", help="for probes, their compiles and answers")
    ],
    instance: Annotated[str | None, typer.Option(help="such as trn2.48xlarge")] = None,
    tp_degree: Annotated[int | None, typer.Option(min=1, help="ranks")] = None,
    moe_tp_degree: Annotated[
        int | None, typer.Option(min=1, help="ranks that share an expert's channels")
    ] = None,
    moe_ep_degree: Annotated[
        int | None, typer.Option(min=1, help="groups that share out the experts")
    ] = None,
    batch_size: BatchSize = 1,
    seq_len: Annotated[int | None, typer.Option(min=2, help="positions per sequence")] = None,
    buckets: Buckets = None,
    blockwise_matmul: BlockwiseMatmul = None,
    expert_kernel: ExpertKernel = None,
    expert_scales: ExpertScales = None,
    layer: Annotated[int, typer.Option(min=0, help="the layer whose weights are tried")] = 0,
    traced: Annotated[
        Path | None, typer.Option(metavar="DIR", help="compiled full model: first tokens too")
    ] = None,
    backend: Annotated[
        Literal["cpu", "neuron"], typer.Option(help="cpu rehearses without a device")
    ] = "neuron",
    engine: CPUEngine = None,
    allow_untested_versions: Annotated[
        bool, typer.Option("--allow-untested-versions", help="go on with packages of another SDK")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Try one layer on this machine's device against the CPU, part by part; exit 1 when a check
    fails.
    """
    options = given_options(
        backend,
        buckets,
        slots=batch_size,
        seq_len=seq_len,
        instance=instance,
        tp_degree=tp_degree,
        moe_tp_degree=moe_tp_degree,
        moe_ep_degree=moe_ep_degree,
        blockwise_matmul=blockwise_matmul,
        expert_kernel=expert_kernel,
        expert_scales=expert_scales,
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
        progress=Shown(),
    )
    show(json.dumps(report.to_json(), indent=2) if as_json else report.render())
    raise typer.Exit(0 if report.passed else 1)
