"""Commands about checkpoints: inspect, convert, verify, cache."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer

import neuron_minimax as nm
from neuron_minimax.cli.app import CheckpointDir, ConvertedDir, app
from neuron_minimax.cli.ending import resumable, say, show
from neuron_minimax.cli.progress import Shown

Streamed = Annotated[
    bool,
    typer.Option(
        "--stream", help="CKPT is a hub id: keep no more of its files than are needed at once"
    ),
]
RESUMES = "finished shards are kept; run the same command again to go on"


def _split(names: str | None) -> list[str] | None:
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def _opened(
    checkpoint: Path, stream_into: Path | None, progress: Shown, scale_convention: str = "auto"
) -> "nm.Checkpoint":
    if stream_into is None:
        return nm.Checkpoint.open(checkpoint, scale_convention, progress=progress)
    return nm.Checkpoint.stream(str(checkpoint), stream_into, scale_convention, progress=progress)


@app.command()
def inspect(
    checkpoint: CheckpointDir,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the report to this file as well")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write the report as one self-contained page"),
    ] = None,
    check_values: Annotated[
        bool, typer.Option("--check-values", help="also read every weight and scale")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="CKPT2", help="compare with this checkpoint")
    ] = None,
    modules_to_not_convert: Annotated[
        str | None, typer.Option(metavar="A,B", help="judge this list")
    ] = None,
) -> None:
    """Report the precision of every kind of weight, from headers alone; exit 1 when the checkpoint
    cannot be used.
    """
    progress = Shown()
    found = nm.Checkpoint.open(checkpoint, progress=progress).inspect(
        values=check_values,
        against=against,
        modules_to_not_convert=_split(modules_to_not_convert),
        progress=progress,
    )
    text = json.dumps(found.to_json(), indent=2) if as_json else found.render()
    if output is not None:
        nm.write_text(output, text.rstrip() + "\n")
    if html is not None:
        nm.write_text(html, found.render_page())
    show(text.rstrip())
    for path in (output, html):
        if path is not None:
            say(f"report written to {path}")
    raise typer.Exit(0 if found.usable else 1)


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="a .pth or .bin of torch, or a directory of them or of float16"
        ),
    ],
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="checkpoint to write")],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the model's config.json")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="directory of its tokenizer")
    ] = None,
) -> None:
    """Make a checkpoint of PyTorch's own files; of MiniMind's without a config.json too."""
    made = nm.import_torch(source, checkpoint, config=config, tokenizer=tokenizer, progress=Shown())
    show(made.render())


@app.command()
def convert(
    checkpoint: CheckpointDir,
    out: ConvertedDir,
    attention: Annotated[Literal["fp8", "bf16"], typer.Option(help="fp8 is exact")] = "fp8",
    fp8_range: Annotated[
        Literal["neuron", "ocp"], typer.Option(help="codes to 240, or to 448 (trn3)")
    ] = "neuron",
    scale_convention: Annotated[
        Literal["auto", "multiplier", "reciprocal"],
        typer.Option(help="what weight_scale_inv means; auto: read off the values"),
    ] = "auto",
    keep_in_bf16: Annotated[
        list[str] | None, typer.Option(metavar="MODULE", help="may be repeated")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan and the space it needs")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="compare every byte of a finished output, and its source; rewrite what differs",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace another output in OUT")
    ] = False,
    stream: Streamed = False,
) -> None:
    """Convert to Neuron's names, layout and FP8 range; streams, and resumes by itself."""
    layout = nm.Layout.from_options(
        {"attention": attention, "fp8_range": fp8_range, "keep_in_bf16": keep_in_bf16 or ()}
    )
    progress = Shown()

    def planned(place: Path) -> "nm.ConversionPlan":
        return nm.plan_conversion(
            _opened(checkpoint, place if stream else None, progress, scale_convention), layout
        )

    if dry_run:
        with TemporaryDirectory() as place:
            show(planned(Path(place)).render())
        return
    plan = planned(out)
    with resumable(RESUMES), progress.stage("converting", plan.nbytes) as advance:
        converted = plan.write(out, check=check, overwrite=overwrite, advance=advance)
    show(converted.render())


@app.command()
def verify(
    checkpoint: CheckpointDir,
    out: ConvertedDir,
    logits: Annotated[
        bool, typer.Option("--logits", help="also run both through the eager model")
    ] = False,
    stream: Streamed = False,
) -> None:
    """Prove that a converted directory equals its checkpoint; exit 1 when it does not."""
    if logits and stream:
        raise typer.BadParameter("--logits runs a whole checkpoint; leave out --stream")
    progress = Shown()
    converted = nm.Converted.open(out, read_shards=False)
    source = _opened(checkpoint, out if stream else None, progress)
    with progress.stage("verifying", 2 * converted.nbytes) as advance:
        verification = nm.verify(source, converted, advance)
    show(verification.render())
    good = verification.equal
    if logits and good:
        comparison = nm.compare_logits(source, converted, progress=progress)
        show(comparison.render())
        good = comparison.agrees
    raise typer.Exit(0 if good else 1)


@app.command()
def cache(
    checkpoint: CheckpointDir,
    cache_dir: Annotated[Path, typer.Argument(metavar="CACHE_DIR", help="directory of the cache")],
    dtype: Annotated[Literal["float32", "bf16"], typer.Option(help="of the weights")] = "float32",
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="compare every byte of a finished cache, and its source; rebuild what differs",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace another cache in CACHE_DIR")
    ] = False,
) -> None:
    """Dequantize once into a Hugging Face checkpoint that loads without arithmetic; streams, and
    resumes by itself.
    """
    progress = Shown()
    source = nm.Checkpoint.open(checkpoint, progress=progress)
    nbytes = source.cache_bytes(dtype)
    with resumable(RESUMES), progress.stage("dequantizing", nbytes) as advance:
        result = source.cache(cache_dir, dtype, check=check, overwrite=overwrite, advance=advance)
    show(result.render())
