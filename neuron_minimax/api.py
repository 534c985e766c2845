"""The parts of the public API that join folders; neuron_minimax/__init__.py lists all of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuron_minimax.backends import CompileMode, CompileReport, compile_model
from neuron_minimax.checkpoint import reader
from neuron_minimax.checkpoint.kinds import CONVERSION_NAME, DOWNLOADS
from neuron_minimax.checkpoint.output import require_ours
from neuron_minimax.checkpoint.writer import require_place
from neuron_minimax.convert.cache import CacheResult, build_cache, cache_bytes
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import ConversionError, GenerationError
from neuron_minimax.files import read_json
from neuron_minimax.inspection.precision import PrecisionReport
from neuron_minimax.inspection.precision import inspect as inspect_checkpoint
from neuron_minimax.progress import SILENT, Advance, Progress, nothing


class Checkpoint(reader.Checkpoint):
    """A checkpoint in Hugging Face's layout, FP8 or dense, whose headers have been read.

    Its tensors are mapped when they are asked for. `problems` lists what is wrong with it.

    >>> source = Checkpoint.open("MiniMax-M2")
    >>> source.inspect().usable
    True
    """

    @classmethod
    def stream(
        cls,
        hub_id: str,
        out: str | Path,
        scale_convention: str = "auto",
        *,
        progress: Progress = SILENT,
    ) -> "Checkpoint":
        """Open a checkpoint on the Hugging Face hub to convert it into `out` shard by shard.

        Headers and samples are fetched now. `plan_conversion(source).write(out)` then downloads
        each shard into `out`/.download, compares it with its published digest, converts it,
        compares that with it, and removes it. Raises CheckpointError when the hub does not give the
        checkpoint, ConversionError when `out` holds something else.

        >>> source = Checkpoint.stream("MiniMaxAI/MiniMax-M2", "m2-neuron")
        >>> plan_conversion(source).write("m2-neuron")
        """
        require_place(Path(out), ConversionError)
        require_ours(Path(out), CONVERSION_NAME)
        place = Path(out) / DOWNLOADS
        return cls.streamed(hub_id, place, scale_convention, progress=progress)

    def inspect(
        self,
        *,
        values: bool = False,
        against: "str | Path | reader.Checkpoint | None" = None,
        modules_to_not_convert: Sequence[str] | None = None,
        progress: Progress = SILENT,
    ) -> PrecisionReport:
        """Report the precision of every kind of weight, and what is wrong.

        Headers alone are looked at; with `values` every byte is read. `against` is another
        checkpoint to compare with, `modules_to_not_convert` a list to judge. Raises ConfigError or
        CheckpointError for an `against` that is not a checkpoint.
        """
        if isinstance(against, str | Path):
            against = reader.Checkpoint.open(against, progress=progress)
        return inspect_checkpoint(
            self,
            modules_to_not_convert=modules_to_not_convert,
            check_values=values,
            against=against,
            progress=progress,
        )

    def cache_bytes(self, dtype: str = "float32") -> int:
        """Return how many bytes `cache` would write."""
        return cache_bytes(self, dtype)

    def cache(
        self,
        directory: str | Path,
        dtype: str = "float32",
        *,
        check: bool = False,
        overwrite: bool = False,
        advance: Advance = nothing,
    ) -> CacheResult:
        """Dequantize into a Hugging Face checkpoint that loads without arithmetic.

        `dtype` is "float32" or "bf16". An interrupted build is resumed; `check` re-reads a
        finished one and rebuilds what is damaged. `advance` is called with bytes written. Raises
        CheckpointError or ConversionError.
        """
        return build_cache(
            self, directory, dtype, check=check, overwrite=overwrite, advance=advance
        )


def compile(
    converted: str | Path | Converted,
    traced: str | Path,
    *,
    backend: str = "cpu",
    force: bool = False,
    check: bool = False,
    copy_weights: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> CompileReport:
    """Compile a converted directory into `traced`, or recognize that this was done.

    `backend` is "cpu", "neuron" or "torch-neuron"; `options` are the backend's own, under the names
    of the command line: `slots`, `seq_len`, `buckets`, `engine`, `tp_degree`, ... `force` compiles
    in any case; `check` reads every byte of a compile that is there, weights too, and makes again
    what is damaged. The weights are hard links to the converted shards, or stay where they are when
    that is on another file system; with `copy_weights` they are copies, and `traced` needs no other
    directory. `progress` hears of each graph. Raises BackendError on bad options, when another
    compile is writing to `traced`, when it holds something else, or when its disk is too small, and
    ConversionError when the converted directory is damaged.

    >>> compile("m2-neuron", "traced_model/m2", backend="cpu", seq_len=2048)
    """
    return compile_model(
        converted,
        traced,
        backend=backend,
        options=options,
        mode=CompileMode(force=force, check=check, copy_weights=copy_weights),
        progress=progress,
    )


def explain_fp8(
    checkpoint: reader.Checkpoint | None = None,
    tensor: str | None = None,
    block: tuple[int, int] = (0, 0),
    output_dir: str | Path = ".",
) -> str:
    """Explain one FP8 block step by step; write the guide and return it as text.

    `tensor` names an FP8 weight of the checkpoint (default: its first), `block` its row and column
    of blocks. Without a checkpoint a normal weight is made and quantized. The guide is written as
    Markdown and HTML. Raises CheckpointError when the block does not exist, NeuronMiniMaxError
    naming a file that cannot be written.
    """
    from neuron_minimax.studies.explain.fp8 import from_checkpoint, made_here, write_guide

    subject = (
        made_here(place=block) if checkpoint is None else from_checkpoint(checkpoint, tensor, block)
    )
    return write_guide(subject, Path(output_dir))


def read_tools(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON file with a list of tools in OpenAI's form, held to what the server accepts.

    Raises GenerationError naming the file, and what of it is wrong.
    """
    from neuron_minimax.serving.preparation import tool_objects
    from neuron_minimax.serving.protocol import RequestError, Tool

    advice = (
        'expected a list of tools such as [{"type": "function", "function": {"name": "add", '
        '"parameters": {"type": "object", "properties": {}}}}]'
    )
    try:
        tools = read_json(Path(path), list[Tool], GenerationError, advice)
        objects = tool_objects(tools)
    except FileNotFoundError:
        raise GenerationError(f"{path} does not exist; {advice}") from None
    except RequestError as error:
        raise GenerationError(f"{path} cannot be used ({error}); {advice}") from None
    if objects is None:
        raise GenerationError(f"{path} holds no tool; {advice}")
    return objects
