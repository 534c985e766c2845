"""The desks that requests pass before they reach the engine: limited processes for each kind of
work, and a line before them that is only so long.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from neuron_minimax.errors import GenerationError, NeuronMiniMaxError, counted
from neuron_minimax.generation import template
from neuron_minimax.generation.tokenizer import PROBE, TextTokenizer
from neuron_minimax.limited import LimitedProcess, Limits, OverLimitError, Setup, itself
from neuron_minimax.serving.grammars import Grammars
from neuron_minimax.serving.preparation import Preparation
from neuron_minimax.serving.protocol import RequestError

MIB = 1 << 20
# What the processes need, beside the tokenizer's own module.
MODULES = (
    "transformers.tokenization_utils_base",
    "neuron_minimax.serving.preparation",
    "neuron_minimax.serving.grammars",
)
SHORT_BODY = 64 << 10  # bytes; a conversation of some ten thousand tokens
# Good work takes a fraction of these, the longest prompts and the largest schemas included.
SHORT_LIMITS = Limits(cpu_seconds=5, memory=256 * MIB)
LONG_LIMITS = Limits(cpu_seconds=20, memory=512 * MIB, niceness=10)
GRAMMAR_LIMITS = Limits(cpu_seconds=2, memory=128 * MIB, niceness=10)


class Desk:
    """Some processes for one kind of work, and at most `line` requests before and at them."""

    def __init__(
        self, kind: str, setup: Setup, limits: Limits, *, processes: int, line: int
    ) -> None:
        self._kind = kind
        self._line = line
        self._present = 0
        self._closed = False
        self._processes = [LimitedProcess(setup, limits) for _ in range(processes)]
        self._free: asyncio.Queue[LimitedProcess] = asyncio.Queue()
        for process in self._processes:
            process.start()
            self._free.put_nowait(process)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Have a place in the line. Raises RequestError (429) when there is none."""
        if self._present >= self._line:
            raise RequestError(
                f"{counted(self._present, 'request')} in the line of {self._kind}; try again later",
                status=429,
                kind="rate_limit_error",
                retry_after=1,
            )
        self._present += 1
        try:
            yield
        finally:
            self._present -= 1

    async def work(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a process makes of it, for somebody who has a place.

        Raises RequestError (400) when it takes more than it may, and what `function` raises.
        """
        process = await self._free.get()
        try:
            return await process.call_async(function, *arguments)
        except OverLimitError as error:
            if self._closed:
                raise RequestError(
                    "the server is shutting down; try another one",
                    status=503,
                    kind="unavailable",
                    retry_after=10,
                ) from None
            raise RequestError(f"the {self._kind}: {error}", code="too_much_work") from None
        finally:
            self._free.put_nowait(process)

    def close(self) -> None:
        """Give up what is being done: whoever waits for it gets 503."""
        self._closed = True
        for process in self._processes:
            process.close()


def check_tokenizer(tokenizer: TextTokenizer) -> None:
    """Have a limited process make tokens of a text. Raises the NeuronMiniMaxError that says why a
    tokenizer that works here does not work there.
    """
    hugging_face = tokenizer.hugging_face
    setup = Setup(itself, hugging_face, preload=(*MODULES, type(hugging_face).__module__))
    process = LimitedProcess(setup, SHORT_LIMITS)
    try:
        process.call(template.encode, PROBE)
    except (NeuronMiniMaxError, RuntimeError, OSError) as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise GenerationError(
            f"the tokenizer of {hugging_face.name_or_path} works in this process, but not in the "
            f"limited ones that make tokens of what clients send: {last}"
        ) from None
    finally:
        process.close()


class Desks:
    """The desks of one served model: short texts, long texts, grammars.

    Long texts have one process, so that short ones never wait for them.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        model_name: str,
        seq_len: int,
        vocab: int,
        *,
        strict: bool = False,
    ) -> None:
        hugging_face = tokenizer.hugging_face
        preparation = Preparation(
            hugging_face=hugging_face,
            chat_format=tokenizer.chat_format,
            model_name=model_name,
            seq_len=seq_len,
            vocab_size=vocab,
            strict=strict,
        )
        modules = (*MODULES, type(hugging_face).__module__)
        texts = Setup(itself, preparation, preload=modules)
        grammars = Setup(
            Grammars,
            hugging_face,
            tokenizer.chat_format,
            tokenizer.stop_token_ids,
            vocab,
            preload=modules,
        )
        self._short = Desk("text", texts, SHORT_LIMITS, processes=2, line=256)
        self._long = Desk("text", texts, LONG_LIMITS, processes=1, line=8)
        self.grammars = Desk("grammar", grammars, GRAMMAR_LIMITS, processes=1, line=32)

    def for_text(self, nbytes: int) -> Desk:
        """Return the desk for a body of so many bytes."""
        return self._long if nbytes > SHORT_BODY else self._short

    def close(self) -> None:
        for desk in (self._short, self._long, self.grammars):
            desk.close()
