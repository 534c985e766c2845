"""The command that does everything: run, from a checkpoint to a talk or one answer."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

import neuron_minimax as nm
from neuron_minimax.cli.app import app
from neuron_minimax.cli.chat import (
    MaxNewTokens,
    ShowReasoning,
    Thinking,
    checked_prompt,
    talk,
    template_arguments,
)
from neuron_minimax.cli.ending import resumable, say
from neuron_minimax.cli.models import KVCacheDtype
from neuron_minimax.cli.progress import Shown
from neuron_minimax.cli.turns import TurnPrinter, say_if_cut


class Stages:
    """A watcher that prints the stages: a title, progress, what was found, the seconds."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self.progress = Shown()

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        self._tell(f"== {title}")
        start = time.perf_counter()
        yield
        self._tell(f"   {time.perf_counter() - start:.2f} s")

    def say(self, text: str) -> None:
        self._tell("   " + text.replace("\n", "\n   "))


@app.command()
def run(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="checkpoint directory or Hugging Face hub id, or a converted or compiled "
            "directory; default: the embedded demo model",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="answer this instead of talking")
    ] = None,
    work_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="where what is made is kept")
    ] = Path("traced_model"),
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="context; default: what memory allows, at most 8192"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="sequences alive at the same time; default 1")
    ] = None,
    compute: Annotated[
        Literal["float32", "bf16"] | None, typer.Option(help="of activations; default: float32")
    ] = None,
    kv_cache_dtype: KVCacheDtype = None,
    max_new_tokens: MaxNewTokens = None,
    thinking: Thinking = None,
    reasoning: ShowReasoning = True,
) -> None:
    """Do all it takes to talk to a model on this machine's CPU: inspect, convert, verify, compile.

    What is made is kept, and the next run starts in seconds.
    """
    if prompt is not None:
        checked_prompt(prompt)
    stages = Stages(say)
    arguments = template_arguments(thinking)
    with resumable("what is finished is kept; run the same command again to go on"):
        traced = nm.make_ready(
            model or nm.DEMO,
            work_dir,
            options={
                "seq_len": seq_len,
                "slots": batch_size,
                "compute": compute,
                "kv_cache_dtype": kv_cache_dtype,
            },
            chat_template_kwargs=arguments or {},
            watcher=stages,
        )
    with stages.stage(f"load {traced}"):
        llm = nm.LLM(traced, progress=stages.progress)
    say(f"to talk again: neuron-minimax chat {traced}; to serve it: neuron-minimax serve {traced}")
    one = nm.Chat(llm, chat_template_kwargs=arguments)
    if prompt is None:
        raise typer.Exit(talk(one, traced.resolve().name, max_new_tokens, reasoning))
    with TurnPrinter(reasoning=reasoning) as printer:
        for event in one.say(prompt, max_new_tokens):
            printer.add(event)
    say_if_cut(one.last, max_new_tokens)
