"""Commands that study models: experts, train, quality."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import neuron_minimax as nm
from neuron_minimax.cli.app import app
from neuron_minimax.cli.ending import resumable, show
from neuron_minimax.cli.progress import Shown

WRITES_WHOLE_FILES = "every file in {} is whole; the same command makes what is missing"


@app.command()
def experts(
    model: Annotated[
        Path | None, typer.Argument(metavar="TRACED", help="compiled or converted directory")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT_OR_FILE", help="may be repeated")
    ] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="analyse this saved trace instead; may be repeated"),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="a folder per prompt goes here")
    ] = Path("experts"),
    max_new_tokens: Annotated[int, typer.Option(min=0)] = 64,
    greedy: Annotated[bool, typer.Option("--greedy")] = False,
    seed: Annotated[int | None, typer.Option()] = None,
    output_format: Annotated[
        Literal["json", "jsonl", "parquet"], typer.Option(help="of the routing")
    ] = "json",
    placement: Annotated[
        int | None, typer.Option(metavar="RANKS", help="write an expert placement")
    ] = None,
    held_out: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="traces to judge the placement on")
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
    show(nm.run_experts(request, Shown()))


@app.command()
def train(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="directory for the checkpoint and the training state"),
    ],
    data: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="texts or chats; default: the demo's")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="tokens between the windows of a longer text; default: all new"),
    ] = None,
    pack: Annotated[bool, typer.Option("--pack", help="short rows share a sequence")] = False,
    held_out: Annotated[
        float, typer.Option(metavar="SHARE", help="of the rows, to evaluate on")
    ] = 0.0,
    skip_rows: Annotated[
        bool, typer.Option("--skip-rows", help="leave out rows with nothing to learn")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(metavar="DIR", help="directory of config.json")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="tokenizer directory")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="with --size: a model of this family, such as minimind")
    ] = None,
    size: Annotated[str | None, typer.Option(help="tiny, 26M, ...")] = None,
    precision: Annotated[
        Literal["fp8", "bf16", "float32"] | None,
        typer.Option(help="of the written weights; default: the family's own"),
    ] = None,
    focus: Annotated[
        list[str] | None, typer.Option(metavar="KIND", help="demo: more of this kind; repeatable")
    ] = None,
    initial: Annotated[
        Path | None, typer.Option(metavar="CKPT", help="weights to start from, FP8 too")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="default: 2000")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="times through the file, instead of steps")
    ] = None,
    until: Annotated[
        int | None, typer.Option(min=1, metavar="STEP", help="stop the schedule here")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="sequences per step, over all processes")
    ] = 16,
    micro_batch_tokens: Annotated[
        int, typer.Option(min=1, help="tokens through the model at once")
    ] = 1024,
    max_tokens: Annotated[int, typer.Option(min=2, help="longest sequence")] = 512,
    learning_rate: Annotated[float, typer.Option()] = 1.5e-3,
    warmup_steps: Annotated[int, typer.Option(min=0)] = 100,
    clip_norm: Annotated[float, typer.Option(help="largest norm of the gradient")] = 1.0,
    router_bias_start: Annotated[float, typer.Option(help="every expert's first bias")] = 0.0,
    aux_loss_alpha: Annotated[
        float | None, typer.Option(help="weight of the balance loss; default: config.json's")
    ] = None,
    seq_aux: Annotated[
        bool | None,
        typer.Option("--seq-aux/--batch-aux", help="balance each sequence, or all tokens at once"),
    ] = None,
    autocast: Annotated[bool, typer.Option("--autocast", help="matrix products in BF16")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="in FP16, with a scaled loss")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    save_every: Annotated[int, typer.Option(min=1, help="steps between saved states")] = 200,
    keep: Annotated[int, typer.Option(min=1, help="saved states that stay")] = 2,
    from_step: Annotated[
        int | None, typer.Option(min=1, help="go on from the kept state of this step")
    ] = None,
    on_bad_step: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="a loss that is no number or a spike: stop, or skip the step"),
    ] = "stop",
    spike_factor: Annotated[
        float, typer.Option(help="a spike is so many times the recent losses; 0: none is")
    ] = 3.0,
    evaluate_every: Annotated[
        int | None, typer.Option(min=1, help="steps between losses on held-out rows; default: 100")
    ] = None,
    sample: Annotated[
        list[str] | None, typer.Option(metavar="PROMPT", help="reply to this; repeatable")
    ] = None,
    sample_every: Annotated[
        int | None, typer.Option(min=1, help="steps between such replies; default: 100")
    ] = None,
) -> None:
    """Train a model of any family; resumes by itself.

    In parallel: torchrun -m neuron_minimax train.
    """
    if steps is not None and epochs is not None:
        raise typer.BadParameter("expected either --steps or --epochs, not both")
    with resumable(f"no step was taken, what {out} held is kept; the same command starts again"):
        request = nm.TrainingRequest(
            output=out,
            data=data,
            read=nm.DataOptions(
                stride=stride, pack=pack, held_out=held_out, epochs=epochs, skip_rows=skip_rows
            ),
            config=config,
            tokenizer=tokenizer,
            family=family,
            size=size,
            precision=None if precision is None else nm.parse_precision(precision),
            focus=tuple(focus or ()),
            initial=initial,
            options=nm.TrainingOptions(
                steps=steps or nm.TrainingOptions.steps,
                batch_size=batch_size,
                micro_batch_tokens=micro_batch_tokens,
                max_tokens=max_tokens,
                learning_rate=learning_rate,
                warmup_steps=warmup_steps,
                clip_norm=clip_norm,
                router_bias_start=router_bias_start,
                aux_loss_alpha=aux_loss_alpha,
                seq_aux=seq_aux,
                autocast=autocast,
                fp16=fp16,
                seed=seed,
            ),
            device=device,
            threads=threads,
            save_every=save_every,
            keep=keep,
            from_step=from_step,
            guard=nm.Guard(on_bad_step=nm.OnBadStep.of(on_bad_step), spike_factor=spike_factor),
            evaluate_every=evaluate_every,
            samples=tuple(sample or ()),
            sample_every=sample_every,
            until=until,
            command=("neuron-minimax", *sys.argv[1:]),
        )
    result = nm.train(request, Shown())
    if result is not None:
        show(result.render())


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
    progress = Shown()
    show(nm.measure_quality(checkpoint or nm.DEMO, questions, progress=progress).render())
    if lengths:
        show("\n" + nm.measure_lengths(checkpoint or nm.DEMO, progress=progress).render())


@app.command()
def tokenizer(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="directory for the tokenizer")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="rows (.jsonl) or lines of text; repeatable; default: our corpus"
        ),
    ] = None,
    family: Annotated[str, typer.Option(help="whose chat format: qwen3, ...")] = "minimind",
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="tokens; default: 6400, of our corpus 2048")
    ] = None,
) -> None:
    """Train a tokenizer from one's own texts, with the chat format of a family."""
    with resumable(WRITES_WHOLE_FILES.format(out)), Shown().stage("training the tokenizer"):
        made = nm.make_tokenizer(out, data or [], family, vocab_size)
    show(made.render())


@app.command()
def corpus(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="directory for the files")],
    rows: Annotated[int, typer.Option(min=1, help="texts and chats together")] = 20_000,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write the small corpus that train --family uses: texts.jsonl and chats.jsonl."""
    with resumable(WRITES_WHOLE_FILES.format(out)), Shown().stage("writing the corpus"):
        written = nm.write_corpus(out, rows, seed)
    show(written.render())
