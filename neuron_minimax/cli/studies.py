"""Commands that study models: experts, train, quality."""

import sys
from pathlib import Path
from typing import Annotated

import typer

import neuron_minimax as nm
from neuron_minimax.cli.app import app, token_bar


@app.command()
def experts(
    model: Annotated[
        Path | None, typer.Argument(metavar="TRACED", help="compiled or converted directory")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT_OR_FILE", help="may be repeated")
    ] = None,
    trace: Annotated[
        list[Path] | None, typer.Option(help="analyse this saved trace instead; may be repeated")
    ] = None,
    output: Annotated[Path, typer.Option(help="a folder per prompt goes here")] = Path("experts"),
    max_new_tokens: Annotated[int, typer.Option(min=0)] = 64,
    greedy: Annotated[bool, typer.Option("--greedy")] = False,
    seed: Annotated[int | None, typer.Option()] = None,
    output_format: Annotated[
        str, typer.Option(help="of the routing: json, jsonl or parquet")
    ] = "json",
    placement: Annotated[
        int | None, typer.Option(metavar="RANKS", help="write an expert placement")
    ] = None,
    held_out: Annotated[
        list[Path] | None, typer.Option(help="traces to judge the placement on")
    ] = None,
) -> None:
    """Analyse which experts a model chooses, or turn saved traces into a placement on ranks."""
    request = nm.ExpertsRequest(
        model=model,
        prompts=prompt or [],
        traces=trace or [],
        held_out=held_out or [],
        output=output,
        max_new_tokens=max_new_tokens,
        sampling={"seed": seed} | ({"temperature": 0.0} if greedy else {}),
        placement=placement,
        options=nm.ReportOptions(record_format=output_format),
    )
    with token_bar() as advance:
        print(nm.run_experts(request, advance))


@app.command()
def train(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="directory for the checkpoint and the training state"),
    ],
    data: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="texts or chats; default: the demo's")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="DIR", help="directory of config.json")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="tokenizer directory")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp8, bf16 or float32")] = "fp8",
    focus: Annotated[
        list[str] | None, typer.Option(metavar="KIND", help="demo: more of this kind; repeatable")
    ] = None,
    initial: Annotated[
        Path | None, typer.Option(metavar="CKPT", help="float32 or bf16 weights to start from")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    until: Annotated[
        int | None, typer.Option(min=1, metavar="STEP", help="stop the schedule here")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows per step, over all processes")] = 16,
    micro_batch_tokens: Annotated[
        int, typer.Option(min=1, help="tokens through the model at once")
    ] = 1024,
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
    """Train a model of this architecture; resumes by itself.

    In parallel: torchrun -m neuron_minimax train.
    """
    request = nm.TrainingRequest(
        output=out,
        data=data,
        config=config or nm.DEMO,
        tokenizer=tokenizer or nm.DEMO,
        precision=nm.parse_precision(precision),
        focus=tuple(focus or ()),
        initial=initial,
        options=nm.TrainingOptions(
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
    result = nm.train(request, progress=lambda line: print(line, file=sys.stderr, flush=True))
    if result is not None:
        print(result.render())


@app.command()
def quality(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CKPT", help="default: the embedded demo")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="held-out questions")] = 500,
    lengths: Annotated[
        bool, typer.Option("--lengths", help="also perplexity by length, with RoPE scaling")
    ] = False,
) -> None:
    """Ask held-out questions: exact answers by kind, and what each storage choice changes."""
    print(nm.measure_quality(checkpoint or nm.DEMO, questions).render())
    if lengths:
        print("\n" + nm.measure_lengths(checkpoint or nm.DEMO).render())
