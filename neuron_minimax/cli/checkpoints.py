"""Commands about checkpoints: inspect, convert, verify, cache."""

import json
from pathlib import Path
from typing import Annotated

import typer

import neuron_minimax as nm
from neuron_minimax.cli.app import CheckpointDir, ConvertedDir, app, progress_bar


def _split(names: str | None) -> list[str] | None:
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


@app.command()
def inspect(
    checkpoint: CheckpointDir,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    output: Annotated[
        Path | None, typer.Option(help="write the report to this file as well")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="write the report as one self-contained page")
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
    found = nm.Checkpoint.open(checkpoint).inspect(
        values=check_values,
        against=against,
        modules_to_not_convert=_split(modules_to_not_convert),
        bar=progress_bar,
    )
    text = json.dumps(found.to_json(), indent=2) if as_json else found.render()
    if output is not None:
        nm.write_text(output, text.rstrip() + "\n")
    if html is not None:
        nm.write_text(html, found.render_page())
    print(text.rstrip())
    raise typer.Exit(0 if found.usable else 1)


@app.command()
def convert(
    checkpoint: CheckpointDir,
    out: ConvertedDir,
    attention: Annotated[str, typer.Option(help="fp8 (exact) or bf16")] = "fp8",
    fp8_range: Annotated[
        str, typer.Option(help="neuron (codes to 240) or ocp (to 448, trn3)")
    ] = "neuron",
    scale_convention: Annotated[str, typer.Option(help="auto, multiplier or reciprocal")] = "auto",
    keep_in_bf16: Annotated[
        list[str] | None, typer.Option(metavar="MODULE", help="may be repeated")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan and the space it needs")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace another output in OUT")
    ] = False,
) -> None:
    """Convert to Neuron's names, layout and FP8 range; streams, and resumes by itself."""
    layout = nm.Layout.from_options(
        {"attention": attention, "fp8_range": fp8_range, "keep_in_bf16": keep_in_bf16 or ()}
    )
    plan = nm.plan_conversion(nm.Checkpoint.open(checkpoint, scale_convention), layout)
    if dry_run:
        print(plan.render())
        print(f"space needed: {plan.nbytes / 1e9:.3f} GB")
        return
    with progress_bar("converting", plan.nbytes) as advance:
        converted = plan.write(out, overwrite=overwrite, progress=advance)
    print(converted.render())


@app.command()
def verify(
    checkpoint: CheckpointDir,
    out: ConvertedDir,
    logits: Annotated[
        bool, typer.Option("--logits", help="also run both through the eager model")
    ] = False,
) -> None:
    """Prove that a converted directory equals its checkpoint; exit 1 when it does not."""
    converted = nm.Converted.open(out)
    source = nm.Checkpoint.open(checkpoint)
    with progress_bar("verifying", 2 * converted.nbytes) as advance:
        verification = nm.verify(source, converted, advance)
    print(verification.render())
    good = verification.equal
    if logits and good:
        comparison = nm.compare_logits(source, converted)
        print(comparison.render())
        good = comparison.agrees
    raise typer.Exit(0 if good else 1)


@app.command()
def cache(
    checkpoint: CheckpointDir,
    cache_dir: Annotated[Path, typer.Argument(metavar="CACHE_DIR", help="directory of the cache")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    check: Annotated[
        bool, typer.Option("--check", help="re-read a finished cache and rebuild what is damaged")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace another cache in CACHE_DIR")
    ] = False,
) -> None:
    """Dequantize once into a Hugging Face checkpoint that loads without arithmetic; streams, and
    resumes by itself.
    """
    source = nm.Checkpoint.open(checkpoint)
    with progress_bar("dequantizing", source.cache_bytes(dtype)) as advance:
        result = source.cache(cache_dir, dtype, check=check, overwrite=overwrite, progress=advance)
    print(result.render())
