"""The command about a device: check-device."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

import neuron_minimax as nm
from neuron_minimax.cli.app import ConvertedDir, app
from neuron_minimax.cli.models import BlockwiseMatmul, given_options


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
    batch_size: Annotated[int, typer.Option(min=1, help="sequences alive at the same time")] = 1,
    seq_len: Annotated[int | None, typer.Option(help="positions per sequence")] = None,
    buckets: Annotated[
        list[str] | None, typer.Option(metavar="A,B", help="context-encoding lengths")
    ] = None,
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
